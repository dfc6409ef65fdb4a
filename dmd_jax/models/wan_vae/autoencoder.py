"""Encoder, decoder and the two together.

Causal in time: the first frame is encoded by itself, and each later step of the encoder turns
`time_factor` frames into one latent frame, each step of the decoder one latent frame into as many
frames. What the layers need of earlier frames goes into and out of every step as a tuple of caches.
Memory therefore does not grow with the length of a video, and frames are available while later ones
are still to be decoded.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dmd_jax.models.layers import linear
from dmd_jax.models.wan_vae.layers import (
    AverageDown,
    CausalConv,
    Down,
    DuplicateUp,
    FrameAttention,
    Head,
    ResidualBlock,
    Stage,
    Up,
    chain,
)

# Small compared with a Wan transformer: every device has all of the weights.
SHARDING_RULES = ((r"(kernel|bias|scale)$", jax.P()),)


def _residual_blocks(count, inputs, outputs, **kw):
    return [ResidualBlock(inputs if i == 0 else outputs, outputs, **kw) for i in range(count)]


def _middle(dim, **kw):
    return nnx.List(
        [ResidualBlock(dim, dim, **kw), FrameAttention(dim, **kw), ResidualBlock(dim, dim, **kw)]
    )


class Encoder(nnx.Module):
    """[B, T, H, W, 3 patch^2] -> mean and log variance of the latents [B, T', h, w, 2 channels]."""

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
        return chain([self.conv, *self.stages, *self.middle, self.head], x, caches)


class Decoder(nnx.Module):
    """Latents [B, 1, h, w, channels] -> [B, T, H, W, 3 patch^2]."""

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
        return chain([self.conv, *self.middle, *self.stages, self.head], x, caches)


class WanVAE(nnx.Module):
    """The autoencoder of a `WanVAEConfig`. All latents, in and out, are normalised."""

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
            ValueError: the video has another shape.
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
            ValueError: the latents have another shape.
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
            # Written in place: stacked frames would be copied into this order, twice the memory.
            start = c.time_factor * (index - 1) + 1
            return (caches, jax.lax.dynamic_update_slice_in_dim(video, frames, start, 1)), None

        indices = jnp.arange(1, latents.shape[1])
        (_, video), _ = jax.lax.scan(body, (caches, video), indices)
        return video

    def last_as_image(self, latents):
        """The latent of the last frame of a video, encoded as an image: [B, 1, h, w, channels].

        Only the first latent of a video is an image's: this makes one for a video that begins
        after these latents. Memory does not grow with their number.

        Args:
            latents: [B, F, h, w, channels].

        Raises:
            ValueError: the latents have another shape.
        """
        self._check_latents(latents.shape)
        frames, caches = self.decode_frame(latents[:, :1])

        def body(carry, latent):
            frames, caches = self.decode_frame(latent[:, None], carry[1])
            return (frames[:, -1:], caches), None

        later = jnp.moveaxis(latents[:, 1:], 1, 0)
        (frame, _), _ = jax.lax.scan(body, (frames, caches), later)
        return self.encode(frame)

    def decode_frame(self, latent, caches=None):
        """One step of decoding, for a video that is generated and shown at the same time.

        Args:
            latent: [B, 1, h, w, channels], normalised.
            caches: returned by the step before; None for the first frame of a video.

        Returns:
            (video, caches for the next step): video float32 [B, T, H, W, 3] in [-1, 1]; T is 1
            for the first frame of a video and time_factor for later ones.

        Raises:
            ValueError: the latent has another shape.
        """
        c = self.config
        self._check_latents(latent.shape)
        if latent.shape[1] != 1:
            raise ValueError(f"latent is {latent.shape}, but must be of one frame at a time")
        z = latent.astype(jnp.float32) * jnp.array(c.std) + jnp.array(c.mean)
        x, caches = self.decoder(self.post_quant(z), caches)
        video = rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=c.patch, r=c.patch)
        return jnp.clip(video.astype(jnp.float32), -1, 1), caches

    def _check_video(self, shape):
        c = self.config
        if len(shape) != 5 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"video is {tuple(shape)}, but must be [B, T, H, W, 3]")
        if shape[1] % c.time_factor != 1 % c.time_factor:
            shorter = c.time_factor * ((shape[1] - 1) // c.time_factor) + 1
            raise ValueError(
                f"a video of {shape[1]} frames must have {c.time_factor} k + 1: cut it to {shorter}"
            )
        if shape[2] % c.space_factor or shape[3] % c.space_factor:
            raise ValueError(
                f"frames of {shape[2]} x {shape[3]} pixels: height and width must be multiples of "
                f"{c.space_factor}; crop or resize them"
            )

    def _check_latents(self, shape):
        channels = self.config.channels
        if len(shape) != 5 or shape[-1] != channels or 0 in shape:
            raise ValueError(f"latents are {tuple(shape)}, but must be [B, F, h, w, {channels}]")


@functools.partial(jax.jit, donate_argnums=2)
def decode_step(vae, latent, caches):
    """`WanVAE.decode_frame`, compiled; the memory of `caches` is reused.

    There are two programs, one for the first frame of a video and one for all others.
    """
    return vae.decode_frame(latent, caches)
