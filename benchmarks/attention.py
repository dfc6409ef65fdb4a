"""Attention on this machine's CPU: against PyTorch's, and under a mask against itself without.

    pip install torch        (a CPU build will do)
    python benchmarks/attention.py

Float32, batch 1, 6 heads of 64, in turn in one process, medians over the rounds: the forward pass,
and the forward and backward pass together. Masks are those of a video of frames of 256 tokens. The
last table is of memory, as the compiler reports it, and the size of the scores alone.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dmd_jax.models.attention import BlockCausal, Causal, TeacherForcing, attention

FLAGS = flags.FLAGS
HEADS, WIDTH, FRAME = 6, 64, 256
REST = 0.3  # seconds before a call: PyTorch's threads go on waiting after theirs, on all cores


def define_flags():
    flags.DEFINE_list("lengths", [768, 3072], "Tokens.")
    flags.DEFINE_integer("memory", 8192, "Tokens of the table of memory.")
    flags.DEFINE_integer("rounds", 15, "Rounds over all programs of a length.")
    flags.DEFINE_integer("threads", 2, "PyTorch's threads.")


def masks(length):
    """{name: mask}: blocks of frames in order, the same with a window, and teacher forcing."""
    return {
        "no mask": None,
        "block-causal": BlockCausal(Causal(1), FRAME),
        "window of 2 frames": BlockCausal(Causal(1, window=2), FRAME),
        "[clean | noisy]": TeacherForcing(BlockCausal(Causal(1), FRAME), length // 2),
    }


def programs(mask, visible=None):
    """{pass: compiled function of (q, k, v, gradient)} of this library."""
    attend = functools.partial(attention, mask=mask, visible=visible)

    def both(q, k, v, gradient):
        out, back = jax.vjp(attend, q, k, v)
        return out, back(gradient)

    forward = jax.jit(lambda q, k, v, gradient: attend(q, k, v))
    return {"forward": forward, "forward, backward": jax.jit(both)}


def theirs(arrays):
    """{pass: callable} of PyTorch, whose sequences follow the heads."""
    import torch

    torch.set_num_threads(FLAGS.threads)
    q, k, v, gradient = (torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arrays)
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            attend(q, k, v)

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*leaves).backward(gradient)

    return {"forward": forward, "forward, backward": both}


def medians(calls):
    """{name: median seconds} of callables that are timed in turn; the first round compiles."""
    times = {name: [] for name in calls}
    for round_ in range(FLAGS.rounds + 1):
        for name, call in calls.items():
            time.sleep(REST)
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(length):
    """Prints milliseconds, and what they are of those without a mask."""
    rng = np.random.default_rng(0)
    shape = (1, length, HEADS, WIDTH)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)]
    calls = {("PyTorch, no mask", part): call for part, call in theirs(arrays).items()}
    for name, mask in masks(length).items():
        for part, program in programs(mask).items():
            calls[name, part] = lambda run=program: jax.block_until_ready(run(*arrays))
    taken = medians(calls)
    print(f"\n{length} tokens")
    for (name, part), seconds in sorted(taken.items(), key=lambda row: row[0][1]):
        ratio = seconds / taken["no mask", part]
        print(f"{name:<20}{part:<20}{1e3 * seconds:9.1f} ms{ratio:7.2f} of no mask")


def memory(length):
    """Prints MiB of temporaries."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)
    print(f"\n{length} tokens; scores of all heads would be {4 * HEADS * length**2 >> 20} MiB")
    for name, mask in masks(length).items():
        for part, program in programs(mask).items():
            size = program.lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes
            print(f"{name:<20}{part:<20}{size / 2**20:9.1f} MiB")


def main(_):
    for length in map(int, FLAGS.lengths):
        measure(length)
    memory(FLAGS.memory)


if __name__ == "__main__":
    define_flags()
    app.run(main)
