"""This library on one NVIDIA GPU: first whether it is right, then how fast it is.

    pip install -e '.[cuda]' torch diffusers
    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry_run
    python benchmarks/gpu.py --only=attention,forward

Right, or the exit code is 1:

    attention   the kernels under every mask, with their gradients, against float32 on the CPU
    step        a train step of configs/dmd.py, in float32, against the CPU's
    resume      runs of configs/dmd.py, killed and resumed, bit for bit (see faults.py)

Fast, of random weights of Wan 1.3B that compute in bfloat16, for one video of 480p: 21 latent
frames, 32,760 tokens, 512 text tokens:

    forward     a forward pass; against diffusers' too, on the same weights
    generator   an update of one-step DMD's generator, with a teacher of 1.3B; rematerialised
    critic      an update of its fake score
    rollout     Self-Forcing's rollout in blocks of three frames, without its gradient
    stream      a video without an end, four steps a block: seconds to the first block, and frames
                a second; the autoencoder is not included

The first three are timed in PyTorch too (`wan.py`), eager, and before ours, for both together need
more than 80 GB. The other two have no counterpart in PyTorch here. Times are medians, of a rollout
means. Shares are of the card's peak in bfloat16; what is computed again is no work.

Without a GPU, or with --dry_run, everything runs at toy size on the CPU and times nothing. Where
JAX's wheels for CUDA are installed, the programs of real size are compiled for an H100 (`compile`).
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

# PyTorch and the programs that are killed need memory of the card beside this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import attention
import faults
import faulty_files
import jax
import jax.numpy as jnp
import numpy as np
import wan
from absl import app, flags
from peak import matmul_peak

from dmd_jax.devices import sharding
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.attention import Causal, forward_mode
from dmd_jax.models.wan import T2V_1_3B, WanConfig
from dmd_jax.pipelines.streaming import Stream
from dmd_jax.rollouts.samplers import few_step
from dmd_jax.training import flops, gpus, loop, topologies
from dmd_jax.training.run import build

FLAGS = flags.FLAGS
TIMES, SHIFT = (1.0, 0.75, 0.5, 0.25), 5.0
WINDOW = Causal(frames_per_block=3, window=12, sink=3)
VIDEO_FRAMES = 4  # of a latent frame
KILLS = 3
# Largest difference that rounding explains, as a share of the largest value.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is timed: a network, its latents [F, H, W, C] and its text tokens."""

    config: WanConfig
    latents: tuple[int, int, int, int]
    text: int

    @property
    def tokens(self):
        frames, height, width, _ = self.latents
        return frames * height * width // 4

    def inputs(self):
        """(latents [1, F, H, W, C], text [1, L, D])."""
        rng = np.random.default_rng(0)
        shapes = (1, *self.latents), (1, self.text, self.config.text_dim)
        return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


MIXED = dict(dtype="bfloat16", remat="full")
REAL = Size(dataclasses.replace(T2V_1_3B, **MIXED), (21, 60, 104, 16), 512)
TOY = Size(WanConfig(dim=32, ffn=64, heads=2, depth=2, text_dim=16, **MIXED), (6, 4, 4, 16), 8)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The card, None in a dry run, and its peak in FLOP/s."""

    gpu: jax.Device | None
    peak: float
    size: Size

    @property
    def device(self):
        return self.gpu or jax.devices("cpu")[0]

    def report(self, name, who, seconds, work):
        """Prints a time; in a dry run, that it ran."""
        taken = f"{1e3 * seconds:10.1f} ms{work / seconds / self.peak:8.1%} of peak"
        print(f"{name:<12}{who:<20}{taken if self.gpu else 'runs'}", flush=True)


def define_flags():
    flags.DEFINE_bool("dry_run", False, "Toy sizes on the CPU, even where there is a GPU.")
    flags.DEFINE_list("only", [*PARTS], f"Which of {', '.join(PARTS)}.")
    flags.DEFINE_integer("rounds", 10, "Calls of a program that are timed.", lower_bound=1)


# Right. Each part returns what is wrong, as lines.


def check(name, error, bound):
    """Prints an error; returns what is wrong."""
    print(f"{name:<60}{error:9.1e}, at most {bound:.0e}", flush=True)
    return [] if error <= bound else [f"{name}: {error:.1e} is above {bound:.0e}"]


def attention_is_right(machine):
    length, wrong = 3 * attention.FRAME, []
    cases = [(name, mask, length, length, None) for name, mask in attention.masks(length).items()]
    cases += [("a cache that is not full", None, attention.FRAME, length, np.int32(length - 99))]
    cases += [("a prompt of odd length", None, length, 77, None)]
    for dtype, bound in BOUNDS.items():
        for name, mask, queries, keys, visible in cases:
            plain = functools.partial(dense, mask=mask, visible=visible)
            program = attention.programs(mask, visible)["forward, backward"]
            inputs = arrays(queries, keys, dtype)
            found = largest_error(program, machine, with_gradient(plain), inputs)
            wrong += check(f"attention, {dtype}, {name}", found, bound)
        inputs = arrays(length, length, dtype)
        found = largest_error(tangent(attention.attention), machine, tangent(dense), inputs)
        wrong += check(f"attention, {dtype}, forward mode", found, bound)
    return wrong


def dense(q, k, v, mask=None, visible=None):
    """Attention by its formula."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        rows, columns = np.indices(scores.shape[-2:])
        scores = jnp.where(mask.allows(rows, columns), scores, -jnp.inf)
    if visible is not None:
        scores = jnp.where(jnp.arange(k.shape[1]) < visible, scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)


def with_gradient(function):
    """A function of (q, k, v, gradient) like those of attention.py."""

    def both(q, k, v, gradient):
        out, back = jax.vjp(function, q, k, v)
        return out, back(gradient)

    return both


def arrays(queries, keys, dtype):
    """q, k, v and the gradient of the result."""
    rng, shape = np.random.default_rng(0), (attention.HEADS, attention.WIDTH)
    lengths = (queries, keys, keys, queries)
    return [jnp.asarray(rng.normal(size=(1, n, *shape)), dtype) for n in lengths]


def tangent(function):
    """How the result changes as q, k and v all change like the last argument."""

    def change(q, k, v, towards):
        with forward_mode():
            return jax.jvp(function, (q, k, v), (towards, towards, towards))

    return jax.jit(change)


def largest_error(program, machine, exact, inputs):
    """Of a program's results on the device, from those of `exact` in float32 on the CPU.

    Relative to the largest value of each result.
    """
    cpu = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        wanted = exact(*(jax.device_put(x.astype(jnp.float32), cpu) for x in inputs))
        found = program(*jax.device_put(inputs, machine.device))
    pairs = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    return max(np.abs(np.float64(a) - b).max() / np.abs(b).max() for a, b in pairs)


def step_is_right(machine):
    with tempfile.TemporaryDirectory() as folder:
        # Without a GPU, two devices take the step: their sums have another order.
        devices = [machine.gpu] if machine.gpu else jax.devices("cpu")[:2]
        found, wanted = (step_on(d, folder) for d in (devices, jax.devices("cpu")[:1]))
    wrong = []
    for name, tree in wanted.items():
        pairs = zip(*map(jax.tree.leaves, (found[name], tree)), strict=True)
        error = max(np.linalg.norm(np.float64(a) - b) / (np.linalg.norm(b) or 1) for a, b in pairs)
        wrong += check(f"a train step, {name}, the worst array", error, 1e-3)
    return wrong


def step_on(devices, folder):
    """{part: what a train step with the generator's update leaves}."""
    config = faulty_files.load_config()
    roles = {f"{role}.compute.unroll": 1 for role in ("teacher", "generator", "fake_score")}
    config.update_from_flattened_dict({"batch_size": 8, "data.data_dir": folder} | roles)
    use_float32_products("float32")
    run = build(config, devices)
    with jax.default_device(devices[0]), jax.set_mesh(run.mesh):
        (state, frozen), batch = run.start(), next(run.batches(0))
        key = loop.root_key(config)
        step = loop.lower(run, batch, key, True).compile()
        state, metrics = step(state, frozen, batch, key)
    jax.config.update("jax_default_matmul_precision", None)
    parts = dict(networks=state.nets, moments=state.opt_state, averages=state.ema, metrics=metrics)
    return jax.device_get(parts)


def resume_is_right(machine):
    if machine.gpu:
        chosen = "--xla_gpu_deterministic_ops=true"
        faults.FAST.update(JAX_PLATFORMS="cuda,cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
        faults.FAST["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {chosen}"
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        wanted = faults.Wanted(folder / "undisturbed", data, folder / "cache")
        return faults.kills(folder, data, wanted, random.Random(0), KILLS)


# Fast.


def seconds(call, typical=statistics.median):
    """Typical seconds of a callable; its first call, which compiles, is not counted."""
    call(0)
    taken = []
    for number in range(FLAGS.rounds):
        start = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - start)
    return typical(taken)


def updates(machine, named):
    """The programs of wan.py, PyTorch's first; returns what is wrong."""
    import torch

    size, results, wrong = machine.size, {}, []
    x, text = size.inputs()
    programs, state = wan.theirs(size.config, x, text, "cuda" if machine.gpu else "cpu")
    for who in ("PyTorch, eager", "ours"):
        if who == "ours":
            del programs
            gc.collect()
            torch.cuda.empty_cache()
            programs = wan.ours(size.config, state, x, text)
        for name in named:
            taken = seconds(lambda _, call=programs[name]: call())
            work = wan.PASSES[name] * wan.forward_flops(size.config, size.tokens, size.text)
            machine.report(name, who, taken, work)
        if "forward" in named:
            results[who] = programs["forward"]()
    if results:
        theirs = np.moveaxis(results["PyTorch, eager"].float().cpu().numpy(), 1, -1)
        error = np.linalg.norm(np.float32(results["ours"]) - theirs) / np.linalg.norm(theirs)
        wrong += check("forward, against diffusers, both in bfloat16", error, 5e-2)
    return wrong


def student(size):
    """A causal Denoiser with random weights in bfloat16, and its text."""
    shapes = Denoiser(wan.abstract(size.config))
    leaves, tree = jax.tree.flatten(shapes)

    def draw():
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return [
            0.02 * jax.random.normal(k, x.shape, "bfloat16")
            for k, x in zip(keys, leaves, strict=True)
        ]

    return jax.tree.unflatten(tree, jax.jit(draw)()), size.inputs()[1]


def rollouts(size):
    """(method, function of the generator, text and key) of Self-Forcing's rollout."""
    causal = Causal(frames_per_block=3)
    how = dict(times=TIMES, shift=SHIFT, score_shift=SHIFT, guidance=4.0, batched_guidance=False)
    method = DMD(sample_shape=size.latents, video=SelfForcing(causal=causal), **how)

    def roll_out(net, text, key):
        batch = {"cond": text, "uncond": text, "index": jnp.arange(1)}
        return method.rollout(net, {"generator": net}, batch, key).x0

    return method, roll_out


def rollout_is_timed(machine):
    net, text = student(machine.size)
    method, roll_out = rollouts(machine.size)
    program, keys = jax.jit(roll_out), jax.random.split(jax.random.key(1), FLAGS.rounds)
    taken = seconds(lambda n: jax.block_until_ready(program(net, text, keys[n])), statistics.mean)
    work = flops.count(roll_out, net, text, keys[0], trips=method.trips)
    machine.report("rollout", "ours", taken, work)


def stream_is_timed(machine):
    net, text = student(machine.size)
    sampler = few_step(TIMES, len(TIMES), 1, SHIFT, WINDOW)

    def begin():
        return Stream(net, text, sampler, size=machine.size.latents[1:])

    def first(_):
        jax.block_until_ready(next(begin()))

    stream, full = begin(), WINDOW.window // WINDOW.frames_per_block
    for _ in itertools.islice(stream, full + 2):  # from then on, every block sees the whole window
        pass
    block = seconds(lambda _: jax.block_until_ready(next(stream)))
    frames = VIDEO_FRAMES * WINDOW.frames_per_block
    latency, rate = f"{seconds(first):.3f} s", f"{frames / block:.1f} frames a second"
    shown = f"first block after {latency}, then {rate}" if machine.gpu else "runs"
    print(f"{'stream':<12}{'ours':<20}{shown}", flush=True)


def compile_for_a_card(machine):
    """Compiles the programs of real size for an H100; returns what does not fit it."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        print("compile: not done, for it needs pip install 'dmd_jax[cuda]'; no GPU")
        return []
    chip, devices = topologies.load("h100:1x1")
    mesh, wrong = sharding.make_mesh(devices=devices), []
    for name, program, args in real_programs(jax.NamedSharding(mesh, jax.P())):
        with jax.set_mesh(mesh):
            m = program.lower(*args).compile().memory_analysis()
        total = m.argument_size_in_bytes + m.temp_size_in_bytes
        total += m.output_size_in_bytes - m.alias_size_in_bytes
        room = f"{total / 2**30:.1f} GiB of {chip.memory / 2**30:.1f}, by the compiler"
        print(f"{name:<12}{'ours':<20}compiles for an H100; {room}", flush=True)
        wrong += [] if total <= chip.memory else [f"{name} does not fit: {room}"]
    return wrong


def real_programs(placed):
    """(name, jitted function, abstract arguments) of all that `REAL` times but the stream."""
    net, key = Denoiser(wan.abstract(REAL.config)), jax.eval_shape(lambda: jax.random.key(0))
    nets, x, text = jax.eval_shape(lambda: (wan.frozen(net_like(net)), *REAL.inputs()))
    state = jax.eval_shape(lambda: (net_like(net), wan.OPTIMIZER.init(net_like(net))))
    programs = wan.programs(REAL.latents)
    calls = {
        "forward": (programs["forward"], nets["generator"].net, x, text),
        "generator": (programs["generator"], state, nets, text),
        "critic": (programs["critic"], state, nets, text),
        "rollout": (jax.jit(rollouts(REAL)[1]), nets["generator"], text, key),
    }
    place = functools.partial(jax.ShapeDtypeStruct, sharding=placed)
    for name, (program, *args) in calls.items():
        yield name, program, jax.tree.map(lambda a: place(a.shape, a.dtype), args)


def net_like(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


PARTS = {
    "attention": attention_is_right,
    "step": step_is_right,
    "resume": resume_is_right,
    **{name: None for name in wan.PASSES},  # `updates` takes all of them together
    "rollout": rollout_is_timed,
    "stream": stream_is_timed,
    "compile": compile_for_a_card,
}


def find_machine():
    """The card of this machine; none in a dry run, or if there is none."""
    gpu = None
    if not FLAGS.dry_run:
        with contextlib.suppress(RuntimeError):
            gpu = jax.devices("cuda")[0]
    if gpu is None:
        jax.config.update("jax_platforms", "cpu")
        with contextlib.suppress(RuntimeError):  # devices are there already
            jax.config.update("jax_num_cpu_devices", 2)
        print("DRY RUN: there is no GPU. Toy sizes run on the CPU, and no time is measured.")
        return Machine(None, 1.0, TOY)
    names = {target.name: name for name, target in gpus.TARGETS.items()}
    if name := names.get(gpu.device_kind):
        peak, source = topologies.CHIPS[name].bfloat16, "NVIDIA's data sheet"
    else:
        peak, source = matmul_peak(jnp.bfloat16, (4096, 8192)), "measured"
    print(f"{gpu.device_kind}, peak in bfloat16 {peak / 1e12:.0f} TFLOP/s ({source})")
    return Machine(gpu, peak, REAL)


def main(_):
    if unknown := set(FLAGS.only) - set(PARTS):
        sys.exit(f"error: --only has no {sorted(unknown)}; there are {', '.join(PARTS)}")
    named = [name for name in wan.PASSES if name in FLAGS.only]
    wan.require_pytorch(named)
    machine, wrong = find_machine(), []
    for name, part in PARTS.items():
        if name in FLAGS.only and part is not None and (name != "compile" or not machine.gpu):
            wrong += part(machine) or []
    if named:
        wrong += updates(machine, named)
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    define_flags()
    app.run(main)
