"""Prompts, read from a file or a folder of captions, and embedded in batches.

Imports `clips` and `text`.
"""

import re
from os import PathLike
from typing import NamedTuple

import numpy as np

from dmd_jax.devices.disk import local_path
from dmd_jax.pipelines import clips, text

# Rows are cut to a multiple of this many tokens: few shapes to compile, little padding.
STEP = 64


def read_prompts(path):
    """The prompts of a text file, one a line; or the captions of a folder of videos, each once.

    Raises:
        FileNotFoundError: there is no such file, or no video in the folder.
        ValueError: it holds no prompt, or is not UTF-8; or a video has no caption.
    """
    if local_path(path).is_dir():
        return list(dict.fromkeys(caption for _, caption in clips.captioned(path)))
    try:
        lines = local_path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of prompts at {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    return prompts


class Scene(NamedTuple):
    """One video to make: prompts and the frames from which on they hold, the first from 0."""

    starts: tuple[int, ...]
    prompts: tuple[str, ...]


def read_scenes(path: str | PathLike) -> list[Scene]:
    """The videos of a text file of prompts, one a line.

        a slow three
        120: a fast seven
        waves at night

    A line that begins with a frame number, a colon and a space changes the prompt of the video of
    the lines before it, from the first block on that begins at that frame or later. Any other line
    begins another video.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; or the first line of a video has a
            number, or the numbers of a video do not rise.
    """
    scenes: list[Scene] = []
    for line in read_prompts(path):
        number, prompt = re.fullmatch(r"(?:(\d+):\s+)?(.+)", line).groups()
        if number is None:
            scenes.append(Scene((0,), (prompt,)))
            continue
        if not scenes or int(number) <= scenes[-1].starts[-1]:
            raise ValueError(
                f"{path}: {line[:60]!r} changes the prompt of a video from a frame on: put it "
                "below the video's first line, which has no number, in the order of the numbers"
            )
        starts, prompts = scenes[-1]
        scenes[-1] = Scene((*starts, int(number)), (*prompts, prompt))
    return scenes


def embed(net, tokenizer, batch, prompts):
    """Embeds n prompts, `batch` in each call of the network: n arrays float32 [tokens, D]."""
    ids, mask = tokenizer(prompts)
    result = []
    for start in range(0, len(prompts), batch):
        index = np.arange(start, start + batch) % len(prompts)  # one batch size to compile
        longest = mask[index].sum(axis=1).max()
        columns = slice(-(-longest // STEP) * STEP)
        rows = np.asarray(text.encode(net, ids[index, columns], mask[index, columns]))
        result += [row[: mask[i].sum()] for i, row in zip(index, rows, strict=True)]
    return result[: len(prompts)]
