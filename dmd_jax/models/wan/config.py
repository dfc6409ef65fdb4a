"""The sizes of a Wan transformer, and those of the published ones."""

import dataclasses

from dmd_jax.models.layers import check_compute, check_sizes

# Frames, height and width of the latents that are one token.
PATCH = (1, 2, 2)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """A Wan transformer in plain values. The presets are at the end of this file.

    Attributes:
        dim, ffn, heads, depth: width, hidden width of the feed-forward layers, attention heads,
            layers.
        in_channels, out_channels: of the latents; the input of an image-to-video network has more
            channels than its output (`Conditions.frames`).
        text_dim: width of the text embeddings.
        image_dim: width of the image features that cross attention reads too; 0 for none.
        freq_dim: sinusoids of the time embedding, an even number.
        reach: latent frames of the videos that the weights were trained on. In a longer video from
            a cache, positions stay within so many frames (see `kv_cache.Ring.positions`), or
            within window + sink if these are more.
        dtype: compute dtype of the layers, "float32" or "bfloat16"; norms, modulation, rotary
            embedding and softmax are float32 in both.
        remat: what the backward pass recomputes of a layer: "none" nothing, "full" everything,
            "offload" everything from an input that waits in the memory of the host; any other name
            is a policy of `jax.checkpoint_policies`.
        unroll: layers per iteration of the scan over layers.

    Raises:
        ValueError: a size is below 1, the heads do not divide the width into an even number of
            channels, the output has more channels than the input, or the dtype or the policy is
            unknown.
    """

    dim: int
    ffn: int
    heads: int
    depth: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    image_dim: int = 0
    freq_dim: int = 256
    reach: int = 21
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        check_sizes(self, "dim", "ffn", "heads", "depth", "in_channels", "out_channels", "text_dim")
        check_sizes(self, "freq_dim", "reach", "unroll")
        if self.image_dim < 0 or self.freq_dim % 2:
            raise ValueError(
                f"image_dim={self.image_dim} must be 0 or more, freq_dim={self.freq_dim} even"
            )
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"heads={self.heads} must divide dim={self.dim} into an even number of channels"
            )
        if self.out_channels > self.in_channels:
            raise ValueError(
                f"out_channels={self.out_channels} is more than in_channels={self.in_channels}"
            )
        check_compute(self.dtype, self.remat)

    @property
    def head_dim(self):
        """Channels of one head."""
        return self.dim // self.heads

    @property
    def rope_dims(self):
        """Channels of a head that are rotated by time, height and width."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


T2V_1_3B = WanConfig(dim=1536, ffn=8960, heads=12, depth=30)
T2V_14B = WanConfig(dim=5120, ffn=13824, heads=40, depth=40)
I2V_14B = dataclasses.replace(T2V_14B, in_channels=36, image_dim=1280)
# Wan 2.2. The A14B networks come in pairs of one configuration, for high and for low noise.
TI2V_5B = WanConfig(dim=3072, ffn=14336, heads=24, depth=30, in_channels=48, out_channels=48)
T2V_A14B = T2V_14B
I2V_A14B = dataclasses.replace(T2V_14B, in_channels=36)
TINY = WanConfig(dim=96, ffn=256, heads=4, depth=4, text_dim=64)
