r"""How far a teacher of fewer bits turns DMD's gradient, by noise level.

    python benchmarks/int8.py --config=configs/dmd.py
    python benchmarks/int8.py --config=configs/self_forcing.py --workdir=runs/self_forcing

Samples, noise and fake score are those of the config's run, at its first step or, with --workdir,
at its last checkpoint. Only the teacher changes. Printed is |g - g32| / |g32| over a batch, where
g32 is the gradient with the teacher in float32.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from dmd_jax.devices import randomness
from dmd_jax.losses.distribution_matching import dmd_gradient
from dmd_jax.training import loop
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.run import build

CONFIG = config_flags.DEFINE_config_file("config", "configs/dmd.py", "A run of DMD.")
WORKDIR = flags.DEFINE_string("workdir", None, "A directory of this run; it is not changed.")
TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
# Both dtypes of `config.teacher.compute`: in which it computes, and of the layers' weights.
TEACHERS = (("float32", "int8"), ("bfloat16", None), ("bfloat16", "int8"))


def teacher(dtype, weights_dtype):
    """The teacher as a run keeps it."""
    config = CONFIG.value.copy_and_resolve_references()
    config.teacher.compute.update(dtype=dtype, weights_dtype=weights_dtype)
    return build(config, jax.devices()[:1]).load_frozen()["teacher"]


def states(run):
    """(what is trained, what is not) at the first step, or at the last checkpoint of --workdir."""
    if WORKDIR.value is None:
        state, frozen = run.start()
        return state.nets, frozen
    with Checkpointer(Path(WORKDIR.value), keep=2) as checkpoints:
        state, step, _ = checkpoints.restore_latest(run.state_shape())
    print(f"the state after step {step}")
    return state.nets, run.load_frozen()


def gradients(run, nets, batch, key):
    """A function of a teacher: its gradients at TIMES for one batch, [T, B, ...]."""
    method = run.method
    rollout_key, eps_key = jax.random.split(key)
    rollout = jax.jit(method.rollout)(nets["generator"], nets, batch, rollout_key)
    eps = randomness.normal(eps_key, batch["index"], rollout.x0.shape[1:])

    def gradient(teacher, t):
        with_it = nets | {"teacher": teacher}
        times = jnp.full(len(eps), t)
        x_t = teacher.schedule.add_noise(rollout.x0, eps, times)
        real, fake = method.scores(with_it, x_t, times, rollout.cond, batch["uncond"])
        how = dict(mask=rollout.mask, frames_per_block=method.frames_per_block)
        return dmd_gradient(rollout.x0, real, fake, normalize=method.normalize, **how)

    return jax.jit(lambda teacher: jax.lax.map(partial(gradient, teacher), jnp.array(TIMES)))


def main(_):
    run = build(CONFIG.value, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        nets = run.bind(*states(run))
        batch = next(run.batches(0)) | {"index": jnp.arange(run.config.batch_size)}
        call = gradients(run, nets, batch, loop.root_key(run.config))
        exact = call(teacher("float32", None)).reshape(len(TIMES), -1)
        print(f"{'compute':<10}{'weights':<10}" + "".join(f"{f't={t}':>8}" for t in TIMES))
        for dtype, weights_dtype in TEACHERS:
            away = call(teacher(dtype, weights_dtype)).reshape(exact.shape) - exact
            errors = jnp.linalg.norm(away, axis=1) / jnp.linalg.norm(exact, axis=1)
            row = "".join(f"{error:>8.3f}" for error in errors)
            print(f"{dtype:<10}{weights_dtype or dtype:<10}{row}", flush=True)


if __name__ == "__main__":
    app.run(main)
