"""Adapters change a network as the formula says, and mean the same in files of other programs."""

import dataclasses

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from safetensors.numpy import load_file, save_file

from dmd_jax import export, weights
from dmd_jax.devices.paths import named_leaves
from dmd_jax.models.dit import DiT
from dmd_jax.models.layers import linear
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.weights import adapter_files, adapters

MATRICES = r"blocks/.*kernel$"
WAN = WanConfig(16, 24, 2, 2, 3, 3, text_dim=5, freq_dim=8)


def drawn(net, rank=3, matrices=MATRICES, seed=5):
    """An adapter whose A and B are both random."""
    shapes = adapters.abstract(net, matrices, rank)
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
        for name, x in shapes.items()
    }


def images(net):
    """What a DiT makes of two images."""
    return net(toys.normal(1, 2, 8, 8, 1), jnp.array([200.0, 700.0]), jnp.array([0, 2]))


def wan(seed=0):
    return toys.weights(lambda rngs: Wan(WAN, rngs=rngs), seed)


def placed(shapes):
    """The shapes with a sharding, that of one device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def test_a_new_adapter_leaves_the_network_as_it_is():
    net = toys.tiny_dit(0)
    new = adapters.random(adapters.abstract(net, MATRICES, 3), seed=1)
    toys.assert_same(images(adapters.attach(net, new, 2.0)), images(net))
    toys.assert_same(adapters.merge(net, new, 2.0), net)
    A = new["blocks/qkv/A/kernel"]
    assert A.shape == (2, 16, 3) and 0.2 < float(jnp.abs(A).max()) <= 16**-0.5
    assert not jnp.array_equal(A[0], A[1])


def test_beside_the_weights_or_merged_it_is_the_same_network():
    net = toys.tiny_dit(0)
    adapter = drawn(net)
    beside, merged = (f(net, adapter, 0.5) for f in (adapters.attach, adapters.merge))
    toys.assert_close(images(beside), images(merged), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(images(merged) - images(net)).max()) > 0.1
    A, B = adapter["blocks/out/A/kernel"], adapter["blocks/out/B/kernel"]
    wanted = np.asarray(net.blocks.out.kernel[...]) + 0.5 * np.asarray(A) @ np.asarray(B)
    toys.assert_close(merged.blocks.out.kernel[...], wanted)
    toys.assert_same(merged.head.kernel[...], net.head.kernel[...])


def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule():
    net, scale = toys.tiny_dit(0), 0.5
    adapter = drawn(net)

    def loss(net):
        return jnp.mean(images(net) ** 2)

    found = jax.grad(lambda a: loss(adapters.attach(net, a, scale)))(adapter)
    whole = named_leaves(jax.grad(loss)(adapters.merge(net, adapter, scale)))
    for kernel in adapters.kernels(adapter):
        A, B = (np.asarray(adapter[adapters.factor(kernel, which)]) for which in "AB")
        dW = np.asarray(whole[kernel])
        for which, wanted in (("A", dW @ B.mT), ("B", A.mT @ dW)):
            name = adapters.factor(kernel, which)
            toys.assert_close(found[name], scale * wanted, rtol=1e-3, atol=1e-6)


def test_a_bfloat16_base_does_not_swallow_small_changes():
    signs = jnp.array([1.0, -1.0, 1.0, -1.0])
    layer = linear(4, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), bias=False)
    base = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), layer)
    # An eighth of the unit in the last place of 1: rounding drops it.
    change = {"A/kernel": signs[:, None], "B/kernel": jnp.full((1, 1), 2.0**-10)}
    assert adapters.attach(base, change, 1.0)(signs) == 4 * 2.0**-10
    assert adapters.merge(base, change, 1.0)(signs) == 0.0


@pytest.mark.parametrize(
    "matrices, reason",
    [
        ("nothing", "matches no weight; there are .*kernel"),
        ("blocks/.*bias$", "matches blocks/down/bias .*no kernel"),
        ("label/embedding$", "no kernel"),
    ],
)
def test_what_is_no_matrix_of_a_layer_is_refused(matrices, reason):
    with pytest.raises(ValueError, match=reason):
        adapters.abstract(toys.tiny_dit(0), matrices, 2)


def test_a_kernel_of_a_convolution_is_refused():
    with pytest.raises(ValueError, match=r"patch/kernel \(1, 2, 2, 3, 16\)"):
        adapters.abstract(wan(), "kernel$", 2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(network, adapter, its file), alpha 6 and rank 3, of blocks and others."""
    net, path = wan(), tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    adapter = drawn(net, matrices=r"(blocks/.*|text_mlp/.*|head)/kernel$")
    adapter_files.save(path, adapter, net, alpha=6.0, base="1234", step=7)
    return net, adapter, path


def change(held, names, module):
    """alpha / rank B A of a module in a file of another program, by hand."""
    A, B = (held[f"{names.prefix}{module}.{which}.weight"] for which in (names.A, names.B))
    alpha = held.get(f"{names.prefix}{module}.alpha", np.float32(A.shape[0]))
    return alpha / A.shape[0] * (B @ A)


@pytest.mark.parametrize("to", adapter_files.OTHERS)
def test_the_base_plus_the_exported_adapter_is_the_merged_network(stored, tmp_path, to):
    net, adapter, path = stored
    export.write(path, to, tmp_path / "out.safetensors")
    held, names = load_file(tmp_path / "out.safetensors"), adapter_files.OTHERS[to]
    base, merged = (
        checkpoints.held_by(n, names.layout) for n in (net, adapters.merge(net, adapter, 2.0))
    )
    changed = {
        name.removesuffix(".weight")
        for name in base
        if not np.array_equal(base[name], merged[name])
    }
    suffix = f".{names.A}.weight"
    assert changed == {
        name.removeprefix(names.prefix).removesuffix(suffix) for name in held if suffix in name
    }
    assert len(changed) == 2 * 10 + 3
    for module in changed:
        found = base[f"{module}.weight"] + change(held, names, module)
        np.testing.assert_allclose(found, merged[f"{module}.weight"], rtol=1e-5, atol=1e-6)


def test_the_names_are_those_of_the_other_programs(stored, tmp_path):
    for to, names in {
        "diffusers_lora": (
            "transformer.blocks.1.attn1.to_q.lora_A.weight",
            "transformer.blocks.0.attn2.to_out.0.lora_B.weight",
            "transformer.blocks.0.ffn.net.0.proj.lora_A.weight",
        ),
        "comfyui_lora": (
            "diffusion_model.blocks.1.self_attn.q.lora_down.weight",
            "diffusion_model.blocks.0.ffn.2.lora_up.weight",
            "diffusion_model.blocks.0.cross_attn.o.alpha",
        ),
    }.items():
        export.write(stored[2], to, tmp_path / f"{to}.safetensors", dtype="bfloat16")
        held = load_file(tmp_path / f"{to}.safetensors")
        assert set(names) <= held.keys()
        assert held[names[0]].shape == (3, 16) and held[names[0]].dtype == jnp.bfloat16


@pytest.mark.parametrize("to", [None, *adapter_files.OTHERS])
def test_an_adapter_comes_in_again_at_any_scale(stored, tmp_path, to):
    _, adapter, path = stored
    if to:
        export.write(path, to, path := tmp_path / "out.safetensors")
    shapes = placed(jax.eval_shape(lambda: adapter))
    found = adapter_files.load(path, shapes, scale=0.5)
    for name, x in adapter.items():
        wanted = x * (4.0 if "/B/" in name else 1.0)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, err_msg=name)


def test_an_adapter_of_another_rank_or_network_is_refused(stored, tmp_path):
    net, _, path = stored
    export.write(path, "comfyui_lora", other := tmp_path / "out.safetensors")
    for file in (path, other):
        with pytest.raises(ValueError, match=r"another rank.*\n.*expected .*, found"):
            adapter_files.check(file, adapters.abstract(net, MATRICES, 4))
        wider = jax.eval_shape(lambda: Wan(dataclasses.replace(WAN, ffn=32), rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="blocks/ffn/up/B/kernel"):
            adapter_files.check(file, adapters.abstract(wider, MATRICES, 3))


def test_a_file_that_is_no_adapter_is_refused(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no adapter"):
        adapter_files.check(tmp_path / "x.safetensors", adapters.abstract(wan(), MATRICES, 3))
    with pytest.raises(ValueError, match="is no adapter that dmd_jax wrote"):
        export.write(tmp_path / "x.safetensors", "diffusers_lora", tmp_path / "y.safetensors")


def test_an_adapter_is_not_taken_for_a_network(stored):
    with pytest.raises(ValueError, match="a LoRA, the change of a network"):
        weights.denoiser(stored[2])


def test_adapters_of_other_families_stay_here(tmp_path):
    net = toys.tiny_dit(0)
    assert isinstance(net, DiT)
    path = tmp_path / "adapter.safetensors"
    adapter_files.save(path, drawn(net), net, alpha=3.0, base="1234")
    with pytest.raises(ValueError, match="is of a dit network; diffusers_lora is for Wan"):
        export.write(path, "diffusers_lora", tmp_path / "out.safetensors")
