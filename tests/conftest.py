"""Settings that all tests share: eight virtual devices, and a compiler in a hurry."""

import jax

# By configuration and not by XLA_FLAGS: programs that a test starts decide for themselves.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The tests' time is compilation. Partitioning and arithmetic stay as they are; code is less tuned.
jax.config.update("jax_disable_most_optimizations", True)
