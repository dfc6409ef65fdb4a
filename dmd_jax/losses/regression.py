"""How far a student's samples are from given ones: the distances of a regression.

A distance is a frozen dataclass, so that a config can name it and its numbers.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from dmd_jax.diffusion.schedule import Samples


class Distance:
    """(x0, target) -> float32 [B], with its gradient with respect to both."""

    def __call__(self, x0: Samples, target: Samples) -> Float32[Array, " B"]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SquaredError(Distance):
    """The mean over a sample's elements of (x0 - target)^2."""

    def __call__(self, x0: Samples, target: Samples) -> Float32[Array, " B"]:
        square = jnp.square(x0.astype(jnp.float32) - target.astype(jnp.float32))
        return jnp.mean(square, axis=tuple(range(1, square.ndim)))


@dataclasses.dataclass(frozen=True)
class PseudoHuber(Distance):
    """sqrt(e + c^2) - c of the squared error e (Charbonnier et al. 1997; iCT, Song et al. 2023).

    Far below c it is e / 2c, far above it the root mean square: samples that are far off weigh less
    than in the squared error. e is a mean over elements where iCT has a sum, so that c means the
    same for samples of any size.

    Attributes:
        c: above 0, in units of the data.

    Raises:
        ValueError: c is not above 0.
    """

    c: float = 0.03

    def __post_init__(self):
        if self.c <= 0.0:
            raise ValueError(f"c={self.c} must be above 0; SquaredError needs none")

    def __call__(self, x0: Samples, target: Samples) -> Float32[Array, " B"]:
        square = SquaredError()(x0, target)
        # Not sqrt(square + c^2) - c, which loses all digits where c is large.
        return square / (jnp.sqrt(square + self.c**2) + self.c)
