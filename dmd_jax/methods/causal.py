"""How a causal generator makes the videos that DMD and SiD compare: a field of these methods.

    DMD(sample_shape, video=SelfForcing(Causal(3)))     block by block, from its own blocks
    DMD(sample_shape, video=CausVid(Causal(3)))         in one call, from noised real videos

`long_tuning` has a third.

Imports the rollouts and the samplers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import check_step_times, shift_time
from dmd_jax.methods import Batch, Index, Nets, OneKey
from dmd_jax.models.attention import Causal
from dmd_jax.models.kv_cache import KVCache
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.rollouts.blocks import Layout
from dmd_jax.rollouts.samplers import CausalFewStep, few_step
from dmd_jax.rollouts.self_forcing import empty_cache, self_forcing
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced, block_of, context_at

Videos: TypeAlias = Float32[Array, "B F H W C"]


@dataclasses.dataclass(frozen=True)
class CausalRollout:
    """Base of the ways in which a causal generator makes videos in training.

    Attributes:
        causal: frames per block, lone first frame, window and sink, in training and in inference.
        first_times: another list of times for the first block of a video; None for the same.
        context_time: time at which a finished block is written to the cache (see `self_forcing`).
    """

    uses_data: ClassVar = False
    needs_vae: ClassVar = False
    title: ClassVar = "student"  # in tables
    shares_exit: ClassVar = False  # whether all blocks stop at one exit step
    makes_whole_videos: ClassVar = True  # whether samples begin where videos do, and end there

    causal: Causal = dataclasses.field(default=Causal())
    first_times: tuple[float, ...] | None = None
    context_time: float | None = 0.0

    def __post_init__(self) -> None:
        if self.first_times is not None:
            check_step_times(self.first_times)
        if self.context_time is not None and not 0.0 <= self.context_time < 1.0:
            raise ValueError(f"context_time={self.context_time} must be in [0, 1), or None")

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Raises ValueError where samples of this shape cannot be rolled out."""
        if len(sample_shape) != 4:
            raise ValueError(f"a causal rollout makes videos, not samples {sample_shape}")
        self._layout(sample_shape)

    def _layout(self, sample_shape):
        videos = jax.ShapeDtypeStruct((1, *sample_shape), jnp.float32)
        return Layout.of("videos", videos, self.causal, lone_first=True)

    def expected_blocks(self, sample_shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean numbers of blocks of a rollout: those that are made, and those that pass gradient.

        A lone first frame does not count.
        """
        return (float(self._layout(sample_shape).count),) * 2

    def streams(self, generator: Denoiser, sample_shape: tuple[int, ...], cond: PyTree) -> Any:
        """What training goes on from at the first step; None where each step begins anew.

        Args:
            generator: for the size of its cache.
            sample_shape: (F, H, W, C).
            cond: conditions of a batch.
        """
        return None

    def cache_shape(self, generator: Denoiser, videos: jax.ShapeDtypeStruct) -> KVCache | None:
        """The KV cache that a rollout of `videos` [B, F, H, W, C] fills; None where it fills none.

        Arrays are jax.ShapeDtypeStructs.
        """
        return None

    def __call__(
        self,
        generator: Denoiser,
        noise: Videos,
        nets: Nets,
        batch: Batch,
        key: OneKey,
        *,
        times: Sequence[float],
        shift: float,
        last_step_share: float,
    ) -> Rollout:
        """Videos of the generator, under the condition `batch["cond"]`.

        Subclasses may take `times`, `shift` and `last_step_share` as `how`, to hand them on.
        """
        raise NotImplementedError

    def sampler(
        self, times: Sequence[float], steps: int, guidance: float, shift: float
    ) -> CausalFewStep:
        """How the trained generator is sampled; see `samplers.few_step`."""
        how = dict(first_times=self.first_times, name=self.title)
        return few_step(
            times, steps, guidance, shift, self.causal, context_time=self.context_time, **how
        )


@dataclasses.dataclass(frozen=True)
class OwnBlocks(CausalRollout):
    """Base of rollouts that are those of inference: block by block, with the generator's cache.

    Attributes:
        per_block_exit: an exit step for each block, not one for all.
        image_latent: the first frame that is compared is decoded and encoded again as an image,
            where others come before it: a teacher expects a video to begin with one. It needs the
            network `vae`, and counts in no loss.
    """

    per_block_exit: bool = False
    image_latent: bool = False

    @property
    def needs_vae(self) -> bool:
        """Whether rollouts call the network `vae`."""
        return self.image_latent

    @property
    def shares_exit(self) -> bool:
        """Whether all blocks stop at one exit step."""
        return not self.per_block_exit

    def roll_out(
        self,
        generator: Denoiser,
        noise: Videos,
        cond: PyTree,
        index: Index,
        key: OneKey,
        **more: Any,
    ) -> Rollout:
        """`self_forcing` with these fields; `more` are its other arguments."""
        return self_forcing(
            generator,
            noise,
            cond,
            key,
            schedule=generator.schedule,
            causal=self.causal,
            first_times=self.first_times,
            per_block_exit=self.per_block_exit,
            context_time=self.context_time,
            index=index,
            **more,
        )


@dataclasses.dataclass(frozen=True)
class SelfForcing(OwnBlocks):
    """Self-Forcing (Huang et al. 2025): each rollout makes a whole video.

    Attributes:
        graded: only the last so many frames pass gradient; None for all, or those compared.
        compared: only the last so many frames are compared with the teacher's distribution: the
            length of the teacher's videos, where the student's are longer. None for all.
        least_blocks: the number of blocks of a rollout is drawn from `least_blocks` up to all; None
            for always all. It needs `compared`, and so many blocks have to fill it.

    Raises:
        ValueError: a number is out of range.
    """

    title: ClassVar = "self-forcing"

    graded: int | None = None
    compared: int | None = None
    least_blocks: int | None = None

    @property
    def makes_whole_videos(self) -> bool:
        """Whether all frames are compared."""
        return self.compared is None

    def check(self, sample_shape: tuple[int, ...]) -> None:
        super().check(sample_shape)
        layout = self._layout(sample_shape)
        for frames in (self.graded, self.compared):
            if frames is not None:
                layout.graded(frames)
            if frames == 0:
                raise ValueError("graded=0 leaves no frame that the generator could learn from")
        if self.image_latent and self.compared is None:
            raise ValueError("image_latent needs `compared`: the video's first frame is an image")
        if self.least_blocks is not None:
            self._check_least(layout)

    def _check_least(self, layout):
        least, compared = self.least_blocks, self.compared
        if compared is None:
            raise ValueError(
                f"least_blocks={least} needs `compared`: the teacher's videos have one length"
            )
        if not 1 <= least <= layout.total or layout.made(least) < compared:
            raise ValueError(
                f"least_blocks={least}: so many blocks must make at least the compared={compared} "
                f"frames, and at most the {layout.frames} frames of a video"
            )

    def expected_blocks(self, sample_shape: tuple[int, ...]) -> tuple[float, float]:
        layout = self._layout(sample_shape)
        least = layout.total if self.least_blocks is None else self.least_blocks
        graded = layout.count if self._graded is None else self._graded // layout.size
        made = range(least - layout.lone, layout.count + 1)
        return sum(made) / len(made), sum(min(n, graded) for n in made) / len(made)

    def cache_shape(self, generator: Denoiser, videos: jax.ShapeDtypeStruct) -> KVCache | None:
        frames = videos.shape[1]
        graded = frames if self._graded is None else self._graded
        return jax.eval_shape(lambda: empty_cache(generator, videos, self.causal, graded, frames))

    def __call__(
        self, generator: Denoiser, noise: Videos, nets: Nets, batch: Batch, key: OneKey, **how: Any
    ) -> Rollout:
        rollout_key, blocks_key = jax.random.split(key)
        blocks = None
        if self.least_blocks is not None:
            most = self._layout(noise.shape[1:]).total
            blocks = jax.random.randint(blocks_key, (), self.least_blocks, most + 1)
        rollout = self.roll_out(
            generator,
            noise,
            batch["cond"],
            batch["index"],
            rollout_key,
            graded=self._graded,
            blocks=blocks,
            **how,
        )
        return rollout if self.compared is None else self._last(rollout, blocks, nets.get("vae"))

    @property
    def _graded(self):
        return self.compared if self.graded is None else self.graded

    def _last(self, rollout, blocks, vae):
        """The rollout's last `compared` frames.

        Where frames come before them, their first block counts in no loss, or their first frame
        if the first frame of a video is a block (Self-Forcing's gradient mask).
        """
        layout = self._layout(rollout.x0.shape[1:])
        made = layout.made(layout.total if blocks is None else blocks)
        first = 1 if self.causal.first_alone else layout.size
        frames = jnp.arange(self.compared)
        mask = jnp.broadcast_to(
            (frames >= first) | (made == self.compared), rollout.x0.shape[:1] + frames.shape
        )
        if rollout.mask is not None:
            mask &= rollout.mask[:, -self.compared :]
        x0 = rollout.x0[:, -self.compared :]
        if self.image_latent:
            begin = self._image(rollout.x0, layout, blocks, vae)
            x0 = jnp.concatenate([begin.astype(x0.dtype), x0[:, 1:]], axis=1)
        return rollout._replace(x0=x0, mask=mask)

    def _image(self, x0, layout, blocks, vae):
        """The first latent to compare: as an image's, where frames come before it. [B, 1, ...]."""
        end = x0.shape[1] - self.compared + 1
        x0 = jax.lax.stop_gradient(x0)

        def of(blocks):
            made = layout.made(blocks)
            if made == self.compared:
                return x0[:, end - 1 : end].astype(jnp.float32)
            return vae.last_as_image(x0[:, layout.frames - made : end])

        if blocks is None:
            return of(layout.total)
        # The lengths of the VAE's input are static: one branch for each number of blocks.
        counts = range(self.least_blocks, layout.total + 1)
        return jax.lax.switch(blocks - counts[0], [partial(of, count) for count in counts])


@dataclasses.dataclass(frozen=True)
class CausVid(CausalRollout):
    """CausVid (Yin et al. 2025): one call for all blocks, from real videos with noise.

    Each block has a time of its own, drawn from `times`. The generator never meets its own errors:
    this is what Self-Forcing mends.

    Attributes:
        teacher_forcing: blocks attend to the real blocks before them, at the context time;
            otherwise to noisy ones, as in CausVid.
    """

    uses_data: ClassVar = True

    teacher_forcing: bool = False

    @property
    def title(self) -> str:
        """In tables."""
        return "teacher forcing" if self.teacher_forcing else "diffusion forcing"

    def __call__(
        self,
        generator: Denoiser,
        noise: Videos,
        nets: Nets,
        batch: Batch,
        key: OneKey,
        *,
        times: Sequence[float],
        shift: float,
        last_step_share: float,
    ) -> Rollout:
        index, real = batch["index"], batch["data"]
        layout = self._layout(noise.shape[1:])

        def draw(key):
            step_key, last_key = jax.random.split(key)
            steps = jax.random.randint(step_key, (layout.total,), 0, len(times))
            last = jax.random.bernoulli(last_key, last_step_share, steps.shape)
            return jnp.where(last, len(times) - 1, steps)

        time_key, context_key = jax.random.split(key)
        levels = shift_time(jnp.asarray(times, jnp.float32), shift)
        block = block_of(noise.shape[1], self.causal)
        t = levels[randomness.per_sample(draw, time_key, index)][:, block]
        x_t = generator.schedule.add_noise(real, noise, t)
        if self.teacher_forcing:
            # None: inference keeps the keys and values of the last call.
            last = shift_time(times[-1], shift)
            time = last if self.context_time is None else self.context_time
            context = context_at(time, real, generator.schedule, context_key, index)
            forced = TeacherForced(generator, self.causal, time)
            x0 = forced(x_t, t, After(batch["cond"], context))
        else:
            x0 = generator(x_t, t, batch["cond"], causal=self.causal)
        return Rollout(x0, None, jnp.float32(1.0), jnp.float32(0.0), batch["cond"])
