"""Wan transformers of others: every layout of files gives the same network, bit for bit."""

import json
import math
import os

import checkpoints
import foreign
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from checkpoints import CONFIG
from safetensors.numpy import load_file, save_file

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching
from dmd_jax.models.wan import I2V_14B, SHARDING_RULES, T2V_14B
from dmd_jax.weights import files, table
from dmd_jax.weights import wan as names

DTYPES = (np.float32, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_folder_is_loaded_bit_for_bit(tmp_path, layout, shards, dtype):
    folder = checkpoints.write_folder(tmp_path / "a", layout, dtype, shards)
    net = weights.load(folder)
    assert net.config == CONFIG
    checkpoints.assert_same(checkpoints.held_by(net, layout), checkpoints.tensors(layout, dtype))


def test_shards_need_no_index(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "a", shards=2)
    wanted = weights.load(folder)
    next(folder.glob(f"*{files.INDEX}")).unlink()
    toys.assert_same(weights.load(folder), wanted)


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("config, count", [(T2V_14B, 1095), (I2V_14B, 1303)])
def test_every_tensor_of_a_14b_has_its_place_and_none_is_left_over(tmp_path, config, count, layout):
    shapes, weight_map = checkpoints.shapes(layout, config), {}
    for i in range(6):
        path = tmp_path / f"diffusion_pytorch_model-{i + 1:05}-of-00006.safetensors"
        plan = {name: (shapes[name], np.dtype("float32")) for name in list(shapes)[i::6]}
        files.write_safetensors(
            path, plan, iter(())
        )  # the header alone; what follows takes no room
        rest = sum(4 * math.prod(shape) for shape, _ in plan.values())
        os.truncate(path, path.stat().st_size + rest)
        weight_map |= dict.fromkeys(plan, path.name)
    assert len(weight_map) == count
    index = tmp_path / f"diffusion_pytorch_model{files.INDEX}"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    net = weights.abstract_part(tmp_path, "bfloat16")  # raises where names or shapes differ
    assert net.config == config
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {np.dtype("bfloat16")}


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "module._orig_mod."])
def test_a_file_alone_and_the_names_of_wrappers(tmp_path, prefix):
    stored = checkpoints.tensors("original")
    save_file({prefix + name: x for name, x in stored.items()}, tmp_path / "a.safetensors")
    net = weights.load(tmp_path / "a.safetensors")
    assert net.config == CONFIG
    checkpoints.assert_same(checkpoints.held_by(net, "original"), stored)


def test_a_dtype_rounds_once(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "a", dtype=np.float32)
    found = checkpoints.held_by(weights.load(folder, jnp.bfloat16), "diffusers")
    checkpoints.assert_same(found, checkpoints.tensors("diffusers"))


def test_the_network_is_a_denoiser_that_runs_as_told(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "a")
    abstract = weights.abstract(folder, dtype="bfloat16", remat="full")
    loaded = weights.denoiser(folder, dtype="bfloat16", remat="full")
    assert (loaded.schedule, loaded.prediction) == (FlowMatching(), Velocity(time_scale=1000))
    assert (loaded.net.config.dtype, loaded.net.config.remat) == ("bfloat16", "full")
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
    assert jax.tree.leaves(shape) == jax.tree.leaves(abstract)
    assert jax.tree.structure(shape) == jax.tree.structure(abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}


def test_our_own_file_holds_a_wan_student(tmp_path):
    student = Denoiser(weights.load(checkpoints.write_folder(tmp_path / "a", dtype=np.float32)))
    weights.save(tmp_path / "student.safetensors", student, times=(1.0, 0.5), shift=5.0)
    toys.assert_same(weights.denoiser(tmp_path / "student.safetensors"), student)
    toys.assert_same(weights.load(tmp_path / "student.safetensors"), student.net)
    assert weights.sharding_rules(student.net) == SHARDING_RULES
    assert weights.notes(tmp_path / "student.safetensors")["shift"] == 5.0
    assert weights.notes(tmp_path / "a") == {}


def test_weights_are_born_sharded(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "a")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.infer(weights.abstract_part(folder), SHARDING_RULES, mesh)
    net = weights.load(folder, shardings=shardings)
    assert [x.sharding for x in jax.tree.leaves(net)] == jax.tree.leaves(shardings)
    toys.assert_same(jax.device_get(net), weights.load(folder))
    placed = weights.denoiser(folder, shardings=Denoiser(shardings))
    toys.assert_same(placed.net, net)


def test_no_part_of_a_weight_is_larger_than_a_devices(tmp_path, monkeypatch):
    result = []

    def note(shape, dtype, real=table._aligned):
        result.append(tuple(shape))
        return real(shape, dtype)

    monkeypatch.setattr(table, "_aligned", note)
    folder = checkpoints.write_folder(tmp_path / "a")
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    abstract = weights.abstract_part(folder)
    shardings = sharding.infer(abstract, SHARDING_RULES, mesh)
    net = weights.load(folder, shardings=shardings)
    wanted = [s.data.shape for x in jax.tree.leaves(net) for s in x.addressable_shards]
    assert set(result) == set(wanted)
    assert (CONFIG.depth, 64, CONFIG.ffn // 2) in result


@pytest.mark.parametrize("fsdp", [None, 8])
def test_a_weight_is_read_into_the_memory_that_it_stays_in(tmp_path, monkeypatch, fsdp):
    result = set()

    def note(shape, dtype, real=table._aligned):
        array = real(shape, dtype)
        result.add(array.ctypes.data)
        return array

    monkeypatch.setattr(table, "_aligned", note)
    folder, shardings = checkpoints.write_folder(tmp_path / "a"), None
    if fsdp:
        mesh = sharding.make_mesh(data=1, fsdp=fsdp)
        shardings = sharding.infer(weights.abstract_part(folder), SHARDING_RULES, mesh)
    for weight in jax.tree.leaves(weights.load(folder, shardings=shardings)):
        first = weight.addressable_shards[0].data
        assert first.unsafe_buffer_pointer() in result


def test_what_is_not_placed_follows_the_mesh_of_its_user(tmp_path):
    folder = checkpoints.write_folder(tmp_path / "a")
    with jax.set_mesh(sharding.make_mesh(data=8)):
        net = weights.load(folder)
        spread = jax.jit(lambda net: net, out_shardings=jax.P())(net)
    toys.assert_same(jax.device_get(spread), weights.load(folder))


def test_a_weight_may_be_a_number_or_empty():
    wanted = {"number": np.float32(3), "empty": np.zeros((2, 0)), "layers": np.arange(3)}
    wanted = {name: np.asarray(x, np.float32) for name, x in wanted.items()}
    theirs = wanted | {f"layers.{i}": np.asarray(x) for i, x in enumerate(wanted["layers"])}
    rows = [table.Row(name, name) for name in ("number", "empty")]
    rows += [table.Row("layers", "layers.{}")]
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in wanted.items()}
    checkpoints.assert_same(table.fill(abstract, rows, theirs.__getitem__), wanted)


@pytest.mark.parametrize("name, part", [("transformer", None), ("transformer_2", "transformer_2")])
def test_a_pipeline_has_its_parts_in_folders(tmp_path, name, part):
    checkpoints.write_folder(tmp_path / "transformer", dtype=np.float32)
    checkpoints.write_folder(tmp_path / "transformer_2")
    toys.assert_same(weights.load(tmp_path, part=part), weights.load(tmp_path / name))


@pytest.mark.parametrize(
    "name, part", [("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")]
)
def test_wans_repository_has_its_experts_in_folders(tmp_path, name, part):
    checkpoints.write_folder(tmp_path / "high_noise_model", "original", np.float32)
    checkpoints.write_folder(tmp_path / "low_noise_model", "original")
    toys.assert_same(weights.load(tmp_path, part=part), weights.load(tmp_path / name))


def test_a_field_that_the_network_does_not_have_is_named(tmp_path):
    checkpoints.write_folder(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"tensors: spans cannot be set, because WanConfig has"):
        weights.abstract(tmp_path, spans=True)


def test_a_part_that_is_not_there_is_named(tmp_path):
    checkpoints.write_folder(tmp_path / "transformer")
    with pytest.raises(FileNotFoundError, match=r"has no vae; its parts are \['transformer'\]"):
        weights.load(tmp_path, part="vae")
    with pytest.raises(FileNotFoundError, match="has no transformer_2; its parts are"):
        weights.load(tmp_path, part="transformer_2")
    with pytest.raises(ValueError, match="part='decoder': use one of"):
        weights.load(tmp_path, part="decoder")
    for alone in (tmp_path / "transformer", "moving_digits_small"):
        with pytest.raises(ValueError, match="looks like a transformer, and a vae is wanted"):
            weights.load(alone, part="vae")


def test_each_expert_of_a_pair_runs_as_it_is_told(tmp_path):
    for part in ("transformer", "transformer_2"):
        checkpoints.write_folder(tmp_path / part)
        net = weights.denoiser(tmp_path, part=part, dtype="bfloat16").net
        assert net.config.dtype == "bfloat16"


@pytest.mark.torch
def test_a_folder_that_diffusers_wrote(tmp_path):
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = weights.wan.to_settings(CONFIG, "diffusers")
    settings.pop("_class_name")
    module = foreign.give_weights(diffusers.WanTransformer3DModel(**settings)).to(torch.bfloat16)
    module.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    net = weights.load(tmp_path)
    checkpoints.assert_same(
        checkpoints.held_by(net, "diffusers"), load_all(tmp_path / "transformer")
    )


def load_all(folder):
    """{name: array} of all safetensors of a folder."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    return stored
