"""The video autoencoders of Wan 2.1 and 2.2 (Wan Team 2025, arXiv 2503.20314, section 4.1).

Causal in time: the first frame is an image of its own, and each later step of the encoder takes
`time_factor` frames to one latent frame, the decoder's one latent frame to as many. What a
convolution must remember of the frames before goes in and out of every step as its cache, so memory
does not grow with the length of a video, and a video can be shown while it is being decoded.

Every layer here is called as (x [B, T, H, W, C], cache) -> (x, cache); the cache None says that x
is the first frame of a video. Imports jax, flax and the attention and layers beside it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx

from dmd_jax.models.attention import attention
from dmd_jax.models.layers import check_compute, linear

# Beside a Wan transformer this network is small: every device holds the whole of it.
SHARDING_RULES = ((r"(kernel|bias|scale)$", jax.P()),)


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """A Wan autoencoder in plain values. The presets are at the end of this file.

    Attributes:
        encoder_dim, decoder_dim: width at full resolution.
        multipliers: of the width, for every stage from full resolution down.
        blocks: residual blocks of an encoder's stage; a decoder's has one more.
        temporal: which of the halvings between the stages halve the number of frames too.
        mean, std: of each latent channel, which normalised latents are free of.
        patch: side of the squares of pixels that become channels before all else.
        residual: shortcuts around whole stages, as Wan 2.2 has them.
        dtype: what the layers compute in, "float32" or "bfloat16"; norms, softmax and the
            normalisation of the latents are float32 in both.

    Raises:
        ValueError: lengths do not fit together, a number is out of range, widths do not divide as
            the shortcuts need it, or the dtype is unknown.
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
                f"multipliers={self.multipliers} are of stages and temporal={self.temporal} of the "
                "halvings between them: there must be one fewer of these"
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
        """Of the latents."""
        return len(self.mean)

    @property
    def time_factor(self):
        """Frames that a latent frame stands for, but for the first of a video."""
        return 2 ** sum(self.temporal)

    @property
    def space_factor(self):
        """Pixels that the side of a latent pixel stands for."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def encoder_widths(self):
        """Where the first stage starts, and where every stage ends."""
        return tuple(self.encoder_dim * m for m in (1, *self.multipliers))

    @property
    def decoder_widths(self):
        """Where the first stage starts, and where every stage ends."""
        return tuple(self.decoder_dim * m for m in (self.multipliers[-1], *self.multipliers[::-1]))


class RMSNorm(nnx.Module):
    """Over the channels, in float32; the result is float32."""

    def __init__(self, dim):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        # The floor of 1e-12 under the Euclidean norm of a pixel.
        square = jnp.maximum(jnp.mean(x * x, axis=-1, keepdims=True), 1e-24 / x.shape[-1])
        return x * jax.lax.rsqrt(square) * self.scale[...]


class CausalConv(nnx.Conv):
    """A convolution over time, height and width that sees no later frame.

    Its cache is the last frames of its input, as many as the next step still sees; before a video
    there are zeros.
    """

    def __init__(self, inputs, outputs, kernel=(3, 3, 3), *, stride=1, dtype, rngs):
        self.past = kernel[0] - stride
        space = tuple((size // 2, size // 2) for size in kernel[1:])
        super().__init__(
            inputs,
            outputs,
            kernel,
            strides=(stride, 1, 1),
            padding=((0, 0), *space),
            dtype=dtype,
            rngs=rngs,
        )

    def zeros(self, x):
        """The cache before the first frame, of which x has the size."""
        return jnp.zeros_like(x, shape=(x.shape[0], self.past, *x.shape[2:]))

    def __call__(self, x, cache):
        cache = self.zeros(x) if cache is None else cache
        x = jnp.concatenate([cache, x], axis=1)
        return super().__call__(x), x[:, -self.past :]


def _activate(norm, x):
    """silu(norm(x)) in the dtype of x."""
    return jax.nn.silu(norm(x)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + convolutions of x, twice normalised and activated."""

    def __init__(self, inputs, outputs, *, dtype, rngs):
        self.norm1 = RMSNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        same = inputs == outputs
        self.shortcut = None if same else linear(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        first, second = cache or (None, None)
        h, first = self.conv1(_activate(self.norm1, x), first)
        h, second = self.conv2(_activate(self.norm2, h), second)
        return h + (x if self.shortcut is None else self.shortcut(x)), (first, second)


class FrameAttention(nnx.Module):
    """x + attention of one head among the pixels of each frame."""

    def __init__(self, dim, *, dtype, rngs):
        self.norm = RMSNorm(dim)
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        batch, _, height, _, _ = x.shape
        qkv = self.qkv(self.norm(x).astype(x.dtype))
        q, k, v = rearrange(qkv, "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        attended = rearrange(attention(q, k, v), "(b t) (h w) 1 c -> b t h w c", b=batch, h=height)
        return x + self.out(attended), None


class Down(nnx.Module):
    """Half the height and width and, where temporal, half the frames after the first."""

    def __init__(self, dim, temporal, *, dtype, rngs):
        self.conv = nnx.Conv(
            dim, dim, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
        )
        self.time = (
            CausalConv(dim, dim, (3, 1, 1), stride=2, dtype=dtype, rngs=rngs) if temporal else None
        )

    def __call__(self, x, cache):
        x = self.conv(x)
        if self.time is None:
            return x, None
        return (x, x) if cache is None else self.time(x, cache)


class Up(nnx.Module):
    """Twice the height and width and, where temporal, twice the frames after the first."""

    def __init__(self, inputs, outputs, temporal, *, dtype, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), dtype=dtype, rngs=rngs)
        self.time = (
            CausalConv(inputs, 2 * inputs, (3, 1, 1), dtype=dtype, rngs=rngs) if temporal else None
        )

    def __call__(self, x, cache):
        if self.time is not None and cache is None:
            cache = self.time.zeros(x)  # the first frame is passed by and not remembered
        elif self.time is not None:
            x, cache = self.time(x, cache)
            x = rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)
        return self.conv(repeat(x, "b t h w c -> b t (h p) (w q) c", p=2, q=2)), cache


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """Changes resolution and width without weights.

    Attributes:
        inputs, outputs: channels.
        time, space: how many frames, and pixels of a side, come together or apart.

    Raises:
        ValueError: the channels do not divide.
    """

    inputs: int
    outputs: int
    time: int
    space: int

    def __post_init__(self):
        if self.many % self.few:
            raise ValueError(
                f"a shortcut from {self.inputs} to {self.outputs} channels must share {self.many} "
                f"values among {self.few}: change the dims or the multipliers"
            )

    @property
    def factor(self):
        return self.time * self.space**2


class AverageDown(Shortcut):
    """Every output channel is the mean of a group of the values that come together."""

    @property
    def many(self):
        return self.inputs * self.factor

    @property
    def few(self):
        return self.outputs

    def __call__(self, x, first):
        if first:
            x = jnp.pad(x, ((0, 0), (self.time - 1, 0), (0, 0), (0, 0), (0, 0)))
        together = rearrange(
            x,
            "b (t p) (h q) (w r) c -> b t h w (c p q r)",
            p=self.time,
            q=self.space,
            r=self.space,
        )
        return reduce(together, "b t h w (c group) -> b t h w c", "mean", c=self.outputs)


class DuplicateUp(Shortcut):
    """Every input channel is copied to a group of the values that come apart."""

    @property
    def many(self):
        return self.outputs * self.factor

    @property
    def few(self):
        return self.inputs

    def __call__(self, x, first):
        apart = rearrange(
            jnp.repeat(x, self.many // self.few, axis=-1),
            "b t h w (c p q r) -> b (t p) (h q) (w r) c",
            p=self.time,
            q=self.space,
            r=self.space,
        )
        return apart[:, self.time - 1 :] if first else apart


def _chain(layers, x, caches):
    """Layers one after another: (x, the cache of each)."""
    kept = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, cache)
        kept.append(cache)
    return x, tuple(kept)


class Stage(nnx.Module):
    """Residual blocks of one resolution and what leads to the next."""

    def __init__(self, layers, shortcut):
        self.layers = nnx.List(layers)
        self.shortcut = shortcut

    def __call__(self, x, caches):
        out, kept = _chain(self.layers, x, caches)
        return out if self.shortcut is None else out + self.shortcut(x, caches is None), kept


class Head(nnx.Module):
    """The last norm, activation and convolution."""

    def __init__(self, inputs, outputs, *, dtype, rngs):
        self.norm = RMSNorm(inputs)
        self.conv = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        return self.conv(_activate(self.norm, x), cache)


def _residual_blocks(count, inputs, outputs, **kw):
    return [ResidualBlock(inputs if i == 0 else outputs, outputs, **kw) for i in range(count)]


def _middle(dim, **kw):
    return nnx.List(
        [ResidualBlock(dim, dim, **kw), FrameAttention(dim, **kw), ResidualBlock(dim, dim, **kw)]
    )


class Encoder(nnx.Module):
    """Pixels as channels [B, T, H, W, 3 patch^2] -> [B, T', h, w, 2 channels]."""

    def __init__(self, config, *, rngs):
        c, kw = config, dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        widths = c.encoder_widths
        self.conv = CausalConv(3 * c.patch**2, widths[0], **kw)
        stages, halvings = [], (*c.temporal, None)
        for inputs, outputs, temporal in zip(widths[:-1], widths[1:], halvings, strict=True):
            layers, last = _residual_blocks(c.blocks, inputs, outputs, **kw), temporal is None
            if not last:
                layers.append(Down(outputs, temporal, **kw))
            shortcut = None
            if c.residual:
                shortcut = AverageDown(inputs, outputs, 1 + bool(temporal), 1 if last else 2)
            stages.append(Stage(layers, shortcut))
        self.stages = nnx.List(stages)
        self.middle = _middle(widths[-1], **kw)
        self.head = Head(widths[-1], 2 * c.channels, **kw)

    def __call__(self, x, caches):
        return _chain([self.conv, *self.stages, *self.middle, self.head], x, caches)


class Decoder(nnx.Module):
    """Latents [B, 1, h, w, channels] -> pixels as channels [B, T, H, W, 3 patch^2]."""

    def __init__(self, config, *, rngs):
        c, kw = config, dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        widths = c.decoder_widths
        self.conv = CausalConv(c.channels, widths[0], **kw)
        self.middle = _middle(widths[0], **kw)
        stages, inputs, doublings = [], widths[0], (*c.temporal[::-1], None)
        for outputs, temporal in zip(widths[1:], doublings, strict=True):
            layers = _residual_blocks(c.blocks + 1, inputs, outputs, **kw)
            after = outputs if c.residual else outputs // 2
            shortcut = None
            if temporal is not None:
                layers.append(Up(outputs, after, temporal, **kw))
                if c.residual:
                    shortcut = DuplicateUp(inputs, outputs, 1 + temporal, 2)
            stages.append(Stage(layers, shortcut))
            inputs = after
        self.stages = nnx.List(stages)
        self.head = Head(widths[-1], 3 * c.patch**2, **kw)

    def __call__(self, x, caches):
        return _chain([self.conv, *self.middle, *self.stages, self.head], x, caches)


class WanVAE(nnx.Module):
    """The autoencoder of a `WanVAEConfig`. Latents are normalised ones wherever they appear."""

    def __init__(self, config, *, rngs):
        self.config = config
        kw = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = linear(2 * config.channels, 2 * config.channels, **kw)
        self.post_quant = linear(config.channels, config.channels, **kw)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video):
        """The normalised mean of the posterior, (mu - mean) / std.

        Args:
            video: [B, T, H, W, 3] in [-1, 1]; T = time_factor k + 1, H and W multiples of
                space_factor.

        Returns:
            float32 [B, k + 1, H / space_factor, W / space_factor, channels].

        Raises:
            ValueError: the shape is another.
        """
        c = self.config
        self._check_video(video.shape)
        first, caches = self._encode_step(video[:, :1], None)
        if video.shape[1] == 1:
            return first

        def body(caches, start):
            chunk = jax.lax.dynamic_slice_in_dim(video, start, c.time_factor, axis=1)
            latents, caches = self._encode_step(chunk, caches)
            return caches, latents[:, 0]

        starts = jnp.arange(1, video.shape[1], c.time_factor)
        _, later = jax.lax.scan(body, caches, starts)
        return jnp.concatenate([first, jnp.moveaxis(later, 0, 1)], axis=1)

    def _encode_step(self, video, caches):
        c = self.config
        x = rearrange(video, "b t (h q) (w r) c -> b t h w (c r q)", q=c.patch, r=c.patch).astype(
            c.dtype
        )
        x, caches = self.encoder(x, caches)
        mu = self.quant(x)[..., : c.channels].astype(jnp.float32)
        return (mu - jnp.array(c.mean)) / jnp.array(c.std), caches

    def decode(self, latents):
        """The video of normalised latents.

        Args:
            latents: [B, F, h, w, channels].

        Returns:
            float32 [B, time_factor (F - 1) + 1, space_factor h, space_factor w, 3] in [-1, 1].

        Raises:
            ValueError: the shape is another.
        """
        c = self.config
        self._check_latents(latents.shape)
        first, caches = self.decode_frame(latents[:, :1])
        if latents.shape[1] == 1:
            return first
        length = c.time_factor * (latents.shape[1] - 1) + 1
        video = jnp.zeros((first.shape[0], length, *first.shape[2:])).at[:, :1].set(first)

        def body(carry, index):
            caches, video = carry
            latent = jax.lax.dynamic_slice_in_dim(latents, index, 1, axis=1)
            frames, caches = self.decode_frame(latent, caches)
            # Into its place: stacked frames would have to be moved there, in memory twice.
            start = c.time_factor * (index - 1) + 1
            return (caches, jax.lax.dynamic_update_slice_in_dim(video, frames, start, 1)), None

        indices = jnp.arange(1, latents.shape[1])
        (_, video), _ = jax.lax.scan(body, (caches, video), indices)
        return video

    def decode_frame(self, latent, caches=None):
        """One step of decoding: for whoever makes latents and shows video in turns.

        Args:
            latent: [B, 1, h, w, channels], normalised.
            caches: what the step before it returned; None at the start of a video.

        Returns:
            (float32 [B, 1 at the start of a video and else time_factor, H, W, 3] in [-1, 1],
            caches for the next step).

        Raises:
            ValueError: the shape is another.
        """
        c = self.config
        self._check_latents(latent.shape)
        if latent.shape[1] != 1:
            raise ValueError(f"latent is {latent.shape}, and must be of one frame at a time")
        z = latent.astype(jnp.float32) * jnp.array(c.std) + jnp.array(c.mean)
        x, caches = self.decoder(self.post_quant(z), caches)
        video = rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=c.patch, r=c.patch)
        return jnp.clip(video.astype(jnp.float32), -1, 1), caches

    def decode_blocks(self, latents):
        """Yields the video of `decode` while it is made, the frames of one latent frame at a time.

        Two programs are compiled, for the first latent frame and for all others.

        Args:
            latents: [B, F, h, w, channels].

        Returns:
            An iterator over float32 [B, 1, H, W, 3] and then [B, time_factor, H, W, 3].

        Raises:
            ValueError: the shape is another.
        """
        self._check_latents(latents.shape)
        return self._decode_blocks(latents)

    def _decode_blocks(self, latents):
        caches = None
        for index in range(latents.shape[1]):
            frames, caches = _decode_frame(self, latents[:, index : index + 1], caches)
            yield frames

    def _check_video(self, shape):
        c = self.config
        if len(shape) != 5 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"video is {tuple(shape)}, and must be [B, T, H, W, 3]")
        if shape[1] % c.time_factor != 1 % c.time_factor:
            near = c.time_factor * ((shape[1] - 1) // c.time_factor) + 1
            raise ValueError(
                f"a video of {shape[1]} frames must have {c.time_factor} k + 1: cut it to {near}"
            )
        if shape[2] % c.space_factor or shape[3] % c.space_factor:
            raise ValueError(
                f"frames of {shape[2]} x {shape[3]} pixels: height and width must be multiples of "
                f"{c.space_factor}; crop or resize them"
            )

    def _check_latents(self, shape):
        channels = self.config.channels
        if len(shape) != 5 or shape[-1] != channels or 0 in shape:
            raise ValueError(f"latents are {tuple(shape)}, and must be [B, F, h, w, {channels}]")


@functools.partial(jax.jit, donate_argnums=2)
def _decode_frame(vae, latent, caches):
    return vae.decode_frame(latent, caches)


# Statistics of the published networks' latents, channel by channel.
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
