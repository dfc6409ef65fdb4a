"""Prompts: read from a file or a folder of captions, and embedded in batches."""

from pathlib import Path

import numpy as np

from dmd_jax.pipelines import clips, text

# Rows are cut to a multiple of so many tokens: few shapes to compile, little padding to compute.
STEP = 64


def read_prompts(path):
    """The prompts of a text file, one a line; or the captions of a folder of videos, each once.

    Raises:
        FileNotFoundError: there is no such file, or no video in the folder.
        ValueError: it holds no prompt, or is not UTF-8; or a video has no caption.
    """
    if Path(path).expanduser().is_dir():
        return list(dict.fromkeys(caption for _, caption in clips.captioned(path)))
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of prompts at {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    return prompts


def embed(net, tokenizer, batch, prompts):
    """Embeddings of n prompts, `batch` in a call of the network: n arrays float32 [tokens, D]."""
    ids, mask = tokenizer(prompts)
    made = []
    for start in range(0, len(prompts), batch):
        index = np.arange(start, start + batch) % len(prompts)  # one batch size to compile
        longest = mask[index].sum(axis=1).max()
        columns = slice(-(-longest // STEP) * STEP)
        rows = np.asarray(text.encode(net, ids[index, columns], mask[index, columns]))
        made += [row[: mask[i].sum()] for i, row in zip(index, rows, strict=True)]
    return made[: len(prompts)]
