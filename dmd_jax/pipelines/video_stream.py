"""Prompts in, frames out, as long as one likes: a student, what surrounds it, and its times.

    model = load_stream_model("student.safetensors", pipeline="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    model.warm_up()  # compiles
    video = model.start(model.embed("waves at night"), seed=0)
    for piece in itertools.islice(video, 40):
        piece.frames  # uint8 [T, H, W, 3]
    video.switch(model.embed("waves at noon"))

Imports `streaming`, `sampling` and `prompts` beside it, and the rooms below.
"""

import dataclasses
import time
from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.pipelines import sampling
from dmd_jax.pipelines.prompts import Scene
from dmd_jax.pipelines.streaming import Stream, block_sampler
from dmd_jax.rollouts.samplers import CausalFewStep


@dataclasses.dataclass(frozen=True)
class Times:
    """What frames cost, in seconds of the device.

    Attributes:
        denoising: of the calls that make blocks.
        cache: of writing finished blocks to the cache, and of switching prompts.
        decoding: of latents to pixels, copied to the host.
        frames: how many frames these seconds made.
    """

    denoising: float = 0.0
    cache: float = 0.0
    decoding: float = 0.0
    frames: int = 0

    def __add__(self, other: "Times") -> "Times":
        return Times(*(a + b for a, b in zip(self._values, other._values, strict=True)))

    @property
    def _values(self):
        return dataclasses.astuple(self)

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return self.denoising + self.cache + self.decoding

    @property
    def rate(self) -> float:
        """Frames per second; 0 before the first frame."""
        return self.frames / self.total if self.frames else 0.0

    def __str__(self):
        parts = ("denoising", "cache", "decoding")
        shares = ", ".join(
            f"{part} {getattr(self, part) / max(self.total, 1e-9):.0%}" for part in parts
        )
        return f"{self.rate:.1f} frames per second ({shares})"


class Piece(NamedTuple):
    """The frames of one block."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    block: int  # its number, from 0
    times: Times  # its own; those of the cache are of the block before


class VideoStream:
    """An iterator of `Piece`s.

    Attributes:
        times: the sum of all pieces' `Times`.
        first_frame: seconds from `began` to the first frames; None before.
        blocks: how many blocks were made.
    """

    def __init__(self, stream: Stream, decode: Any, *, began: float | None = None):
        """
        Args:
            stream: latents of one video.
            decode: a pipeline's `decoder()`.
            began: `time.perf_counter()` when the video was asked for; now if None.
        """
        self._stream, self._decode = stream, decode
        self._began = time.perf_counter() if began is None else began
        self.times, self.first_frame, self.blocks = Times(), None, 0
        self._switching = 0.0

    def __iter__(self):
        return self

    @property
    def full(self) -> bool:
        """See `Stream.full`."""
        return self._stream.full

    def __next__(self) -> Piece:
        """Makes the frames of the next block. Raises as `Stream.__next__`."""
        moments = [time.perf_counter()]

        def done(result):
            jax.block_until_ready(result)
            moments.append(time.perf_counter())
            return result

        self._stream.write()
        done(self._stream.cache)
        latents = done(next(self._stream))
        frames = done(self._decode(latents))
        cache, denoising, decoding = np.diff(moments).tolist()
        times = Times(denoising, cache + self._switching, decoding, len(frames))
        piece = Piece(frames, self.blocks, times)
        self.times, self._switching = self.times + times, 0.0
        self.blocks += 1
        if self.first_frame is None:
            self.first_frame = time.perf_counter() - self._began
        return piece

    def switch(self, cond: Any) -> None:
        """See `Stream.switch`."""
        began = time.perf_counter()
        self._stream.switch(cond)
        jax.block_until_ready(self._stream.cache)
        self._switching += time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class StreamModel:
    """A causal student and what surrounds it.

    Attributes:
        denoiser: its network.
        around: a DigitsPipeline or WanPipeline.
        sampler: how it makes a block.
        longest: latent frames of the longest video, for a student without a window.
    """

    denoiser: Denoiser
    around: Any
    sampler: CausalFewStep
    longest: int

    def embed(self, *prompts: str) -> Any:
        """The conditions of N prompts, with leading axis N.

        Raises:
            ValueError: a prompt is too long for the text encoder.
        """
        cond, _ = self.around.conditions(prompts, "", self.denoiser.net.config)
        return cond

    def start(
        self, cond: Any, seed: int = 0, number: int = 0, *, began: float | None = None
    ) -> VideoStream:
        """Begins a video of one prompt.

        Args:
            cond: `embed` of one prompt.
            seed, number: of all noise, see `Stream`.
            began: as for `VideoStream`.
        """
        stream = Stream(
            self.denoiser,
            cond,
            self.sampler,
            size=self.around.sample_shape[1:],
            longest=self.longest,
            seed=seed,
            number=number,
        )
        return VideoStream(stream, self.around.decoder(), began=began)

    def warm_up(self) -> float:
        """Compiles everything, by way of a short video; returns the seconds that it took."""
        began, cond = time.perf_counter(), self.embed("")
        video = self.start(cond)
        for _ in range(2 + self.sampler.causal.first_alone):
            if not video.full:
                next(video)
        video.switch(cond)
        return time.perf_counter() - began


def load_stream_model(
    checkpoint: str | PathLike,
    *,
    steps: int | None = None,
    shift: float | None = None,
    causal: Any = None,
    pipeline: str | None = None,
    frames: int = 81,
    height: int = 480,
    width: int = 832,
    dtype: str = "float32",
    keep_text_encoder: bool = False,
) -> StreamModel:
    """The StreamModel of a checkpoint, on the current mesh (`jax.set_mesh`) or the first device.

    Args:
        checkpoint: a causal student of videos, as for `weights.denoiser`.
        steps, shift, causal: as for `streaming.block_sampler`.
        pipeline, height, width, dtype: as for `sampling.sample_videos`.
        frames: of the longest video in pixels, for a student without a window; with one there is no
            limit.
        keep_text_encoder: whether the text encoder stays in memory, for prompts that come later.

    Raises:
        FileNotFoundError, ValueError: something is missing, or does not fit together.
        ImportError: an optional library is missing.
    """
    sampling.video_config(checkpoint)
    sampler = block_sampler(checkpoint, steps=steps, shift=shift, causal=causal)
    around = sampling.pipeline_around(
        checkpoint, pipeline, (1, height, width), dtype, keep_text_encoder=keep_text_encoder
    )
    denoiser = sampling.load_denoiser(checkpoint, dtype=dtype)
    return StreamModel(denoiser, around, sampler, _longest(around, sampler, frames))


def _longest(around, sampler, frames):
    """Latent frames of whole blocks that hold `frames` frames of the video."""
    size, lone = sampler.causal.frames_per_block, sampler.causal.first_alone
    return lone + -(-(around.latent_frames(frames) - lone) // size) * size


def play(
    model: StreamModel, scene: Scene, frames: int, seed: int = 0, number: int = 0
) -> tuple[VideoStream, Iterator[np.ndarray]]:
    """Makes a video of `frames` frames with the prompts of a scene.

    Args:
        seed, number: of all noise, see `Stream`.

    Returns:
        (the VideoStream, for its times; an iterator of uint8 [T, H, W, 3], the last of which is cut
        to the number of frames).
    """
    began = time.perf_counter()
    conds = model.embed(*scene.prompts)
    rows = [jax.tree.map(lambda x: x[i : i + 1], conds) for i in range(len(scene.prompts))]  # noqa: B023
    video = model.start(rows[0], seed, number, began=began)
    return video, _played(video, list(zip(scene.starts, rows, strict=True))[1:], frames)


def _played(video, switches, frames):
    while (made := video.times.frames) < frames:
        due = [cond for start, cond in switches if start <= made]
        if due:
            video.switch(due[-1])
            switches = switches[len(due) :]
        yield next(video).frames[: frames - made]
