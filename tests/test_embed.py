"""The program that embeds prompts: what it writes, batches, resumption, refusals."""

import sys

import jax
import numpy as np
import pytest
from flax import nnx

from dmd_jax import embed, weights
from dmd_jax.data.embeddings import Embeddings
from dmd_jax.models import umt5
from dmd_jax.models.umt5 import UMT5
from dmd_jax.pipelines import precompute, text
from dmd_jax.pipelines import prompts as room
from dmd_jax.pipelines.text import Tokenizer

pytest.importorskip("ftfy")
pytestmark = pytest.mark.wan
PROMPTS = ["a cat", "two dogs &amp; a ball", "the sea at night", "rain " * 70, "a", "a red fox"]
NEGATIVE = "blurred, dull"


@pytest.fixture(scope="module")
def net():
    return UMT5(umt5.TINY, rngs=nnx.Rngs(0))


@pytest.fixture
def encoder(monkeypatch, net):
    """The text encoder of any checkpoint is a tiny one; what it was loaded by."""
    asked = []

    def load(path, dtype=None, *, part=None):
        asked.append((path, dtype, part))
        return jax.tree.map(lambda x: x.astype(dtype), net)

    monkeypatch.setattr(weights, "load", load)
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint's folder with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", *sorted({w for p in PROMPTS for w in text.clean(p).split()})]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("checkpoint")
    (path / "tokenizer").mkdir()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS[:3], "  ", *PROMPTS[3:]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def program(call, prompts, folder, tmp_path):
    """`call` of `python -m dmd_jax.embed`, with the usual flags where none are given."""
    usual = dict(prompts=prompts, checkpoint=folder, out=tmp_path / "out", length=96)

    def program(**given):
        return call(embed, *(f"--{name}={value}" for name, value in (usual | given).items()))

    return program


def test_program_embeds_every_prompt_and_the_negative_one(
    program, encoder, folder, net, tmp_path, capsys
):
    assert program(negative=NEGATIVE, batch=4) is None
    assert encoder == [(str(folder), "bfloat16", "text_encoder")]
    assert "6 prompts and the negative one, [96, 64] each" in capsys.readouterr().out
    result = Embeddings(tmp_path / "out")
    assert result.prompts == [prompt.strip() for prompt in PROMPTS] and result.shape == (96, 64)
    ids, mask = Tokenizer(folder, 96)([*PROMPTS, NEGATIVE])
    half = jax.tree.map(lambda x: x.astype("bfloat16"), net)
    wanted = np.asarray(text.encode(half, ids, mask))
    found = np.stack([*result.rows(range(6)), result.negative]).astype(np.float32)
    # Stored in bfloat16, which rounds by 2^-9.
    np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-4)
    assert not found[~mask].any() and found[mask].any(axis=1).all()


def test_a_prompt_is_a_line_whatever_else_it_holds(tmp_path):
    """Windows' mark of UTF-8 is no part of it; a separator of paragraphs is none of prompts."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\nw\u00e4ves\u2028at \u0085 night\r\n".encode())
    assert room.read_prompts(path) == ["a cat", "w\u00e4ves\u2028at \u0085 night"]


def test_the_size_of_a_batch_changes_nothing(net, folder):
    tokenizer = Tokenizer(folder, 96)
    whole = room.embed(net, tokenizer, 6, PROMPTS)
    assert [len(tokens) for tokens in whole] == tokenizer(PROMPTS)[1].sum(axis=1).tolist()
    for batch in (1, 4, 50):
        for a, b in zip(room.embed(net, tokenizer, batch, PROMPTS), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_second_start_embeds_nothing_and_an_interrupted_one_goes_on(
    program, encoder, monkeypatch, tmp_path
):
    asked = []

    def spy(net, tokenizer, batch, prompts):
        asked.append(prompts)
        return [np.ones((1, 64))] * len(prompts)

    assert program() is None
    monkeypatch.setattr(precompute, "embed", spy)
    assert program() is None and not asked
    (tmp_path / "out" / "00000.npy").unlink()
    assert program() is None
    assert asked == [[*(prompt.strip() for prompt in PROMPTS), ""]]


def test_the_embeddings_of_another_encoder_are_not_continued(program, encoder, monkeypatch):
    assert program() is None
    other = UMT5(umt5.TINY, rngs=nnx.Rngs(1))
    monkeypatch.setattr(weights, "load", lambda *_, **__: other)
    output = program()
    assert output.startswith("error: ") and "holds embeddings with source 'text encoder" in output


def test_the_tokenizer_may_be_elsewhere(program, encoder, folder, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "no tokenizer at" in program(checkpoint=tmp_path / "bare")
    assert program(checkpoint=tmp_path / "bare", tokenizer=folder) is None


def test_refusals_come_before_the_checkpoint_is_read(program, encoder, monkeypatch, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    for given, complaint in (
        (dict(prompts=tmp_path / "none.txt"), "no file of prompts at"),
        (dict(prompts=tmp_path / "empty.txt"), "holds no prompt"),
        (dict(prompts=tmp_path / "latin.txt"), "not a text file in UTF-8"),
        (dict(checkpoint=tmp_path / "nowhere"), "there is no file or folder at"),
        (dict(out=tmp_path / "empty.txt" / "out"), "cannot be written to"),
    ):
        output = program(**given)
        assert output.startswith("error: ") and complaint in output
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert "prompts need ftfy: pip install" in program()
    assert not encoder


def test_what_the_loader_refuses_is_said(program, monkeypatch):
    def load(*_, **__):
        raise FileNotFoundError("no text encoder there")

    monkeypatch.setattr(weights, "load", load)
    assert program() == "error: no text encoder there"
