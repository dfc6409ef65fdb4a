"""Prompts: cleaning, tokens as other programs make them, the zero tail, refusals."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from dmd_jax.models import umt5
from dmd_jax.models.umt5 import UMT5
from dmd_jax.pipelines import text
from dmd_jax.pipelines.text import Tokenizer, clean, encode

pytest.importorskip("ftfy")
pytestmark = pytest.mark.wan
CORPUS = [
    "a cat and a dog play with a ball in the rain",
    "the red fox jumps over the lazy dog, slowly",
    "Two robots dance; the camera moves around them.",
    "一只猫在雨中玩球",
    "a slow shot of the sea at night, 4k, film grain",
]
PROMPTS = [*CORPUS, "", "a", "unseen Ω words &amp; spaces   here", "the sea " * 40]
SPECIAL = ["<pad>", "</s>", "<unk>"]


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A tokenizer.json of a small unigram model; it has settings of its own for padding."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        tokenizers.trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7, pad_id=2)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def piece_file(tmp_path_factory):
    """A spiece.model of a small unigram model, with T5's numbers for its special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("pieces") / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=90,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return path


@pytest.fixture(params=["json_file", "piece_file"])
def file(request):
    """Either of the two."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "dirty, wanted",
    [
        ("a cat", "a cat"),
        ("  a\tcat \n\n sits  ", "a cat sits"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs &amp;lt;3", "cats & dogs <3"),
        ("schÃ¶n", "schön"),
        ("âœ” done", "✔ done"),
        ("it\u2019s", "it's"),
        ("a\u3000cat\u00a0sits", "a cat sits"),
        ("&nbsp;a", "a"),
        ("一只猫，在雨中", "一只猫,在雨中"),
    ],
)
def test_prompts_are_cleaned(dirty, wanted):
    assert clean(dirty) == wanted


@pytest.mark.parametrize("length", [1, 4, 16, 512])
def test_tokens_are_those_of_the_library(json_file, length):
    """Its own truncation, padding and template, set as T5's tokenizers are."""
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_file(str(json_file))
    theirs.enable_truncation(length)
    theirs.enable_padding(length=length, pad_id=0)
    wanted = theirs.encode_batch([clean(prompt) for prompt in PROMPTS])
    ids, mask = Tokenizer(json_file, length)(PROMPTS)
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(ids, [row.ids for row in wanted])
    np.testing.assert_array_equal(mask, [row.attention_mask for row in wanted])


def test_pieces_are_those_of_the_library(piece_file):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(piece_file))
    ids, mask = Tokenizer(piece_file, 64)(PROMPTS)
    for prompt, row, kept in zip(PROMPTS, ids, mask, strict=True):
        wanted = [*theirs.encode(clean(prompt))[:63], 1]
        assert row[kept].tolist() == wanted and not row[~kept].any()


@pytest.mark.torch
@pytest.mark.parametrize("length", [4, 64])
def test_tokens_are_those_of_transformers(json_file, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(json_file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wanted = theirs(
        [clean(prompt) for prompt in PROMPTS],
        padding="max_length",
        truncation=True,
        max_length=length,
        add_special_tokens=True,
    )
    ids, mask = Tokenizer(json_file, length)(PROMPTS)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])


@pytest.mark.torch
def test_both_kinds_of_file_give_the_tokens_of_t5_s_tokenizer(piece_file, tmp_path):
    """transformers reads the model of SentencePiece and writes it as a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "pieces"
    folder.mkdir()
    shutil.copy(piece_file, folder / "spiece.model")
    theirs = transformers.T5TokenizerFast.from_pretrained(str(folder), extra_ids=0)
    theirs.save_pretrained(tmp_path / "json")
    prompts = [prompt for prompt in PROMPTS if prompt]
    wanted = theirs(
        [clean(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=40,
    )
    for path in (folder, tmp_path / "json"):
        ids, mask = Tokenizer(path, 40)(prompts)
        np.testing.assert_array_equal(ids, wanted["input_ids"])
        np.testing.assert_array_equal(mask, wanted["attention_mask"])


@pytest.mark.parametrize("folder", text.FOLDERS)
def test_a_tokenizer_is_found_in_a_checkpoint(file, folder, tmp_path):
    root = tmp_path / "checkpoint"
    root.mkdir()
    (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(file, root / folder)
    found = Tokenizer(root)
    assert found.path == root / folder / file.name and found.length == 512
    np.testing.assert_array_equal(found(PROMPTS)[0], Tokenizer(file)(PROMPTS)[0])


def test_a_tokenizer_is_found_beside_the_text_encoder(json_file, tmp_path):
    for place in ("diffusers/tokenizer", "wan/google/umt5-xxl", "diffusers/text_encoder"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "wan" / "models_t5.pth").touch()
    shutil.copy(json_file, tmp_path / "diffusers" / "tokenizer")
    shutil.copy(json_file, tmp_path / "wan" / "google" / "umt5-xxl")
    for path in ("diffusers/text_encoder", "wan/models_t5.pth"):
        assert text.find(tmp_path / path).name == "tokenizer.json"


def test_every_prompt_ends_with_the_end(file):
    ids, mask = Tokenizer(file, 20)(PROMPTS)
    last = mask.sum(axis=1) - 1
    assert (ids[np.arange(len(ids)), last] == 1).all() and last.max() == 19
    assert Tokenizer(file)([])[0].shape == (0, 512)


def test_the_tail_is_zero_and_the_rest_is_the_network_s(file):
    net = UMT5(umt5.TINY, rngs=nnx.Rngs(0))
    ids, mask = Tokenizer(file, 24)(PROMPTS)
    result = np.asarray(encode(net, ids, mask))
    assert result.dtype == np.float32 and result.shape == (*ids.shape, umt5.TINY.dim)
    assert not mask.all() and not result[~mask].any()
    wanted = np.asarray(jax.jit(lambda *given: net(*given))(ids, mask))
    np.testing.assert_allclose(result[mask], wanted[mask], rtol=1e-5, atol=1e-5)


def test_a_tokenizer_of_another_network_is_refused():
    net = UMT5(umt5.TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="token 512 is beyond the 512"):
        encode(net, np.full((1, 3), 512), np.ones((1, 3), bool))


def test_what_is_no_tokenizer_is_refused(json_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*spiece\.model"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="length=0"):
        Tokenizer(json_file, 0)
    for name, damaged in (("tokenizer.json", "{"), ("spiece.model", "{")):
        (tmp_path / name).write_text(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            Tokenizer(tmp_path / name)
    settings = json.loads(json_file.read_text().replace("</s>", "<end>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no token </s>"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("library", ["ftfy", "tokenizers", "sentencepiece"])
def test_a_missing_library_is_named(library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "spiece.model").write_text("")
    use = {
        "ftfy": lambda: clean("a"),
        "tokenizers": lambda: Tokenizer(tmp_path),
        "sentencepiece": lambda: Tokenizer(tmp_path / "spiece.model"),
    }[library]
    with pytest.raises(ImportError, match=rf"{library}: pip install 'dmd_jax\[wan\]'"):
        use()
