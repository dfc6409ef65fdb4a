"""Fingerprints of checkpoints: what they depend on, and how little of a file they read."""

import hashlib
import json

import checkpoints
import jax
import numpy as np
import pytest

from dmd_jax import weights
from dmd_jax.devices.paths import named_leaves
from dmd_jax.weights import parts


def test_of_a_single_file_it_is_the_sha_256(teacher):
    wanted = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert weights.fingerprint(teacher) == wanted
    shipped = weights.find("mnist_teacher").read_bytes()
    assert weights.fingerprint("mnist_teacher") == hashlib.sha256(shipped).hexdigest()


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_of_a_folder_it_is_the_same_in_one_file_and_in_shards(tmp_path, layout):
    one = checkpoints.write_folder(tmp_path / "one", layout)
    shards = checkpoints.write_folder(tmp_path / "shards" / "transformer", layout, shards=3)
    assert weights.fingerprint(one) == weights.fingerprint(shards)
    assert weights.fingerprint(shards.parent) == weights.fingerprint(shards)


def test_of_a_folder_it_changes_with_a_weight_a_dtype_or_a_setting(tmp_path):
    found = {weights.fingerprint(checkpoints.write_folder(tmp_path / "a"))}
    found.add(weights.fingerprint(checkpoints.write_folder(tmp_path / "b", dtype=np.float32)))
    folder = checkpoints.write_folder(tmp_path / "c")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eps": 1e-5}))
    found.add(weights.fingerprint(folder))
    folder = checkpoints.write_folder(tmp_path / "d")
    with next(folder.glob("*.safetensors")).open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x12\x34")
    found.add(weights.fingerprint(folder))
    assert len(found) == 4


def test_of_a_pair_it_changes_with_either_network(tmp_path):
    parts = "transformer", "transformer_2"
    found = set()
    for name, dtypes in {"a": "ff", "b": "fe", "c": "ef"}.items():
        for part, dtype in zip(parts, dtypes, strict=True):
            checkpoints.write_folder(tmp_path / name / part, dtype=np.dtype(dtype))
        found.add(weights.fingerprint(tmp_path / name, parts))
    assert len(found) == 3
    alone = weights.fingerprint(tmp_path / "a")
    assert alone == weights.fingerprint(tmp_path / "a", ("transformer",) * 2) not in found


def test_of_a_model_on_the_hub_it_is_that_of_its_folder(tmp_path, monkeypatch):
    folder = checkpoints.write_folder(tmp_path / "snapshot" / "transformer")
    monkeypatch.setattr(parts, "_download", lambda name, patterns, checked: checked(folder.parent))
    assert weights.fingerprint("somebody/wan") == weights.fingerprint(folder)


def test_a_digest_reads_one_row_of_a_matrix():
    net = weights.build(weights.abstract("mnist_teacher").net.config)
    before = weights.digest(named_leaves(net).items())
    assert before == weights.digest(named_leaves(net).items())
    assert before != weights.digest(named_leaves(net).items(), b"tokenizer")
    first, last = (
        jax.tree.map(lambda x, row=row: x.at[..., row, :].add(1) if x.ndim > 1 else x, net)
        for row in (0, -1)
    )
    assert weights.digest(named_leaves(first).items()) == before
    assert weights.digest(named_leaves(last).items()) != before
