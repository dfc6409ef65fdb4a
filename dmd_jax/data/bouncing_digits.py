"""Bouncing digits: videos whose future is random, to train and to judge causal students.

A digit of `mnist5k` crosses a box of 3 x 3 places, one place at each move. At a wall it takes a new
direction, any of the eight that does not lead into the wall: a causal model must invent what a
bidirectional one can look up. The videos are computed, frame by frame and for any length, as they
are read; nothing is stored. Latents are folded pixels, and words have fixed vectors: neither a VAE
nor a language model is needed. A place is one token of a Wan network. The walls are drawn, for
such a network has no other means to know where a token is: it turns by relative positions alone.

Imports numpy, Pillow and the files of this room that make toy videos.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dmd_jax.data import word_vectors
from dmd_jax.data.pixels import fold, unfold
from dmd_jax.data.prompts import TextVideos, side_by_side
from dmd_jax.data.scans import DIGITS, INK, small_scans

FRAMES = 12
DIGIT, PLACE, SIZE, FOLD = 10, 12, 36, 6  # sides in pixels: a digit, its place, the box, a fold
WALL = 200  # grey of the outermost pixels
MEAN, STD = -0.78, 0.5  # of the pixels, rounded
TEXT_LENGTH = 3
SPEEDS = {"slowly": 0.25, "fast": 0.5}  # moves per frame
PROMPTS = tuple(f"{digit} bounces {speed}" for digit in DIGITS for speed in SPEEDS)
INSIDE = np.pad(np.ones((SIZE - 2, SIZE - 2), bool), 1)  # pixels that are no wall
SHAPE = (SIZE // FOLD, SIZE // FOLD, FOLD**2)  # of a latent frame


def video(prompt: int, seed: Sequence[int], frames: int = FRAMES, split: str = "train"):
    """One video.

    Args:
        prompt: row of `PROMPTS`.
        seed: of scan, start and directions; integers.
        frames: length; the beginning of a longer video is the shorter one.
        split: of the scans, "train" or "test".

    Returns:
        uint8 [frames, SIZE, SIZE, 1].
    """
    rng = np.random.default_rng(seed)
    scans, labels = small_scans(split, DIGIT)
    digit, speed = divmod(prompt, len(SPEEDS))
    scan = scans[rng.choice(np.flatnonzero(labels == digit))]
    out = np.where(INSIDE, 0, WALL).astype(np.uint8)[None, ..., None].repeat(frames, 0)
    for frame, (row, column) in zip(out, path(rng, [*SPEEDS.values()][speed], frames), strict=True):
        frame[row : row + DIGIT, column : column + DIGIT, 0] = scan
    return out


def path(rng: np.random.Generator, speed: float, frames: int) -> np.ndarray:
    """Corners of the digit in pixels, int [frames, 2]: rows and columns.

    Args:
        rng: of the start and the directions.
        speed: moves per frame, such as 1/4 for one in every fourth frame.
        frames: length of the path.
    """
    room = SIZE // PLACE - 1
    place, direction = rng.integers(0, room + 1, 2), np.zeros(2, int)
    places = []
    for frame in range(frames):
        places.append(place)
        if (frame + 1) * speed % 1:
            continue
        wall = (place == 0) * 1 - (place == room)  # the way back from the walls that it touches
        if not direction.any() or (direction * wall < 0).any():
            direction = _direction(rng, wall)
        place = place + direction
    return np.stack(places) * PLACE + (PLACE - DIGIT) // 2


def _direction(rng, away):
    """One of the eight directions at random; along each axis, none that goes against `away`."""
    while True:
        direction = rng.integers(-1, 2, 2)
        if direction.any() and (direction * away >= 0).all():
            return direction


def inside(videos: np.ndarray) -> np.ndarray:
    """Videos [..., H, W, 1] with black walls."""
    return videos * INSIDE[..., None]


def centre(frames: np.ndarray) -> np.ndarray:
    """Centres of mass of the ink in pixels, float [..., 2], of frames [..., H, W]."""
    ink = frames.astype(np.float64) + 1e-6  # the middle of a black frame
    total = ink.sum((-2, -1))
    rows, columns = (ink.sum(axis) @ np.arange(ink.shape[-1]) / total for axis in (-1, -2))
    return np.stack([rows, columns], -1)


def encode(videos: np.ndarray) -> np.ndarray:
    """Latents of videos, uint8 [..., H, W, 1]: float32 [..., H / FOLD, W / FOLD, FOLD^2]."""
    return fold(videos, FOLD, MEAN, STD)


def decode(latents: np.ndarray) -> np.ndarray:
    """The inverse of `encode`: uint8 [..., H, W, 1]."""
    return unfold(latents, FOLD, MEAN, STD)


@dataclasses.dataclass(frozen=True)
class BouncingDigits(TextVideos):
    """Folded videos and their captions, computed as they are read; a class that configs name.

    Attributes:
        frames: of a video.
        num: number of videos.
        seed: for the choice of scans, starts and directions.

    Raises:
        ValueError: there is no frame or no video, or the seed is negative.
    """

    frames: int = FRAMES
    num: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.frames, self.num) < 1 or self.seed < 0:
            raise ValueError(
                f"frames={self.frames} and num={self.num} must be 1 or more, seed={self.seed} 0 or "
                "more"
            )

    name = "bouncing digits"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of the latents."""
        return (self.frames, *SHAPE)

    @functools.cached_property
    def _texts(self):
        return word_vectors.WordVectors(PROMPTS, TEXT_LENGTH)

    def open(self) -> None:
        """Embeds the prompts. Nothing is stored, so nothing can be missing."""
        self._texts  # noqa: B018

    def __len__(self) -> int:
        return self.num

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of a new network's config that follow from the data."""
        return dict(in_channels=SHAPE[-1], out_channels=SHAPE[-1], text_dim=word_vectors.DIM)

    @property
    def notes(self) -> dict[str, Any]:
        """Entries for the header of an exported network."""
        return super().notes | {"data": "bouncing_digits"}

    def examples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """{"data": float32 [n, F, H, W, C], "cond", "uncond"}; the prompts take turns."""
        videos = [video(row % len(PROMPTS), (self.seed, row), self.frames) for row in rows]
        return {"data": encode(np.stack(videos)), **self.conditions(rows)}

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """`examples` without "data"."""
        return super().conditions(np.asarray(rows) % len(PROMPTS))

    # What follows is for reports (`quality.drift`).

    def asked(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What prompts ask for: (digits int [n], speeds in pixels per frame [n])."""
        digits, speeds = np.divmod(np.asarray(rows), len(SPEEDS))
        return digits, PLACE * np.array([*SPEEDS.values()])[speeds]

    def real(self, rows: Sequence[int], frames: int) -> np.ndarray:
        """Videos of test scans, to compare with: uint8 [n, frames, SIZE, SIZE, 1]."""
        seeds = [(self.seed, i, 1) for i in range(len(rows))]
        return np.stack(
            [video(row, seed, frames, "test") for row, seed in zip(rows, seeds, strict=True)]
        )

    def decode(self, x0: np.ndarray) -> np.ndarray:
        """Videos of latents: uint8 [N, F, SIZE, SIZE, 1]."""
        return decode(x0)

    def digits(self, videos: np.ndarray) -> np.ndarray:
        """The digit of every frame as a scan of `mnist5k`: uint8 [N, F, 28, 28, 1]."""
        side = round(28 * DIGIT / INK)
        frames = inside(videos).reshape(-1, SIZE, SIZE)
        padded = np.pad(frames, ((0, 0), (side, side), (side, side)))
        corners = np.rint(centre(frames)).astype(int) + side - side // 2
        scans = [
            Image.fromarray(frame[row : row + side, column : column + side]).resize((28, 28))
            for frame, (row, column) in zip(padded, corners, strict=True)
        ]
        return np.stack(scans).reshape(*videos.shape[:2], 28, 28, 1)

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Latents [N, F, H, W, C] as bytes, frames side by side."""
        return side_by_side(decode(x0))
