"""Weights in eight bits: the nearest whole multiples, made shard by shard, and used as such."""

import re

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import programs
import pytest
import toys

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.layers import Int8, in_int8
from dmd_jax.models.wan import Wan
from dmd_jax.weights import table

P = jax.P


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Wan as diffusers writes it, in float32, and a DiT of our own."""
    folder = tmp_path_factory.mktemp("files")
    checkpoints.write_folder(folder / "wan", dtype=np.float32)
    return {
        "wan": folder / "wan",
        "dit": programs.save_tiny(folder / "dit.safetensors", dim=128, depth=3, heads=4),
    }


def inputs(net):
    """Arguments of a call of a Wan or a DiT."""
    if isinstance(net, Wan):
        channels, width = net.config.out_channels, net.config.text_dim
        return (
            toys.normal(0, 8, 2, 4, 6, channels),
            jnp.linspace(50, 950, 8),
            toys.normal(1, 8, 3, width),
        )
    return toys.normal(0, 8, 28, 28, 1), jnp.linspace(50, 950, 8), jnp.arange(8)


def kernels(net):
    """{path: Int8} of a network."""
    leaves = jax.tree_util.tree_leaves_with_path(net, is_leaf=lambda x: isinstance(x, Int8))
    found = {sharding.path_name(path): x for path, x in leaves}
    return {name: x for name, x in found.items() if isinstance(x, Int8)}


def rounded(net):
    """The float32 network whose kernels are the rounded ones."""
    return jax.tree.map(
        lambda x: x.plain if isinstance(x, Int8) else x,
        net,
        is_leaf=lambda x: isinstance(x, Int8),
    )


@pytest.mark.parametrize("family, count", [("wan", 10), ("dit", 5)])
def test_every_number_is_the_nearest_multiple_of_its_channels_scale(files, family, count):
    net = weights.denoiser(files[family]).net
    exact, found = named_leaves(net), kernels(weights.denoiser(files[family], int8=True).net)
    assert len(found) == count and all(name.startswith("blocks/") for name in found)
    for name, kernel in found.items():
        w, scales = np.asarray(exact[name]), np.asarray(kernel.scales)
        assert kernel.values.dtype == jnp.int8 and kernel.values.shape == w.shape
        np.testing.assert_allclose(scales, np.abs(w).max(-2, keepdims=True) / 127, rtol=1e-6)
        w, scales = w.astype(np.float64), scales.astype(np.float64)
        error = np.abs(w - np.asarray(kernel.values) * scales)
        # A quotient of up to 127 is rounded to float32 before it is rounded to a whole number.
        assert np.all(error <= scales * (0.5 + 127 * 2**-24))
        assert error.max() > 0.4 * scales.min()
        assert np.abs(np.asarray(kernel.values)).max(-2).min() == 127


@pytest.mark.parametrize("family", ["wan", "dit"])
def test_everything_else_is_as_it_was(files, family):
    exact = named_leaves(weights.denoiser(files[family]).net)
    found = named_leaves(weights.denoiser(files[family], int8=True).net)
    for name in exact.keys() & found.keys():
        np.testing.assert_array_equal(exact[name], found[name])
    lost = {f"{name}/value/{part}" for name in exact for part in ("values", "scales")}
    assert found.keys() - exact.keys() < lost


@pytest.mark.parametrize("family", ["wan", "dit"])
def test_a_network_computes_with_the_rounded_weights(files, family):
    net = weights.denoiser(files[family], int8=True).net
    x, t, cond = inputs(net)

    def call(net, x):
        return jnp.sum(jnp.square(net(x, t, cond))), net(x, t, cond)

    gradient = jax.jit(jax.grad(call, argnums=1, has_aux=True))
    for found, wanted in zip(gradient(net, x), gradient(rounded(net), x), strict=True):
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    exact = weights.denoiser(files[family]).net(x, t, cond)
    assert np.linalg.norm(gradient(net, x)[1] - exact) > 1e-4 * np.linalg.norm(exact)


def test_bfloat16_rounds_the_rounded_weights_once_more(files):
    net = weights.denoiser(files["wan"], int8=True, dtype="bfloat16").net
    x = inputs(net)
    np.testing.assert_array_equal(net(*x), rounded(net)(*x))


@pytest.mark.parametrize("family", ["wan", "dit"])
def test_it_is_born_sharded_and_computes_the_same(files, family):
    alone = weights.denoiser(files[family], int8=True)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    rules = weights.sharding_rules(alone)
    shape = jax.eval_shape(lambda: alone)
    places = sharding.infer(shape, rules, mesh)
    spread = weights.denoiser(files[family], int8=True, shardings=places)
    assert [x.sharding for x in jax.tree.leaves(spread)] == jax.tree.leaves(places)
    toys.assert_same(jax.device_get(spread), alone)
    up = kernels(spread.net)["blocks/ffn/up/kernel" if family == "wan" else "blocks/up/kernel"]
    assert up.values.sharding.spec == P(None, sharding.WEIGHTS, "tensor")
    assert up.scales.sharding.spec == P(None, None, "tensor")
    x = inputs(alone.net)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda net, *x: net(*x)).lower(spread.net, *x).compile()
        out = program(spread.net, *x)
    wanted = alone.net(*x)
    assert np.linalg.norm(out - wanted) < 1e-5 * np.linalg.norm(wanted)
    # Weights are sent as they are kept: a quarter of the bytes of float32.
    gathered = re.findall(r"= (\w+)\[[\d,]*,(\d+)\]\S* all-gather\(", program.as_text())
    assert "s8" in {dtype for dtype, _ in gathered}


def test_no_copy_of_a_part_is_larger_than_a_devices_or_float(files, monkeypatch):
    result = []

    def note(shape, dtype, real=table._aligned):
        result.append((tuple(shape), np.dtype(dtype).name))
        return real(shape, dtype)

    monkeypatch.setattr(table, "_aligned", note)
    abstract = in_int8(weights.abstract(files["wan"]).net)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    places = sharding.infer(abstract, weights.sharding_rules(abstract), mesh)
    weights.denoiser(files["wan"], int8=True, shardings=Denoiser(places))
    c = checkpoints.CONFIG
    assert ((c.depth, c.dim // 8, c.ffn), "int8") in result
    assert not [
        shape for shape, dtype in result if dtype == "float32" and len(shape) == 3 and shape[1] > 6
    ]


def test_channels_of_zeros_stay_zero_and_what_is_not_finite_is_named():
    kernel = np.zeros((2, 3, 4), np.float32)
    kernel[:, :, 1] = [[1.0, -2.0, 0.5], [0.0, 254.0, 1.0]]
    leaf = Int8(
        jax.ShapeDtypeStruct(kernel.shape, jnp.int8), jax.ShapeDtypeStruct((2, 1, 4), jnp.float32)
    )
    rows = [table.Row("kernel", "layers.{}")]
    stored = {f"layers.{i}": layer for i, layer in enumerate(kernel)}
    found = table.fill({"kernel": leaf}, rows, stored.__getitem__)["kernel"]
    np.testing.assert_array_equal(found.values[:, :, 1], [[64, -127, 32], [0, 127, 0]])
    assert not np.any(found.values[:, :, [0, 2, 3]]) and np.all(found.plain[:, :, 0] == 0)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        stored["layers.1"] = np.full((3, 4), np.nan, dtype)
        with pytest.raises(ValueError, match=r"layers\.1 has numbers that are infinite or NaN"):
            table.fill({"kernel": leaf}, rows, stored.__getitem__)


def test_a_network_without_stacked_layers_is_refused():
    with pytest.raises(ValueError, match="stacked by `stack`, and this network has none"):
        in_int8(toys.MLP(2, 4, rngs=toys.nnx.Rngs(0)))
