"""Self-Forcing's gradient: its exit calls one block after the other, or all blocks in one call.

    python benchmarks/replay.py
    python benchmarks/replay.py --config=configs/self_forcing.py:wan_t2v_1_3b --topology=v5p:4x4x4 \
        --config.mesh.fsdp=16 --config.mesh.context=4 --config.batch_size=16

What is measured is the replay alone: given the inputs of the exit calls, the finished cache and the
gradient of x0, the gradient of the weights. Three ways compute it:

    one by one   the library's: a loop over the blocks
    stacked      one call, to which the blocks are further videos of the batch (jax.vmap)
    packed       one call of one sequence, under a mask: each block attends to the cached frames
                 before it and to itself

First the script compares the gradients of the three for small networks, and stops where they differ
by more than float32 rounding. Then it takes the student and the batch of the config, with random
weights and values: videos as long as those that the config compares, and as long as they get.

Without --topology the three are timed on this machine, in turn: medians, with the lowest and the
highest. "CPU ms" are those of all threads together; beside other work they say more than time.

With it they are compiled for devices that are not here, as `python -m dmd_jax.plan` does. FLOPs are
counted from the program for one CPU device; temporaries, bytes and what is refused are the
compiler's; seconds are those of the plan's roofline. Where tokens are split over `context`, jax
refuses to stack: its all_to_all among groups of devices has no vmap.

Attention is the library's kernel for the platform, the same for all three; none stores the scores.
On a CPU its tiles have up to 768 tokens, within which a mask saves nothing. A packed sequence
cannot turn a sink beyond `reach` as its blocks do, each differently: sinks are refused.
"""

import dataclasses
import sys
import time
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from einops import rearrange
from flax import nnx
from ml_collections import config_flags

from dmd_jax.devices import sharding
from dmd_jax.devices.cores import split_cores
from dmd_jax.devices.disk import first_line
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import BlockCausal, Causal, TeacherForcing, attention, dispatch
from dmd_jax.models.kv_cache import KVCache
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.models.wan.network import Grid
from dmd_jax.models.wan.rope import rotate, rotations
from dmd_jax.rollouts import self_forcing
from dmd_jax.rollouts.block_maker import predict
from dmd_jax.rollouts.blocks import Layout
from dmd_jax.training import flops, plan, topologies
from dmd_jax.training.configuration import compute_dtypes
from dmd_jax.training.cost import batch_shape, si
from dmd_jax.training.hlo import Program
from dmd_jax.training.run import build

FLAGS = flags.FLAGS
SMALL = WanConfig(
    dim=16, ffn=24, heads=2, depth=2, in_channels=3, out_channels=3, text_dim=5, freq_dim=8, reach=6
)
BOUND = 1e-5  # of the largest value of each weight's gradient


class Given(NamedTuple):
    """A finished rollout whose blocks all pass gradient."""

    inputs: jax.Array  # float32 [B, F, H, W, C], of the exit calls
    times: jax.Array  # float32 [blocks], of the exit calls
    gradient: jax.Array  # [B, F, H, W, C], of x0
    cond: jax.Array  # [B, L, text_dim]
    cache: KVCache


def given(generator, cond, size, causal, key):
    """A `Given` of random values: videos of `size`, (F, H, W, C)."""
    keys = iter(jax.random.split(key, 5))
    shape, frames = (cond.shape[0], *size), size[0]

    def normal(x):
        return jax.random.normal(next(keys), x.shape, x.dtype)

    videos = jax.ShapeDtypeStruct(shape, jnp.float32)
    cache = self_forcing.empty_cache(generator, videos, causal, frames, frames)
    slots = jnp.arange(cache.slots)
    written = jnp.where(slots < frames, slots, kv_cache.EMPTY)
    cache = KVCache(normal(cache.keys), normal(cache.values), written)
    times = jax.random.uniform(next(keys), (frames // causal.frames_per_block,))
    return Given(normal(videos), times, normal(videos), cond, cache)


def one_by_one(causal, generator, given):
    layout = Layout.of("videos", given.inputs, causal, lone_first=True)
    starts = layout.starts(0, 0)
    calls = self_forcing._Calls(given.inputs, given.times, starts, 0, given.cond, given.cache)
    nothing = jax.tree.map(lambda _: None, generator)
    saved = generator, nothing, calls
    return self_forcing._replay((causal, layout, layout.frames), saved, given.gradient)[0]


def stacked(causal, generator, given):
    size = causal.frames_per_block
    starts = jnp.arange(0, given.inputs.shape[1], size)

    def blocks(x):
        return rearrange(x, "b (blocks n) ... -> blocks b n ...", n=size)

    def x0(generator):
        def call(x, t, start):
            return predict(generator, x, t, given.cond, causal, given.cache, start).x0

        return jax.vmap(call)(blocks(given.inputs), given.times, starts)

    return jax.vjp(x0, generator)[1](blocks(given.gradient))[0]


def packed(causal, generator, given):
    t = jnp.repeat(given.times, causal.frames_per_block)
    t = jnp.broadcast_to(t, given.inputs.shape[:2])

    def x0(generator):
        net = partial(packed_wan, generator.net, causal, given.cache)
        return dataclasses.replace(generator, net=net)(given.inputs, t, given.cond)

    return jax.vjp(x0, generator)[1](given.gradient)[0]


WAYS = {"one by one": one_by_one, "stacked": stacked, "packed": packed}


class NoisyHalf(TeacherForcing):
    """Teacher forcing for the queries of the noisy half alone; keys are [clean | noisy] still."""

    def group(self, q_index):
        return super().group(q_index + self.half)


def packed_wan(net, causal, cache, x, timestep, text):
    """A Wan over all blocks of a video: each sees the cache before it, and itself."""
    grid = Grid(x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    mask = NoisyHalf(BlockCausal(causal, grid.frame), grid.frames * grid.frame)
    # Only differences of positions matter: where nothing but a window moves, frames count from 0.
    times = np.arange(grid.frames)
    rotation = rotations(net.config.rope_dims, times, grid.height, grid.width, grid.frames)
    rotation = [rearrange(x, "f t ... -> (f t) ...") for x in rotation]

    def attend(layer, x, cached):
        query, own = rotate(layer.queries(x), *rotation), (layer.keys(x), layer.values(x))
        own_key, own_value = map(sharding.tokens_to_heads, own)
        key, value = (rearrange(x[:, : grid.frames], "b f t ... -> b (f t) ...") for x in cached)
        key = jnp.concatenate([rotate(key, *rotation), rotate(own_key, *rotation)], axis=1)
        value = jnp.concatenate([value, own_value], axis=1)
        # `attention` wants as many queries as keys with a mask; its kernels do not.
        with mock.patch.object(dispatch, "_check"):
            return attention(query, key, value, mask=mask), None

    embedding, conditions = net._time(timestep), net._conditions(text, None)
    tokens, _ = net._layers(net._tokens(x, None), embedding, conditions, attend, cache[:2])
    return net._head(tokens, embedding, grid)


def check():
    """Compares the gradients for small networks; ends the program where they differ."""
    keys = jax.random.split(jax.random.key(0), 3)
    net = Denoiser(Wan(SMALL, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(net)
    drawn = zip(leaves, jax.random.split(keys[0], len(leaves)), strict=True)
    net = jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in drawn])
    cond = jax.random.normal(keys[1], (2, 4, SMALL.text_dim))
    for causal in (Causal(2), Causal(2, window=4)):
        example = given(net, cond, (10, 4, 4, SMALL.out_channels), causal, keys[2])
        wanted, *others = (jax.jit(partial(way, causal))(net, example) for way in WAYS.values())
        for name, found in zip([*WAYS][1:], others, strict=True):
            error = np.max(jax.tree.leaves(jax.tree.map(_difference, found, wanted)))
            print(f"small network, {causal.window=}, {name} from one by one: {error:.1e}")
            if not error < BOUND:
                sys.exit(f"error: the gradients differ by {error:.1e}, not below {BOUND:.0e}")


def _difference(a, b):
    """The largest difference, relative to the largest value; NaN where a value is."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def measure(run, chip):
    """Prints what each way needs, for each length of video."""
    shape, causal = run.source.sample_shape, run.method.video.causal
    if causal.sink or causal.first_alone:
        sys.exit(f"error: {causal} has a sink, or a block of one frame: packed does not know them")
    for frames in sorted({getattr(run.method.video, "compared", None) or shape[0], shape[0]}):
        kind = run.mesh.devices.flat[0].device_kind
        print(f"\n{run.config.batch_size} videos of {frames} frames, all graded")
        print(f"{run.mesh.size} x {kind}, mesh {dict(run.mesh.shape)}", flush=True)
        args = shapes(run, (frames, *shape[1:]))
        work = {name: count(partial(way, causal), args) for name, way in WAYS.items()}
        with jax.set_mesh(run.mesh):
            if chip is None:
                timed(causal, args, work)
            else:
                planned(causal, args, work, chip, run)


def count(function, args):
    """FLOPs, as a plan counts them: those of the program for one CPU device."""
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices("cpu")[:1])):
        return flops.count(function, *whole)


def shapes(run, size):
    """(generator, `Given`) in shapes, split as in a train step."""
    generator, cond = run.state_shape().nets["generator"], batch_shape(run)["cond"]
    make = partial(given, size=size, causal=run.method.video.causal, key=jax.random.key(0))
    batch, whole = jax.P(sharding.BATCH), jax.P()
    cached = sharding.heads_spec(6, axis=1)
    specs = Given(batch, whole, batch, batch, KVCache(cached, cached, whole))

    def placed(x, spec):
        spec = sharding.fit((*spec, *(None,) * (x.ndim - len(spec))), x.shape, run.mesh)
        place = jax.NamedSharding(run.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return generator, jax.tree.map(placed, jax.eval_shape(make, generator, cond), specs)


def compiled(way, causal, args):
    """The program of a way, whose gradient is split as the weights are."""
    places = jax.tree.map(lambda x: x.sharding, args[0])
    return jax.jit(partial(way, causal), out_shardings=places).lower(*args).compile()


def timed(causal, args, work):
    """Runs the programs in turn, on random weights and values."""
    generator, example = args

    def draw():
        leaves, tree = jax.tree.flatten(generator)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        net = jax.tree.unflatten(tree, drawn)
        cond = jnp.zeros(example.cond.shape, example.cond.dtype)
        return net, given(net, cond, example.inputs.shape[1:], causal, keys[0])

    values = jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, args))()
    programs = {name: compiled(way, causal, args) for name, way in WAYS.items()}
    taken = {name: [] for name in programs}
    for number in range(FLAGS.rounds + 1):  # the first round is not counted
        for name, program in programs.items():
            start = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(program(*values))
            if number:
                taken[name].append([time.perf_counter(), time.process_time()] - start)
    columns = "FLOP", "ms", "lowest", "highest", "CPU ms", "lowest", "highest", "MiB"
    print(f"{'':<12}" + "".join(f"{column:>10}" for column in columns))
    for name, pairs in taken.items():
        numbers = [1e3 * f(x) for x in np.transpose(pairs) for f in (np.median, np.min, np.max)]
        numbers.append(programs[name].memory_analysis().temp_size_in_bytes / 2**20)
        print(f"{name:<12}{si(work[name]):>10}" + "".join(f"{x:10.1f}" for x in numbers))


def planned(causal, args, work, chip, run):
    """Prints what the programs need, by their compiler."""
    for name, way in WAYS.items():
        try:
            program = compiled(way, causal, args)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            print(f"{name}: the compiler refuses it: {first_line(error, limit=300)}", flush=True)
            continue
        size = program.memory_analysis().temp_size_in_bytes / plan.GIB
        traffic = Program(program.as_text(), islands=plan.islands(run.mesh)).traffic()
        seconds = plan.roofline(work[name] / run.mesh.size, traffic, chip, run)
        sent = ", ".join(f"{kind} {si(n)}B" for kind, n in sorted(traffic.sent.items()))
        print(f"{name}: {si(work[name])}FLOP, all devices; a device: temporaries {size:.2f} GiB,")
        print(f"    memory {si(traffic.memory)}B, sent {si(sum(traffic.sent.values()))}B ({sent});")
        print("    seconds " + ", ".join(f"{k} {s:.3f}" for k, s in seconds.items()), flush=True)


def define_flags():
    config_flags.DEFINE_config_file("config", "configs/self_forcing.py")
    flags.DEFINE_string("topology", "", f"Devices to compile for: {topologies.KNOWN}.")
    flags.DEFINE_integer("rounds", 10, "Calls of each that are timed.")


def main(_):
    config = FLAGS.config
    use_float32_products(*compute_dtypes(config))
    if FLAGS.topology:
        jax.config.update("jax_platforms", "cpu")
        chip, devices = topologies.load(FLAGS.topology)
    else:
        split_cores(config.batch_size)
        chip, devices = None, None
    check()
    measure(build(config, devices, files=False), chip)


if __name__ == "__main__":
    define_flags()
    app.run(main)
