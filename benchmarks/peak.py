"""What this machine can do at best: the yardstick of the other benchmarks."""

import time

import jax
import jax.numpy as jnp

from dmd_jax.devices import sharding


def matmul_peak(dtype=jnp.float32, sizes=(1024, 2048, 3072)):
    """Best measured matmul rate, FLOP/s: of all devices of the current mesh, or of one."""
    best, parts = 0.0, sharding.even_batch(1)

    def ones(n):
        return sharding.shard_batch(jnp.ones((parts, n, n), dtype))

    for n in sizes:
        a = jax.jit(ones, static_argnums=0)(n)
        dot = jax.jit(jnp.matmul)
        dot(a, a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            dot(a, a).block_until_ready()
            best = max(best, 2 * parts * n**3 / (time.perf_counter() - start))
    return best
