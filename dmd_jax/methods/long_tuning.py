"""Streaming long tuning: training goes on with one long video, a chunk at each step.

    DMD(sample_shape, video=LongTuning(Causal(3, window=12, sink=3), frames=240, overlap=3))

LongLive (Yang et al. 2025, arXiv 2509.22622). Imports `causal` beside it and what that imports.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree

from dmd_jax.devices import sharding
from dmd_jax.devices.sharding import P
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods import Batch, Nets, OneKey
from dmd_jax.methods.causal import OwnBlocks, Videos
from dmd_jax.models import kv_cache
from dmd_jax.models.kv_cache import KVCache
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.rollouts.blocks import Layout
from dmd_jax.rollouts.self_forcing import empty_cache, recache


class Streams(NamedTuple):
    """The videos of a batch between two steps; a part of the TrainState.

    Attributes:
        cache: the generator's cache. Its keys and values are those of the weights that wrote them.
        latents: the last frames, as many as a sample has.
        cond: the conditions of the videos.
        made: how many frames the videos have.
        switch: the number of frames after which the prompts change; 0 for never.
    """

    cache: KVCache
    latents: Videos
    cond: PyTree
    made: Int32[Array, ""]
    switch: Int32[Array, ""]

    def batch_axes(self) -> "Streams":
        """The batch axis of each array; -1 for those that all samples share."""
        return Streams(KVCache(1, 1, -1), 0, jax.tree.map(lambda _: 0, self.cond), -1, -1)

    def specs(self) -> "Streams":
        """How each array is split over the devices (see `sharding`)."""

        def rows(x):
            return P(sharding.BATCH, *(None,) * (x.ndim - 1))

        heads = sharding.heads_spec(self.cache.keys.ndim, axis=1)
        cond = jax.tree.map(rows, self.cond)
        return Streams(KVCache(heads, heads, P()), rows(self.latents), cond, P(), P())


@dataclasses.dataclass(frozen=True)
class LongTuning(OwnBlocks):
    """Self-Forcing on videos longer than the teacher's, of which each step makes the next chunk.

    The first chunk has as many frames as a sample; later ones begin with the last `overlap` frames
    of the chunk before, which count in no loss. A video ends where the next chunk would not fit
    into `frames`, and others begin, of the prompts of that step. The cache is not computed anew
    when the weights change.

    At the border between two chunks, drawn at random, the prompts change to those of that step: the
    cache is computed anew from the frames of the window, as streams do it (`Causal.keep_sink`).
    (Where a step makes two chunks, a video may begin and reach that border within it: then its
    prompts stay.) If a frame is not finite, all videos end with that chunk.

    Attributes:
        frames: of a whole video.
        overlap: frames that a chunk shares with the one before.
        prompt_switch: whether the prompts change, once in a video.

    Raises:
        ValueError: a number is out of range.
    """

    title: ClassVar = "long tuning"
    makes_whole_videos: ClassVar = False

    frames: int = 240
    overlap: int = 3
    prompt_switch: bool = True

    def check(self, sample_shape: tuple[int, ...]) -> None:
        super().check(sample_shape)
        chunk, size = sample_shape[0], self.causal.frames_per_block
        if self.causal.first_alone:
            raise ValueError("long tuning makes whole blocks: causal.first_alone must be False")
        if self.causal.window is None or self._kept > chunk:
            raise ValueError(
                f"causal.window={self.causal.window}: a long video needs a window, of at most the "
                f"{chunk} frames of a sample"
            )
        if not 0 <= self.overlap < chunk or self.overlap % size:
            raise ValueError(
                f"overlap={self.overlap} must be whole blocks of {size} frames, and fewer than the "
                f"{chunk} frames of a sample"
            )
        if self.image_latent and not self.overlap:
            raise ValueError("image_latent replaces a frame of the overlap: it needs overlap > 0")
        if self.frames < 2 * chunk - self.overlap:
            raise ValueError(
                f"frames={self.frames} leave no room for a second chunk: give "
                f"{2 * chunk - self.overlap} or more"
            )

    @property
    def _kept(self):
        """Frames from which the cache is computed anew: the blocks of the window."""
        size = self.causal.frames_per_block
        return -(-self.causal.window // size) * size

    def _later(self, chunk):
        """How many chunks a video has after the first."""
        return (self.frames - chunk) // (chunk - self.overlap)

    def expected_blocks(self, sample_shape: tuple[int, ...]) -> tuple[float, float]:
        chunk, later = sample_shape[0], self._later(sample_shape[0])
        frames = chunk + later * (chunk - self.overlap)
        return (frames / (1 + later) / self.causal.frames_per_block,) * 2

    def cache_shape(self, generator: Denoiser, videos: jax.ShapeDtypeStruct) -> KVCache:
        return jax.eval_shape(lambda: self._empty_cache(generator, videos))

    def _empty_cache(self, generator, videos):
        chunk = videos.shape[1]
        return empty_cache(generator, videos, self.causal, chunk, chunk)

    def streams(self, generator: Denoiser, sample_shape: tuple[int, ...], cond: PyTree) -> Streams:
        """The streams before the first step: at their end, so that it begins new videos.

        Args:
            generator: for the size of its cache.
            sample_shape: (F, H, W, C).
            cond: conditions of a batch.
        """
        batch = len(jax.tree.leaves(cond)[0])
        latents = jnp.zeros((batch, *sample_shape), jnp.float32)
        cache, cond = self._empty_cache(generator, latents), jax.tree.map(jnp.zeros_like, cond)
        return Streams(cache, latents, cond, jnp.int32(self.frames), jnp.int32(0))

    def __call__(
        self, generator: Denoiser, noise: Videos, nets: Nets, batch: Batch, key: OneKey, **how: Any
    ) -> Rollout:
        rollout_key, switch_key, context_key = jax.random.split(key, 3)
        streams = jax.lax.stop_gradient(batch["stream"])
        streams = self._begun(streams, batch["cond"], noise.shape[1], switch_key)
        streams = self._switched(streams, batch, generator, context_key)
        layout = Layout.of("noise", noise, self.causal, lone_first=False)
        new = streams.made == 0
        rollout = self.roll_out(
            generator,
            noise,
            streams.cond,
            batch["index"],
            rollout_key,
            blocks=layout.total - jnp.where(new, 0, self.overlap // layout.size),
            cache=streams.cache,
            start=streams.made,
            **how,
        )
        after = self._after(streams, rollout, new)
        if not self.overlap:
            return rollout._replace(stream=after)
        overlap = self._overlap(streams, new, nets.get("vae"))
        first = jnp.where(new, rollout.x0[:, : self.overlap], overlap)
        x0 = jnp.concatenate([first, rollout.x0[:, self.overlap :]], axis=1)
        return rollout._replace(x0=x0, stream=after)

    def _begun(self, streams, cond, chunk, key):
        """The streams, or new ones of these conditions where the next chunk would not fit."""
        step = chunk - self.overlap
        over = streams.made + step > self.frames
        switch = chunk + step * jax.random.randint(key, (), 0, self._later(chunk))
        # Zeros, because NaN in a masked slot would reach the sum as NaN.
        cache = kv_cache.forget(jax.tree.map(jnp.zeros_like, streams.cache))
        begun = streams._replace(
            cache=cache,
            cond=cond,
            made=jnp.int32(0),
            switch=jnp.int32(switch if self.prompt_switch else 0),
        )
        return jax.tree.map(partial(jnp.where, over), begun, streams)

    def _switched(self, streams, batch, generator, key):
        """The streams under the conditions of this batch, where it is time to change."""
        if not self.prompt_switch:
            return streams

        def switch(streams):
            cache = recache(
                generator,
                streams.latents[:, -self._kept :],
                batch["cond"],
                key,
                schedule=generator.schedule,
                causal=self.causal,
                cache=streams.cache,
                start=streams.made - self._kept,
                context_time=self.context_time,
                index=batch["index"],
            )
            return streams._replace(cache=cache, cond=batch["cond"])

        now = (streams.made > 0) & (streams.made == streams.switch)
        return jax.lax.cond(now, switch, lambda streams: streams, streams)

    def _overlap(self, streams, new, vae):
        """The frames that a chunk shares with the one before; its first as an image's latent."""
        overlap = streams.latents[:, -self.overlap :]
        if not self.image_latent:
            return overlap
        before = streams.latents[:, : streams.latents.shape[1] - self.overlap + 1]
        image = jax.lax.cond(
            new, lambda x: x[:, -1:], lambda x: vae.last_as_image(x).astype(x.dtype), before
        )
        return jnp.concatenate([image, overlap[:, 1:]], axis=1)

    def _after(self, streams, rollout, new):
        """The streams after a rollout."""
        x0 = jax.lax.stop_gradient(rollout.x0.astype(jnp.float32))
        if self.overlap:
            old = streams.latents[:, -self.overlap :]
            first = jnp.where(new, x0[:, : self.overlap], old)
            x0 = jnp.concatenate([first, x0[:, self.overlap :]], axis=1)
        chunk = x0.shape[1]
        made = streams.made + jnp.where(new, chunk, chunk - self.overlap)
        made = jnp.where(jnp.isfinite(x0).all(), made, self.frames)  # all videos end
        cache = jax.lax.stop_gradient(rollout.cache)
        return Streams(cache, x0, streams.cond, made.astype(jnp.int32), streams.switch)
