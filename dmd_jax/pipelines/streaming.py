"""Videos without an end: a causal few-step student, block by block.

    sampler = block_sampler("student.safetensors")
    stream = Stream(denoiser, cond, sampler, size=(60, 104, 16))
    for latents in itertools.islice(stream, 40):  # [1, frames of a block, 60, 104, 16]
        ...
        stream.switch(other_cond)  # from the next block on

Memory is constant: the cache holds the window and the sink. A block is available before it is
written to the cache, which is the first thing that the next block does. Imports rollouts and the
rooms below.
"""

import collections
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import step_times
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.block_maker import BlockMaker, Steps, first_noise
from dmd_jax.rollouts.samplers import CausalFewStep, few_step


def block_sampler(
    checkpoint: str | PathLike,
    *,
    steps: int | None = None,
    shift: float | None = None,
    causal: Causal | Mapping[str, Any] | None = None,
) -> CausalFewStep:
    """The sampler of a causal student, from the notes in its file.

    The notes are `times`, `shift`, `causal` (the fields of a Causal), `first_times` and
    `context_time`.

    Args:
        checkpoint: as for `weights.denoiser`.
        steps: calls of a block; the student's own if None.
        shift: the student's own if None, or 1.
        causal: in place of the student's own; a file without one needs it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not say how it is streamed, or a number is out of range.
    """
    notes = weights.notes(checkpoint)
    causal = notes.get("causal") if causal is None else causal
    if causal is None:
        raise ValueError(
            f"{checkpoint} does not say which frames are a block: it was not trained to make a "
            "video block by block. State it, as in --causal=frames_per_block=3,window=12,sink=3"
        )
    if "times" not in notes and steps is None:
        raise ValueError(f"{checkpoint} is no distilled student: give --steps")
    times = tuple(notes["times"]) if "times" in notes else step_times(steps)
    first_times = notes.get("first_times")
    return few_step(
        times,
        len(times) if steps is None else steps,
        1,
        notes.get("shift", 1.0) if shift is None else shift,
        causal if isinstance(causal, Causal) else Causal(**causal),
        context_time=notes.get("context_time", 0.0),
        first_times=None if first_times is None else tuple(first_times),
    )


def title(sampler: CausalFewStep) -> str:
    """As "blocks of 3 frames in 4 steps, window of 12, sink of 3"."""
    causal = sampler.causal
    parts = [f"blocks of {causal.frames_per_block} frames in {sampler.steps} steps"]
    parts += [f"window of {causal.window}"] if causal.window else []
    parts += [f"sink of {causal.sink}"] if causal.sink else []
    return ", ".join(parts)


def _maker(sampler, denoiser, cond, key, index):
    """The BlockMaker of a stream."""
    steps = Steps.of(sampler.times, sampler.first_times, sampler.shift)
    how = dict(steps=steps, context_time=sampler.context_time)
    return BlockMaker(denoiser, cond, denoiser.schedule, sampler.causal, key, index, **how)


def parse_causal(settings: Sequence[str]) -> Causal | None:
    """The Causal of ["frames_per_block=3", "window=12", "sink=3", "keep_sink=1"]; None for [].

    Raises:
        ValueError: it is written otherwise, or a number is out of range.
    """
    if not settings:
        return None
    try:
        numbers = {name: int(number) for name, number in (s.split("=") for s in settings)}
        for name in ("first_alone", "keep_sink"):
            if name in numbers:
                numbers[name] = bool(numbers[name])
        return Causal(**numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--causal={','.join(settings)}: write it as frames_per_block=3,first_alone=1,"
            f"window=12,sink=3, leaving out what does not hold ({error})"
        ) from None


class Stream:
    """An iterator of blocks of latents, each float32 [B, n, H, W, C].

    n is `frames_per_block`, or 1 for the lone first frame. Two programs are compiled, one that
    denoises a block and one that writes it to the cache (and both once more for a lone first
    frame); nothing is read on the host. The video is that of `self_forcing` in its last step with
    the same key, from the noise of `block_maker.first_noise`.

    Attributes:
        frames: how many latent frames were made.
        cache: the KVCache.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cond: Any,
        sampler: CausalFewStep,
        *,
        size: tuple[int, int, int],
        longest: int | None = None,
        seed: int = 0,
        number: int = 0,
    ):
        """Begins a video.

        Args:
            denoiser: a Denoiser of a causal network.
            cond: conditions, a pytree of arrays with leading axis B.
            sampler: how a block is made.
            size: (H, W, C) of the latents.
            longest: without a window, the number of latent frames that there is room for. With a
                window there is no end, and it is not used.
            seed: of all noise.
            number: of the first of the B videos among those of this seed: each has its own noise.

        Raises:
            ValueError: neither a window nor `longest` is given.
        """
        self._sampler, self._size = sampler, tuple(size)
        self._denoiser, self._cond = denoiser, jax.tree.map(jnp.asarray, cond)
        causal, batch = sampler.causal, len(jax.tree.leaves(cond)[0])
        self._key, self._index = jax.random.key(seed), number + jnp.arange(batch)
        self._slots = causal.most_visible or longest
        if self._slots is None:
            raise ValueError(
                "without a window every frame stays visible, and memory grows with the video: give "
                "`longest`, its number of latent frames"
            )
        self.cache = denoiser.empty_cache(batch, self._slots, *self._size[:2])
        self.frames, self._start = 0, jnp.int32(0)
        self._pending = None  # (x0, its K/V) of the block that is not yet written
        # (x0, number of its first frame) of the blocks in the window: what a switch writes again.
        blocks = -(-(causal.window or self._slots) // causal.frames_per_block)
        self._recent = collections.deque(maxlen=blocks)

    def __iter__(self):
        return self

    @property
    def full(self) -> bool:
        """Whether there is no room for another block."""
        return (
            self._sampler.causal.window is None and self.frames + self._size_of_next > self._slots
        )

    @property
    def _size_of_next(self):
        causal = self._sampler.causal
        return 1 if causal.first_alone and not self.frames else causal.frames_per_block

    def __next__(self) -> jax.Array:
        """The next block.

        Raises:
            ValueError: without a window, the video has the length that there is room for.
        """
        if self.full:
            raise ValueError(
                f"the video has {self.frames} latent frames, and there is room for {self._slots}: "
                "without a window every frame stays visible. Give a larger `longest`, or stream a "
                "student with a window"
            )
        self.write()
        shape = (self._size_of_next, *self._size)
        self._pending = _denoise(*self._inputs(), self._sampler, shape)
        self._recent.append((self._pending[0], self._start))
        self.frames += shape[0]
        return self._pending[0]

    def write(self) -> None:
        """Writes the last block to the cache. The next block does so too, if it is not yet done."""
        if self._pending is not None:
            self.cache, self._start = _write(*self._inputs(), self._sampler, *self._pending)
            self._pending = None

    def switch(self, cond: Any) -> None:
        """Changes the prompt: the next block is the first of the new conditions.

        The cache is computed anew from the latents of the window under the new conditions, as by
        `self_forcing.recache` (LongLive, arXiv 2509.22622). A sink that has left the window keeps
        the keys and values of the old conditions with `Causal.keep_sink`; otherwise it is gone.

        Args:
            cond: conditions of the same shapes.
        """
        self._cond, self._pending = jax.tree.map(jnp.asarray, cond), None
        causal = self._sampler.causal
        self.cache = kv_cache.forget(self.cache, causal.sink if causal.keep_sink else 0)
        for x0, start in self._recent:
            self._start = start
            self.cache, self._start = _write(*self._inputs(), self._sampler, x0, None)

    def _inputs(self):
        return self._denoiser, self._cond, self._key, self._index, self.cache, self._start


@partial(jax.jit, static_argnames=("sampler", "shape"))
def _denoise(denoiser, cond, key, index, cache, start, sampler, shape):
    """(x0 of a block, its K/V where they are written as they are)."""
    maker = _maker(sampler, denoiser, cond, key, index)
    noise = first_noise(key, index, shape, start)
    _, _, out = maker.denoise(noise, cache, start, maker.steps.last(start))
    return out.x0, out.aux if sampler.context_time is None else None


@partial(jax.jit, static_argnames="sampler", donate_argnames="cache")
def _write(denoiser, cond, key, index, cache, start, sampler, x0, own):
    """(the cache with a block, the number of the frame after it)."""
    maker = _maker(sampler, denoiser, cond, key, index)
    if own is None:
        own = maker.encode(x0, sampler.context_time or 0.0, cache, start)
    return maker.write(cache, own), start + x0.shape[1]
