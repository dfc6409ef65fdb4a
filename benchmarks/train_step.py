"""Where the time of a train step goes, how near it comes to this machine's matmul peak, and how it
compares with the same step in PyTorch.

    python benchmarks/train_step.py
    pip install torch && python benchmarks/train_step.py --torch
    python benchmarks/train_step.py --config=configs/self_forcing.py --rounds=100

Parts and whole steps are compiled, then called in turn. Of a part the median is printed; of a whole
step the mean of all rounds, since its number of network calls is drawn. Causal rollouts draw theirs
too: with them, means of all parts are printed, and a round's parts share their draws.

FLOPs are those of `dmd_jax.training.flops`, of ours for PyTorch too. The peak is the best of a few
large float32 matmuls in the same process. The cores of a CPU are as many devices as `dmd_jax.main`
makes of them; JAX_NUM_CPU_DEVICES=1 leaves them one. PyTorch has a thread for each core.
"""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from peak import matmul_peak

from dmd_jax.devices.cores import split_cores
from dmd_jax.diffusion.denoiser import guided
from dmd_jax.rollouts import backward_simulation
from dmd_jax.training import flops, loop
from dmd_jax.training.cost import cost
from dmd_jax.training.run import build

CONFIG = config_flags.DEFINE_config_file("config", "configs/dmd.py")
ROUNDS = flags.DEFINE_integer("rounds", 25, "Rounds over all parts.")
TORCH = flags.DEFINE_bool("torch", False, "Time the step in PyTorch too, eager and compiled.")
UPDATES = {True: "with generator", False: "without"}


def main(_):
    split_cores(CONFIG.value.batch_size // CONFIG.value.accumulate)
    run = build(CONFIG.value)
    with jax.set_mesh(run.mesh):
        measure(run)


def measure(run):
    state, frozen = run.start()
    batch = next(run.batches(0))
    nets, keys = state.nets | frozen, jax.random.split(jax.random.key(0), ROUNDS.value + 1)
    rivals = torch_steps(run, nets) if TORCH.value else {}
    work, seconds, limit = {}, {}, matmul_peak()
    for name, (part, calls) in parts(run, nets, batch).items():
        work[name] = flops.count(part, nets, keys[0], trips=run.method.trips | {"": calls})
        seconds[name] = partial(_ready, jax.jit(part), nets, keys)
    typical = statistics.median if run.method.video is None else statistics.mean
    timed = {name: typical(times) for name, times in in_turn(seconds).items()}
    del nets, seconds  # the step donates the state

    steps, root, total = loop.compile_steps(run), loop.root_key(run.config), cost(run)
    state = [state]

    def ours(kind, _):
        state[0], metrics = steps[kind].result()(state[0], frozen, batch, root)
        jax.block_until_ready(metrics)

    calls = {f"whole step {UPDATES[kind]}": partial(ours, kind) for kind in steps}
    work |= {f"whole step {UPDATES[kind]}": total.step[kind] for kind in steps}
    for name, rival in rivals.items():
        for kind in steps:
            calls[f"{name}, {UPDATES[kind]}"] = partial(_rival, rival, kind)
            work[f"{name}, {UPDATES[kind]}"] = total.step[kind]
    timed |= {name: statistics.mean(times) for name, times in in_turn(calls).items()}

    print(f"batch {run.config.batch_size}, matmul peak {limit / 1e9:.1f} GFLOP/s (measured)")
    for name, typical in timed.items():
        rate = work[name] / typical / 1e9
        share = 1e9 * rate / limit
        print(f"{name:<40}{1e3 * typical:8.1f} ms {rate:7.1f} GFLOP/s {share:6.1%} of peak")


def parts(run, nets, batch):
    """Parts of a step, {name: (function of networks and key, calls of a rollout but its last)}."""
    method, size = run.method, run.config.batch_size
    stream = method.streams(run.nets["generator"], batch["cond"])
    batch = batch | {"index": jnp.arange(size), "stream": stream}
    cond, uncond, t = batch["cond"], batch["uncond"], jnp.full(size, 0.5)
    make = _image_parts if method.video is None else _video_parts
    x, own = make(method, nets, batch)
    rollout = backward_simulation.Rollout(x, None, jnp.float32(1), jnp.float32(0), cond)

    def critic_loss(net, nets, key):
        return method.critic_loss({"fake_score": net}, nets, rollout, batch, key)[0]

    return own | {
        "teacher, guided": (
            lambda nets, _: guided(nets["teacher"], x, t, cond, uncond, method.guidance),
            0,
        ),
        "fake score, one pass": (lambda nets, _: nets["fake_score"](x, t, cond), 0),
        "critic, forward and backward": (
            lambda nets, key: jax.grad(critic_loss)(nets["fake_score"], nets, key),
            0,
        ),
    }


def _image_parts(method, nets, batch):
    """(zeros of the shape that is compared, parts that call the generator)."""
    cond, index = batch["cond"], batch["index"]
    x, t = jnp.zeros((len(index), *method.sample_shape)), jnp.full(len(index), 0.5)
    longest = method.sampler(len(method.times), 1.0)
    return x, {
        "rollout to the last call, no gradient": (
            lambda nets, key: longest(nets["generator"], x, cond, None, key, index),
            len(method.times) - 1,
        ),
        "generator, forward and backward": (
            lambda nets, _: jax.grad(lambda net: jnp.sum(net(x, t, cond)))(nets["generator"]),
            0,
        ),
    }


def _video_parts(method, nets, batch):
    """The same of a causal rollout: with its gradient, and without."""

    def roll_out(net, nets, key):
        return method.rollout(net, nets, batch, key).x0

    compared = jax.eval_shape(roll_out, nets["generator"], nets, jax.random.key(0)).shape
    gradient = jax.grad(lambda *args: jnp.sum(roll_out(*args)))
    return jnp.zeros(compared), {
        "rollout, no gradient": (
            lambda nets, key: roll_out(nets["generator"], nets, key),
            method.expected_exit_step,
        ),
        "rollout and its gradient": (
            lambda nets, key: gradient(nets["generator"], nets, key),
            method.expected_exit_step,
        ),
    }


def torch_steps(run, nets):
    """{name: step in PyTorch}, after a check that its network equals ours."""
    from torch_step import TorchStep, require_same

    require_same(run, nets["teacher"])
    names = {"PyTorch, eager": False, "PyTorch, torch.compile": True}
    return {name: TorchStep(run, nets, compiled=compiled) for name, compiled in names.items()}


def in_turn(calls):
    """{name: seconds of every round}; the first call of each, which compiles, is not counted."""
    for call in calls.values():
        call(ROUNDS.value)
    times = {name: [] for name in calls}
    for number in range(ROUNDS.value):
        for name, call in calls.items():
            start = time.perf_counter()
            call(number)
            times[name].append(time.perf_counter() - start)
    return times


def _ready(part, nets, keys, number):
    jax.block_until_ready(part(nets, keys[number]))


def _rival(step, kind, _):
    step(update_generator=kind)


if __name__ == "__main__":
    app.run(main)
