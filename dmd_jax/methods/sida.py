"""SiDA: SiD with the adversarial term of DMD2."""

import dataclasses

from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.methods.sid import SiD


@dataclasses.dataclass(frozen=True)
class SiDA(DMD2, SiD):
    """Adversarial score identity distillation (Zhou et al. 2024, arXiv 2410.14919).

    The generator's loss is that of `SiD` and `gan_weight` times that of `DMD2`'s discriminator: in
    `DMD2.compare`, `matching` is SiD's. docs/methods.md says how the published discriminator
    differs.
    """
