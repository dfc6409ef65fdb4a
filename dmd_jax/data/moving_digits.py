"""Moving digits: small videos with captions, for `configs/dmd.py:wan_tiny`.

The digits are the training scans of `mnist5k`; their motion is computed here. The latents are
folded pixels, and each word has a fixed random vector as its embedding: 80 sentences need neither a
VAE nor a language model. Imports the prompts.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from dmd_jax.data import embeddings, latents, word_vectors
from dmd_jax.data.pixels import fold, unfold
from dmd_jax.data.prompts import Prompts, side_by_side
from dmd_jax.data.scans import DIGITS, small_scans

FRAMES, SIZE, DIGIT, FOLD = 4, 20, 8, 2  # in pixels, except the number of frames
SPEED = 4  # pixels per frame: one patch of the network
TEXT_LENGTH = 8
MEAN, STD = -0.9, 0.4  # of the pixels; normalised latents have the scale of the noise
# (rows, columns) per frame, in units of SPEED.
MOTIONS = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up and left": (-1, -1),
    "up and right": (-1, 1),
    "down and left": (1, -1),
    "down and right": (1, 1),
}
STEPS = np.array(list(MOTIONS.values()))
PROMPTS = tuple(f"{digit} moves {motion}" for digit in DIGITS for motion in MOTIONS)


def moving_digits(num: int, seed: int = 0, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Videos in which one digit crosses a black square at constant speed.

    Args:
        num: N; the prompts take turns.
        seed: for the choice of scans and starting points.
        split: of the scans, "train" or "test".

    Returns:
        (uint8 [N, FRAMES, SIZE, SIZE, 1], prompts int32 [N]: rows of `PROMPTS`).
    """
    rng = np.random.default_rng(seed)
    scans, labels = small_scans(split, DIGIT)
    videos = np.zeros((num, FRAMES, SIZE, SIZE, 1), np.uint8)
    prompts = np.arange(num, dtype=np.int32) % len(PROMPTS)
    way = SPEED * (FRAMES - 1)
    for video, prompt in zip(videos, prompts, strict=True):
        digit, motion = divmod(int(prompt), len(MOTIONS))
        scan = scans[rng.choice(np.flatnonzero(labels == digit))]
        step = STEPS[motion]
        # Any start from which the digit stays inside the frame.
        start = rng.integers(way * (step < 0), SIZE - DIGIT - way * (step > 0) + 1)
        for time, frame in enumerate(video):
            row, column = start + SPEED * time * step
            frame[row : row + DIGIT, column : column + DIGIT, 0] = scan
    return videos, prompts


def judge(videos: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """Measures how well videos follow their prompts.

    Args:
        videos: uint8 [N, FRAMES, SIZE, SIZE, 1].
        prompts: int [N], rows of `PROMPTS`.

    Returns:
        digit: share of videos with the requested digit. The frames are moved back along the
            requested motion and averaged; the digit is the class of the nearest training scan, by
            the mean square of pixels.
        motion: share of videos with the requested motion: the one for which the frames, moved back,
            differ least.
        flicker: variance between the frames, moved back along the requested motion, over the mean
            square of their average; the median over videos.
    """
    wanted_digit, wanted_motion = np.divmod(prompts, len(MOTIONS))
    rows = np.arange(len(videos))
    aligned = np.stack([_moved_back(videos[..., 0], step) for step in STEPS], axis=1)
    shared, changes = aligned.mean(2), aligned.var(2).mean((2, 3))  # [N, motions, ...]
    shared = shared[rows, wanted_motion]
    flicker = changes[rows, wanted_motion] / (np.square(shared).mean((1, 2)) + 1e-6)
    return {
        "digit": float(np.mean(_nearest_digit(shared) == wanted_digit)),
        "motion": float(np.mean(changes.argmin(1) == wanted_motion)),
        "flicker": float(np.median(flicker)),
    }


def _moved_back(videos, step):
    """Frames moved back along a motion: float32 [N, FRAMES, SIZE, SIZE]; its digit stands still."""
    shifts = -SPEED * np.arange(FRAMES)[:, None] * step
    still = [np.roll(videos[:, i], shift, (1, 2)) for i, shift in enumerate(shifts)]
    return np.stack(still, axis=1).astype(np.float32)


def _nearest_digit(frames):
    """The class of the training scan nearest to each frame, both centred."""
    scans, labels = small_scans("train", DIGIT)
    known, given = (_centred(x).reshape(len(x), -1) for x in (scans, frames))
    return labels[(np.square(known).sum(1) - 2 * given @ known.T).argmin(1)]


def _centred(frames):
    """[N, S, S] -> float32 [N, SIZE, SIZE], the centre of mass of the ink in the middle."""
    size, half = frames.shape[-1], SIZE // 2
    padded = np.pad(frames.astype(np.float32), ((0, 0), (half, half), (half, half)))
    total = frames.sum((1, 2), np.float32) + 1e-6
    corners = [np.round(frames.sum(axis) @ np.arange(size) / total) for axis in (2, 1)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE), (1, 2))
    return windows[np.arange(len(frames)), *np.int32(corners)]


def encode(videos: np.ndarray) -> np.ndarray:
    """Latents of videos, uint8 [..., H, W, 1]: float32 [..., H / FOLD, W / FOLD, FOLD^2]."""
    return fold(videos, FOLD, MEAN, STD)


def decode(latents: np.ndarray) -> np.ndarray:
    """The inverse of `encode`: uint8 [..., H, W, 1]."""
    return unfold(latents, FOLD, MEAN, STD)


@dataclasses.dataclass(frozen=True)
class MovingDigits(Prompts):
    """Folded videos and embedded captions; a class that configs name.

    Attributes:
        embeddings, latents: directories, written at the first use.
        num: number of videos.
        seed: for the choice of scans and starting points.

    Raises:
        ValueError: there is no video or no directory for them, the seed is negative, or the shape
            is not that of these videos.
    """

    embeddings: str = "~/.cache/dmd_jax/moving_digits/embeddings"
    sample_shape: tuple[int, ...] = (FRAMES, SIZE // FOLD, SIZE // FOLD, FOLD**2)
    latents: str | None = "~/.cache/dmd_jax/moving_digits/latents"
    num: int = 8_000
    seed: int = 0

    name = "moving digits"

    def __post_init__(self) -> None:
        if self.num < 1 or self.seed < 0 or self.latents is None:
            raise ValueError(
                f"num={self.num} must be 1 or more, seed={self.seed} 0 or more, and "
                f"latents={self.latents!r} a directory"
            )
        if tuple(self.sample_shape) != MovingDigits.sample_shape:
            raise ValueError(
                f"sample_shape={self.sample_shape}: these videos are {MovingDigits.sample_shape}"
            )

    def open(self) -> None:
        """Writes missing files and opens them. Raises as `Prompts.open`."""
        embeddings.write(
            self._embeddings_path,
            PROMPTS,
            "",
            word_vectors.embed,
            TEXT_LENGTH,
            word_vectors.DIM,
            source=__name__,
        )
        latents.write(
            self._latents_path,
            zip(*moving_digits(self.num, self.seed), strict=True),
            encode,
            self.sample_shape,
            source=[__name__, self.num, self.seed],
        )
        super().open()

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of a new network's config that follow from the data."""
        channels = self.sample_shape[-1]
        return dict(in_channels=channels, out_channels=channels, text_dim=word_vectors.DIM)

    @property
    def notes(self) -> dict[str, Any]:
        """Entries for the header of an exported network."""
        return super().notes | {"data": "moving_digits"}

    measures: ClassVar = {
        "digit": "share of videos that show the requested digit",
        "motion": "share with the requested motion",
        "flicker": "variance between frames, motion removed, over the mean square of pixels",
    }

    def measure(self, x0: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
        """`judge` of latents [N, F, H, W, C]."""
        return judge(decode(x0), prompts)

    def floor(self, num: int) -> dict[str, float]:
        """The same numbers of videos of test scans."""
        return judge(*moving_digits(num, self.seed, "test"))

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Latents [N, F, H, W, C] as bytes, frames side by side."""
        return side_by_side(decode(x0))
