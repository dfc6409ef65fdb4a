"""Files of others: read lazily and exactly; what is damaged, unsafe or strange is refused."""

import json
import os
import pickle
import shutil
import sys
import zipfile

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmd_jax import weights
from dmd_jax.weights import files, pickles

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(4).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float16),
}


def write_torch(path, arrays=ARRAYS, *keys, prefix=""):
    """A file of torch, its tensors in nested dicts of these keys."""
    tree = {prefix + name: (name, x.shape, x.dtype) for name, x in arrays.items()}
    for key in reversed(keys):
        tree = {key: tree}
    pickles.write(path, tree, arrays.items())
    return path


def stored(path):
    """{name: array} of all that is at `path`."""
    tensors = files.open_tensors(path)
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_folder(tmp_path / "wan", shards=3)


# What is whole.


def test_safetensors_are_views_of_the_file(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors", {"note": "x"})
    tensors = files.open_tensors(tmp_path / "a.safetensors")
    assert (tensors.metadata, tensors.settings) == ({"note": "x"}, None)
    assert tensors.shapes == {name: x.shape for name, x in ARRAYS.items()}
    assert tensors.dtypes == {name: x.dtype for name, x in ARRAYS.items()}
    checkpoints.assert_same(stored(tmp_path / "a.safetensors"), ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        tensors.read("matrix")[0] = 1


@pytest.mark.parametrize(
    "keys", [(), ("generator",), ("model",), ("state_dict",), ("generator", "module")]
)
def test_files_of_torch_are_read_without_torch(tmp_path, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    path = write_torch(tmp_path / "a.pt", ARRAYS, *keys, prefix="model._fsdp_wrapped_module.")
    checkpoints.assert_same(stored(path), ARRAYS)


def test_of_two_generators_the_averaged_one_is_read(tmp_path):
    leaf = ((2,), np.dtype("float32"))
    tree = {"generator": {"w": ("now", *leaf)}, "generator_ema": {"w": ("mean", *leaf)}}
    arrays = {"now": np.zeros(2, np.float32), "mean": np.ones(2, np.float32)}
    pickles.write(tmp_path / "a.pt", tree, arrays.items())
    np.testing.assert_array_equal(stored(tmp_path / "a.pt")["w"], [1, 1])


@pytest.mark.torch
def test_what_torch_wrote(tmp_path):
    import torch

    x = torch.arange(12.0).reshape(3, 4)
    module = torch.nn.Linear(3, 2).bfloat16()
    tree = {
        "step": 1,
        "generator": {"turned": x.T, "part": x[1:, 2:], "same": x, **module.state_dict()},
    }
    torch.save(tree, tmp_path / "a.pt")
    found = stored(tmp_path / "a.pt")
    for name, tensor in tree["generator"].items():
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written_for_it(tmp_path, mmap):
    import torch

    path = write_torch(tmp_path / "a.pt", ARRAYS, "generator_ema")
    found = torch.load(path, weights_only=True, mmap=mmap)["generator_ema"]
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert str(found[name].dtype) == f"torch.{array.dtype}"
        np.testing.assert_array_equal(found[name].float(), array.astype(np.float32))


def test_settings_are_those_beside_a_file(folder):
    assert files.open_tensors(folder).settings["_class_name"] == "WanTransformer3DModel"
    path = write_torch(folder / "Wan2.1_VAE.pth")  # in Wan's repository another part's are beside
    assert files.open_tensors(path).settings is None


# What is damaged.


@pytest.mark.parametrize("size", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_that_was_cut_short(tmp_path, name, size):
    whole = tmp_path / name
    save_file(ARRAYS, whole) if name == "a.safetensors" else write_torch(whole)
    whole.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*fetch it again|{name} is damaged"):
        files.open_tensors(whole)


def test_how_much_is_missing_is_said(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-3])
    wanted = rf"it has {len(data) - 3} bytes, and its header says {len(data)}: it was cut short"
    with pytest.raises(ValueError, match=wanted):
        files.open_tensors(tmp_path / "a.safetensors")


def with_header(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe garbage",
        b"[1, 2]",
        {"w": {"dtype": "F32", "shape": [4]}},
        {"w": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
        {"w": 3},
    ],
)
def test_garbage_in_a_header(tmp_path, header):
    path = with_header(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or not safetensors"):
        files.open_tensors(path)


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 28\n")
    with pytest.raises(ValueError, match="run `git lfs pull`"):
        files.open_tensors(path)


def test_a_damaged_config_json(folder):
    (folder / "config.json").write_text('{"num_layers": 3')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        files.open_tensors(folder)


# What is not all there.


def test_an_index_that_names_an_absent_shard(folder):
    gone = "diffusion_pytorch_model-00002-of-00003.safetensors"
    (folder / gone).rename(folder / f"{gone}.incomplete")
    wanted = rf"lacks 1 of 3 shards: {gone} \(unfinished downloads: {gone}\.incomplete\)"
    with pytest.raises(FileNotFoundError, match=wanted):
        weights.load(folder)
    (folder / f"diffusion_pytorch_model{files.INDEX}").unlink()
    with pytest.raises(FileNotFoundError, match=wanted):
        weights.load(folder)


def test_an_index_that_names_absent_tensors(folder):
    """A network of as many layers as its shards happen to hold would be taken for whole."""
    layer = [name for name in checkpoints.shapes("diffusers") if name.startswith("blocks.2.")]
    for file in folder.glob("*.safetensors"):
        there = files.open_tensors(file)
        kept = {name: np.array(there.read(name)) for name in there.shapes.keys() - set(layer)}
        save_file(kept, file)
    wanted = rf"lacks {len(layer)} tensors that its index names, {sorted(layer)[0]} for one"
    with pytest.raises(ValueError, match=wanted):
        weights.load(folder)


def test_a_download_of_which_nothing_is_there_yet(tmp_path):
    (tmp_path / ".cache" / "download").mkdir(parents=True)
    (tmp_path / ".cache" / "download" / "abc.incomplete").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors.*abc\.incomplete"):
        weights.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": [1]}', "[]"])
def test_a_damaged_index(folder, text):
    (folder / f"diffusion_pytorch_model{files.INDEX}").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        files.open_tensors(folder)


def test_several_checkpoints_in_a_folder(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    save_file(ARRAYS, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"several checkpoints \['a\.safetensors', 'b\.safetensors'\]"
    ):
        files.open_tensors(tmp_path)


def test_nothing_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        files.open_tensors(tmp_path / "a.pth")


# What does more than hold tensors.


class Attack:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "function, args, name",
    [
        (os.system, ("rmdir {}",), r"(posix|nt)\.system"),
        (eval, ("os.rmdir('{}')",), r"(builtins|__builtin__)\.eval"),
        (getattr, ("abc", "upper"), r"(builtins|__builtin__)\.getattr"),
        (shutil.rmtree, ("{}",), r"shutil\.rmtree"),
    ],
)
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, function, args, name):
    (tmp_path / "victim" / "x").mkdir(parents=True)
    args = [arg.format(tmp_path / "victim" / "x") for arg in args]
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        program = pickle.dumps({"w": Attack(function, *args)}, 2)
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match=rf"a\.pth.* it wants to call {name}, and only"):
        files.open_tensors(tmp_path / "a.pth")
    assert (tmp_path / "victim" / "x").is_dir()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    write_torch(tmp_path / "a.pt", {"w": np.zeros(4, np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    shape, strides = pickle.dumps((4,), 2)[2:-1], pickle.dumps((1,), 2)[2:-1]
    tree = entries["archive/data.pkl"]
    far = tree.replace(strides, pickle.dumps((9,), 2)[2:-1])
    assert shape in tree and far != tree
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, data in (entries | {"archive/data.pkl": far}).items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"a tensor \(4,\) reaches beyond its 4 elements"):
        files.open_tensors(tmp_path / "b.pt")


def test_a_file_without_tensors(tmp_path):
    pickles.write(tmp_path / "a.pt", {"generator": {}}, ())
    with pytest.raises(ValueError, match="holds no dict of tensors"):
        files.open_tensors(tmp_path / "a.pt")


# What is of another kind.


@pytest.mark.parametrize(
    "name, words",
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "looks like a LoRA"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "looks like a LoRA"),
        ("double_blocks.0.img_attn.qkv.weight", "looks like a Flux"),
        ("single_transformer_blocks.0.attn.to_q.weight", "looks like a Flux"),
        ("down_blocks.0.attentions.0.norm.weight", "looks like a UNet"),
        ("vision_model.embeddings.class_embedding", "looks like a CLIP"),
        ("something.weight", "is none that dmd_jax wrote, nor of a known family"),
    ],
)
def test_other_networks_are_named(tmp_path, name, words):
    save_file({name: np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words):
        weights.load(tmp_path / "a.safetensors")


def test_all_tensors_that_differ_are_listed_at_once(tmp_path):
    arrays = checkpoints.tensors("original")
    arrays["head.head.bias"] = np.zeros(3, np.float32)
    del arrays["blocks.1.ffn.2.bias"]
    arrays["vace_blocks.0.before_proj.weight"] = np.zeros((2, 2), np.float32)
    path = write_torch(tmp_path / "a.pt", arrays)
    with pytest.raises(ValueError) as error:
        weights.abstract(path)
    first, *lines = str(error.value).splitlines()
    assert "it may be a Wan VACE transformer" in first and str(path) in first
    assert lines == [
        "  blocks.1.ffn.2.bias: expected (256,), found nothing",
        "  head.head.bias: expected (16,), found (3,)",
        "  vace_blocks.0.before_proj.weight: expected nothing, found (2, 2)",
    ]
