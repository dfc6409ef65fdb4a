"""Prompts as training data: stored text embeddings, and latents for methods that learn from videos.

Imports the stores of embeddings and latents, and their libraries.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dmd_jax.data.embeddings import Embeddings
from dmd_jax.data.latents import Latents
from dmd_jax.data.pixels import to_uint8

SHOWN = 6  # prompts of the samples to show


class TextVideos:
    """What all sources of videos and their prompts share. Implements `Source` with a subclass.

    A subclass has `name`, `sample_shape` (F, H, W, C), `open`, `examples`, `__len__` and `_texts`,
    the embedded prompts: an `Embeddings` or `WordVectors`, cached.
    """

    sample_shape: tuple[int, ...]

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of a new network's config that follow from the data: none."""
        return {}

    @property
    def notes(self) -> dict[str, Any]:
        """Entries for the header of an exported network."""
        return {"sample_shape": list(self.sample_shape)}

    def require_fit(self, what: str, model: Any) -> None:
        """Raises ValueError where the config of a network has other latents or text embeddings.

        Args:
            what: path of the network in the config, for the message.
            model: config of the network.
        """
        if not hasattr(model, "text_dim"):
            raise ValueError(
                f"{what} is a {type(model).__name__} network, which reads no text; {self.name!r} "
                f"holds prompts for latents {tuple(self.sample_shape)}"
            )
        if model.out_channels != self.sample_shape[-1]:
            raise ValueError(
                f"{what} makes latents of {model.out_channels} channels, but sample_shape is "
                f"{tuple(self.sample_shape)}"
            )
        if "_texts" in self.__dict__ and model.text_dim != self._texts.shape[-1]:
            raise ValueError(
                f"{what} reads texts of width {model.text_dim}, but {self.name!r} holds "
                f"{self._texts.shape[-1]}: embed the prompts with the encoder of that network"
            )

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """{"cond", "uncond"}, each [n, L, D], of the prompts at `rows`."""
        cond = self._texts.rows(rows)
        return {"cond": cond, "uncond": np.broadcast_to(self._texts.negative, cond.shape)}

    # What follows is for reports (`quality.evaluation`).

    measures: ClassVar[Mapping[str, str]] = {}  # a subclass that has some has `measure` and `floor`

    @property
    def columns(self) -> int:
        """Number of pictures in a row: the frames of a video fill it."""
        return 1

    def measured_conditions(self, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows of `num` prompts at even distances, their embeddings, the negative prompt's)."""
        count = len(self._texts)
        rows = np.linspace(0, count - 1, num).astype(int) if num < count else np.arange(num) % count
        cond = self._texts.rows(rows)
        return rows, cond, np.broadcast_to(self._texts.negative, cond.shape)

    def preview_conditions(self) -> tuple[np.ndarray, np.ndarray]:
        """(conditions, unconditional inputs) of the samples to show."""
        return self.measured_conditions(min(SHOWN, len(self._texts)))[1:]

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Latents float [N, F, H, W, C] as uint8 [N, H, F W, 3] pictures, frames side by side.

        Three channels stand for red, green and blue: enough for shapes and their motion. Pixels
        need the VAE, which `python -m dmd_jax.sample` runs on the exported student.
        """
        return side_by_side(to_uint8(x0[..., :3] / 2))


@dataclasses.dataclass(frozen=True)
class Prompts(TextVideos):
    """Text conditions from files; a class that configs name. Implements `Source`.

    Attributes:
        embeddings: directory that `python -m dmd_jax.embed` wrote.
        sample_shape: (F, H, W, C) of the latents of a generator.
        latents: directory that `python -m dmd_jax.encode` wrote, for methods that learn from data;
            None for the others.

    Raises:
        ValueError: `sample_shape` is no shape of a video.
    """

    embeddings: str
    sample_shape: tuple[int, ...]
    latents: str | None = None

    _store: ClassVar = Latents

    def __post_init__(self) -> None:
        if len(self.sample_shape) != 4 or min(self.sample_shape) < 1:
            raise ValueError(
                f"sample_shape={self.sample_shape} must be (F, H, W, C), each 1 or more"
            )

    def open(self) -> None:
        """Opens the files.

        Raises:
            FileNotFoundError, ValueError: they are missing, damaged, or do not fit together.
        """
        texts, latents = self._texts, self._latents
        if latents is None:
            return
        if latents.sample_shape != tuple(self.sample_shape):
            raise ValueError(
                f"{self.latents} holds latents {latents.sample_shape}, but sample_shape is "
                f"{tuple(self.sample_shape)}"
            )
        for row in (int(latents.prompt.min()), int(latents.prompt.max())):
            if not 0 <= row < len(texts):
                raise ValueError(
                    f"{self.latents} speaks of prompt {row}, but {self.embeddings} holds "
                    f"{len(texts)}: they do not go together"
                )

    @property
    def _embeddings_path(self) -> Path:
        return Path(self.embeddings).expanduser()

    @property
    def _latents_path(self) -> Path | None:
        return None if self.latents is None else Path(self.latents).expanduser()

    @functools.cached_property
    def _texts(self) -> Embeddings:
        return Embeddings(self._embeddings_path)

    @functools.cached_property
    def _latents(self) -> Latents | None:
        return None if self.latents is None else self._store(self._latents_path)

    def __len__(self) -> int:
        return len(self._texts if self._latents is None else self._latents)

    @property
    def name(self) -> str:
        """The name of the directory."""
        return Path(self.embeddings).name

    def examples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The part of a batch that n latents make.

        Returns:
            {"data": float32 [n, F, H, W, C], "cond": [n, L, D], "uncond": [n, L, D]}.

        Raises:
            ValueError: there are no latents.
        """
        if self._latents is None:
            raise ValueError(
                "this method learns from videos: give the directory of their latents, which "
                "`python -m dmd_jax.encode` makes, as config.data.latents"
            )
        return {"data": self._latents.rows(rows), **self.conditions(rows)}

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """`examples` without "data". Without latents, row i is prompt i."""
        if self._latents is not None:
            rows = self._latents.prompt[np.asarray(rows)]
        return super().conditions(rows)


def side_by_side(videos: np.ndarray) -> np.ndarray:
    """[N, F, H, W, C] -> [N, H, F W, C]."""
    count, frames, height, width, channels = videos.shape
    return videos.transpose(0, 2, 1, 3, 4).reshape(count, height, frames * width, channels)
