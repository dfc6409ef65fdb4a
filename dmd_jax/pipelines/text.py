"""Prompts to token ids, and those to embeddings, as in the training of the Wan networks.

A prompt is cleaned, cut to 512 tokens including the end of the sentence, and embedded; embeddings
of padding are zero. Imports jax and numpy, and libraries of tokenizers when they are needed.
"""

import html
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.devices.disk import local_path

END = "</s>"
# Names of tokenizer files, and folders of a checkpoint that may have one: its root, the folder of
# diffusers, that of the Wan repository, and diffusers' from the text encoder's folder.
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
FOLDERS = ("", "tokenizer", "google/umt5-xxl", "../tokenizer")


def clean(prompt):
    """Cleans a prompt as for the Wan networks: repairs encodings, HTML entities and spaces.

    Raises:
        ImportError: ftfy is not installed.
    """
    fixed = _library("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()


class Tokenizer:
    """Token ids of prompts: `tokenizer(prompts)`.

    Attributes:
        path: the file of the tokenizer.
        length: tokens of every row.
    """

    def __init__(self, path, length=512):
        """Reads the tokenizer of a checkpoint.

        Args:
            path: tokenizer.json, spiece.model or tokenizer.model; or a checkpoint: a folder, where
                `tokenizer` and `google/umt5-xxl` are searched too, or a file in such a folder.
            length: tokens of every row, including the end of the sentence.

        Raises:
            FileNotFoundError: there is no tokenizer.
            ValueError: it is damaged, has no token for the end of a sentence, or length is below 1.
            ImportError: the library that reads it is not installed.
        """
        if length < 1:
            raise ValueError(f"length={length} must be 1 or more")
        _library("ftfy")  # of `clean`: fails here, before a large text encoder is read
        self.path, self.length = find(path), length
        read = _read_json if self.path.suffix == ".json" else _read_sentencepiece
        self._ids, self._end = read(self.path)

    def __call__(self, prompts):
        """Cleans and tokenizes N prompts.

        Args:
            prompts: a list of N strings.

        Returns:
            (ids int32 [N, length], mask bool [N, length]): tokens, </s>, then zeros where the mask
            is false.
        """
        ids = np.zeros((len(prompts), self.length), np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for i, prompt in enumerate(prompts):
            tokens = [*self._ids(clean(prompt))[: self.length - 1], self._end]
            ids[i, : len(tokens)], lengths[i] = tokens, len(tokens)
        return ids, np.arange(self.length) < lengths[:, None]


def find(path):
    """The file of the tokenizer at `path`: see `Tokenizer`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    local = local_path(path)
    if local.is_file() and local.suffix in (".json", ".model"):
        return local
    folder = local.parent if local.is_file() else local
    for candidate in (folder / name / file for name in FOLDERS for file in FILES):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no tokenizer at {str(path)!r}: it must be one of {', '.join(FILES)}, or a folder with "
        "one of them, or with one in its 'tokenizer' or 'google/umt5-xxl'"
    )


@jax.jit
def _embed(net, ids, mask):
    return jnp.where(mask[..., None], net(ids, mask), 0)


def encode(net, ids, mask):
    """The embeddings of tokens, zero where the mask is false.

    Args:
        net: a UMT5, or another callable of ids and mask.
        ids, mask: int32 and bool [N, L], of a `Tokenizer`.

    Returns:
        float32 [N, L, D].

    Raises:
        ValueError: an id is beyond the vocabulary of the network.
    """
    if (largest := int(np.max(ids))) >= net.config.vocab:
        raise ValueError(
            f"token {largest} is beyond the {net.config.vocab} tokens of the text encoder: the "
            "tokenizer is another checkpoint's"
        )
    return _embed(net, ids, mask)


def _read_json(path):
    """(text -> ids, id of the end) of a tokenizer.json."""
    library = _library("tokenizers")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} is damaged or not a tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"{path} has no token {END}: it is not of a T5 encoder")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end


def _read_sentencepiece(path):
    """The same of a model of SentencePiece."""
    library = _library("sentencepiece")
    try:
        model = library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not of SentencePiece ({error})") from None
    if model.eos_id() < 0:
        raise ValueError(f"{path} has no end of a sentence: it is not of a T5 encoder")
    return model.encode, model.eos_id()


def _library(name):
    """An optional library."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"prompts need {name}: pip install 'dmd_jax[wan]'") from error
