"""The sizes of a Wan autoencoder, and those of the published ones."""

import dataclasses

from dmd_jax.models.layers import check_compute


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """A Wan autoencoder in plain values. The presets are at the end of this file.

    Attributes:
        encoder_dim, decoder_dim: width at full resolution.
        mean, std: of each latent channel; normalised latents are (latents - mean) / std.
        multipliers: of the width, for every stage from full resolution down.
        blocks: residual blocks of a stage of the encoder; a stage of the decoder has one more.
        temporal: which of the halvings between the stages halve the number of frames too.
        patch: side of the squares of pixels that become channels of the encoder's input.
        residual: shortcuts around whole stages, as in Wan 2.2.
        dtype: compute dtype of the layers, "float32" or "bfloat16"; norms, softmax and the
            normalisation of the latents are float32 in both.

    Raises:
        ValueError: lengths do not fit together, a number is out of range, widths do not divide as
            the shortcuts need, or the dtype is unknown.
    """

    encoder_dim: int
    decoder_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    residual: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.multipliers) != len(self.temporal) + 1:
            raise ValueError(
                f"multipliers={self.multipliers} are for stages and temporal={self.temporal} for "
                "the halvings between them: give temporal one fewer"
            )
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(
                f"mean and std must have a value for each latent channel, and std positive ones: "
                f"there are {len(self.mean)} and {len(self.std)}"
            )
        sizes = (self.encoder_dim, self.decoder_dim, self.blocks, self.patch, *self.multipliers)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be 1 or more: {self}")
        if not self.residual and any(width % 2 for width in self.decoder_widths[1:-1]):
            raise ValueError(
                f"decoder_dim={self.decoder_dim} and multipliers={self.multipliers}: the decoder "
                "halves these widths, which are not all even"
            )
        check_compute(self.dtype, "none")

    @property
    def channels(self):
        """Channels of the latents."""
        return len(self.mean)

    @property
    def time_factor(self):
        """Frames per latent frame; the first latent frame of a video is one frame."""
        return 2 ** sum(self.temporal)

    @property
    def space_factor(self):
        """Pixels per latent pixel, in height and in width."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def encoder_widths(self):
        """Channels before the first stage and after every stage."""
        return tuple(self.encoder_dim * m for m in (1, *self.multipliers))

    @property
    def decoder_widths(self):
        """Channels before the first stage and after every stage."""
        return tuple(self.decoder_dim * m for m in (self.multipliers[-1], *self.multipliers[::-1]))


# Mean and standard deviation of the published networks' latents, for each channel.
# fmt: off
_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

WAN_2_1 = WanVAEConfig(encoder_dim=96, decoder_dim=96, mean=_MEAN_2_1, std=_STD_2_1)
WAN_2_2 = WanVAEConfig(
    encoder_dim=160, decoder_dim=256, patch=2, residual=True, mean=_MEAN_2_2, std=_STD_2_2
)
TINY = dataclasses.replace(WAN_2_1, encoder_dim=8, decoder_dim=8, blocks=1)
TINY_2_2 = dataclasses.replace(WAN_2_2, encoder_dim=8, decoder_dim=8, blocks=1)
