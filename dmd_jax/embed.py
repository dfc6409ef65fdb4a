"""Embeds prompts once, so that training and sampling hold no text encoder.

    python -m dmd_jax.embed --prompts=prompts.txt --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --out=prompts

With a folder of videos as --prompts, their captions are embedded: see `dmd_jax.encode`. What it
makes is read by `dmd_jax.data.embeddings.Embeddings`. Started again after an interruption, it goes
on where it was. Imports the rooms below.
"""

import functools
import hashlib
import logging
import sys
from pathlib import Path

import absl.logging
import numpy as np
from absl import app, flags

from dmd_jax import checkpoint, text, weights
from dmd_jax.data import clips, embeddings
from dmd_jax.paths import named_leaves
from dmd_jax.weights import files

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


def identity(net, beside=b""):
    """What tells networks apart: a digest of a row of every weight, and of what is beside them."""
    digest = hashlib.sha256(beside)
    for name, leaf in named_leaves(net).items():
        row = np.asarray(leaf[..., -1, :] if leaf.ndim > 1 else leaf)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + row.tobytes())
    return digest.hexdigest()[:16]


FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string(
        "prompts", None, "A text file, one prompt a line; or a folder of videos with captions."
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A Wan checkpoint or its text encoder: a folder, a file, a name on the Hugging Face hub.",
    )
    flags.DEFINE_string("out", None, "The folder of the embeddings.")
    flags.DEFINE_string(
        "tokenizer",
        None,
        "The tokenizer, or another checkpoint that has it, where --checkpoint does not.",
    )
    flags.DEFINE_string(
        "negative", "", "The negative prompt. Wan's teachers expect the one of their model card."
    )
    flags.DEFINE_integer("batch", 8, "Prompts in one call of the text encoder.", lower_bound=1)
    flags.DEFINE_integer(
        "length", 512, "Tokens of an embedding, zeros behind the prompt's end.", lower_bound=1
    )
    flags.mark_flags_as_required(["prompts", "checkpoint", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger("dmd_jax").setLevel(logging.INFO)
    try:
        prompts, out = read_prompts(FLAGS.prompts), Path(FLAGS.out).expanduser()
        checkpoint.check_writable(out)
        found = files.companion(FLAGS.tokenizer or FLAGS.checkpoint, text.FOLDERS[1:])
        tokenizer = text.Tokenizer(found, FLAGS.length)
        net = weights.load(FLAGS.checkpoint, dtype="bfloat16", part="text_encoder")
        embeddings.write(
            out,
            prompts,
            FLAGS.negative,
            functools.partial(embed, net, tokenizer, FLAGS.batch),
            FLAGS.length,
            net.config.dim,
            source=f"text encoder {identity(net, tokenizer.path.read_bytes())}",
        )
        made = embeddings.Embeddings(out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(made)} prompts and the negative one, {list(made.shape)} each: {out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
