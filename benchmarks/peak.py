"""What this machine can do at best: the yardstick of the other benchmarks."""

import time

import jax
import jax.numpy as jnp


def matmul_peak():
    """Best float32 matmul rate seen, FLOP/s."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a = jnp.ones((n, n))
        dot = jax.jit(jnp.dot)
        dot(a, a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            dot(a, a).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
