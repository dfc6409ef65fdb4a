"""Where the time of a train step goes, and how near it comes to this machine's matmul peak.

    python benchmarks/train_step.py --config=configs/dmd.py

Each part is compiled and timed by itself, in turn with the others; medians of all rounds are
printed, and of the whole step the mean, over exit steps as they are drawn. FLOPs are arithmetic:
two per weight of a layer and token, plus attention, forward; twice that again, backward. The peak
is the best of a few large float32 matmuls in the same process. The cores of a CPU are as many
devices as `dmd_jax.main` makes of them; JAX_NUM_CPU_DEVICES=1 leaves them one.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from peak import matmul_peak

from dmd_jax.devices.cores import split_cores
from dmd_jax.diffusion.denoiser import guided
from dmd_jax.rollouts import backward_simulation, samplers
from dmd_jax.training import loop
from dmd_jax.training.run import build

CONFIG = config_flags.DEFINE_config_file("config", "configs/dmd.py")
ROUNDS = flags.DEFINE_integer("rounds", 25, "Rounds over all parts.")


def forward_flops(net, batch):
    """FLOPs of one forward pass of a DiT over `batch` samples."""
    config = net.config
    tokens = (config.image_size // config.patch) ** 2
    layer_weights = sum(x.size for x in jax.tree.leaves(net.blocks))
    attention = 4 * tokens * config.dim * config.depth
    return 2 * batch * tokens * (layer_weights + attention / 2)


def expected_calls(method):
    """Mean number of generator calls in a rollout, over strides and exit steps."""
    steps = [len(method.times) // stride for stride in method.strides]
    share = method.last_step_share
    return statistics.mean(share * n + (1 - share) * (n + 1) / 2 for n in steps)


def main(_):
    split_cores(CONFIG.value.batch_size // CONFIG.value.accumulate)
    run = build(CONFIG.value)
    with jax.set_mesh(run.mesh):
        measure(run)


def measure(run):
    config, method = run.config, run.method
    state, frozen = run.start()
    batch = next(run.batches(0))
    key = jax.random.key(0)
    steps = {kind: step.result() for kind, step in loop.compile_steps(run).items()}
    batch = batch | {"index": jnp.arange(config.batch_size)}
    nets = state.nets | frozen
    x = jnp.zeros((config.batch_size, *method.sample_shape))
    t = jnp.full(config.batch_size, 0.5)
    made = backward_simulation.Rollout(x, None, jnp.float32(1), jnp.float32(0), batch["cond"])

    def teacher(nets):
        return guided(nets["teacher"], x, t, batch["cond"], batch["uncond"], method.guidance)

    def generator(nets):
        def loss(net):
            return jnp.sum(net(x, t, batch["cond"]))

        return jax.grad(loss)(nets["generator"])

    def critic(nets):
        def loss(net):
            return method.critic_loss({"fake_score": net}, nets, made, batch, key)[0]

        return jax.grad(loss)(nets["fake_score"])

    longest = samplers.FewStep(method.times, method.shift)
    calls = {
        "rollout to the last call, no gradient": (
            lambda n: longest(n["generator"], x, batch["cond"], None, key, batch["index"]),
            longest.calls,
        ),
        "teacher, guided": (teacher, 1 if method.guidance == 1 else 2),
        "fake score, one pass": (lambda n: n["fake_score"](x, t, batch["cond"]), 1),
        "critic, forward and backward": (critic, 3),
        "generator, forward and backward": (generator, 3),
    }
    parts = {name: (jax.jit(call), passes) for name, (call, passes) in calls.items()}
    times = {name: [] for name in [*parts, *steps]}
    for call, _ in parts.values():
        jax.block_until_ready(call(nets))
    for _ in range(ROUNDS.value):
        for name, (call, _) in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(call(nets))
            times[name].append(time.perf_counter() - start)
    del nets
    for _ in range(ROUNDS.value):
        for kind, step in steps.items():
            start = time.perf_counter()
            state, metrics = step(state, frozen, {k: batch[k] for k in ("cond", "uncond")}, key)
            jax.block_until_ready(metrics)
            times[kind].append(time.perf_counter() - start)

    peak, unit = matmul_peak(), forward_flops(run.nets["generator"].net, config.batch_size)
    rollout_passes = expected_calls(method)
    teacher_passes = parts["teacher, guided"][1]
    passes = {name: count for name, (_, count) in parts.items()}
    passes[True] = rollout_passes + 2 + teacher_passes + 1 + 3  # the last call has a backward
    passes[False] = rollout_passes + 3
    print(f"batch {config.batch_size}, one forward pass {unit / 1e9:.2f} GFLOP (arithmetic)")
    print(f"matmul peak {peak / 1e9:.1f} GFLOP/s (measured)")
    names = {True: "whole step with generator", False: "whole step without"}
    for name, seconds in times.items():
        # A whole step draws its exit step: the mean goes with the mean number of calls.
        typical = statistics.mean(seconds) if name in names else statistics.median(seconds)
        rate = passes[name] * unit / typical
        print(
            f"{names.get(name, name):<38}{1e3 * typical:8.1f} ms {rate / 1e9:7.1f} GFLOP/s "
            f"{rate / peak:6.1%} of peak"
        )


if __name__ == "__main__":
    app.run(main)
