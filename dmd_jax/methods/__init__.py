"""One file for each method: its losses, the times at which it takes them, and its rollout.

docs/methods.md lists what a method has to define. Imports jax, jaxtyping and the rooms rollouts/,
models/, losses/, diffusion/ and devices/.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from jaxtyping import Array, ArrayLike, Float32, Int, Key, Shaped

# The arguments and results of every method.
Nets: TypeAlias = Mapping[str, Any]  # Denoisers by role, or other callables (x_t, t, cond) -> x0
Batch: TypeAlias = Mapping[str, Any]  # "cond", "uncond", "index" and, if the method uses it, "data"
Observed: TypeAlias = dict[str, Shaped[Array, "B ..."]]  # per-sample values, for `method.metrics`
Scalar: TypeAlias = Float32[Array, ""]
Metrics: TypeAlias = dict[str, Scalar]
OneKey: TypeAlias = Key[Array, ""]
Index: TypeAlias = Int[ArrayLike, " B"]  # positions of samples in the global batch
