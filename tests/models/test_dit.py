"""The DiT: layout, conditioning, scanned layers, recomputation, precision, sharding rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import TINY, collectives, tiny_dit

from dmd_jax.devices import sharding
from dmd_jax.models.dit import SHARDING_RULES, DiT, DiTConfig, timestep_embedding

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)), jnp.float32)
T = jnp.array([1000.0, 700.0, 300.0, 20.0])
LABEL = jnp.array([0, 1, 2, 3])
call = jax.jit(lambda net, x, t, label: net(x, t, label))


@pytest.fixture(scope="module")
def net():
    return tiny_dit(0)


@pytest.fixture(scope="module")
def out(net):
    return call(net, X, T, LABEL)


@jax.jit
def loss_and_gradient(net):
    return jax.value_and_grad(lambda net: jnp.mean(jnp.sin(net(X, T, LABEL))))(net)


@pytest.fixture(scope="module")
def gradient(net):
    return loss_and_gradient(net)


def test_as_initialised_the_output_is_zero_and_the_weights_are_float32():
    net = jax.jit(lambda: DiT(dataclasses.replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0)))()
    out = call(net, X, T, LABEL)
    assert out.shape == X.shape
    np.testing.assert_array_equal(out, 0.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {jnp.dtype("float32")}


def test_weights_are_counted_by_hand():
    d, h, pixels, tokens = 16, 32, 16, 4
    linear = lambda n, m: n * m + m  # noqa: E731
    block = linear(d, 3 * d) + linear(d, d) + 2 * linear(d, h) + linear(h, d) + 2 * 8 + 6 * d
    outer = linear(pixels, d) + tokens * d + 4 * d + linear(256, d) + linear(d, d)
    head = linear(d, 6 * d) + linear(d, 2 * d) + linear(d, pixels)
    shapes = jax.eval_shape(lambda: DiT(TINY, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 2 * block + outer + head
    free = jax.eval_shape(
        lambda: DiT(dataclasses.replace(TINY, dim=96, hidden=0), rngs=nnx.Rngs(0))
    )
    assert free.blocks.down.kernel.shape == (2, 256, 96)  # 8/3 of the width


def test_a_patch_becomes_one_token_and_returns_to_its_place(net):
    """A head that copies its tokens and layers that do nothing leave the image as it was."""
    still = jax.tree.map(jnp.zeros_like, net)
    still.patch.kernel[...] = jnp.eye(16)
    still.head.kernel[...] = jnp.eye(16)
    patches = X.reshape(4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)  # [B, row, column, 4, 4]
    size = np.sqrt(np.mean(np.square(patches), axis=(3, 4), keepdims=True))
    wanted = (patches / size).transpose(0, 1, 3, 2, 4).reshape(X.shape)
    np.testing.assert_allclose(call(still, X, T, LABEL), wanted, rtol=1e-4, atol=1e-4)


def test_every_input_matters_and_samples_do_not_mix(net, out):
    assert jnp.isfinite(out).all()
    for changed in [
        (X.at[1].add(0.1), T, LABEL),
        (X, T.at[1].add(50.0), LABEL),
        (X, T, LABEL.at[1].set(0)),
    ]:
        other = call(net, *changed)
        assert jnp.abs(other[1] - out[1]).max() > 1e-3
        np.testing.assert_allclose(
            np.delete(other, 1, 0), np.delete(out, 1, 0), rtol=1e-5, atol=1e-5
        )


def test_every_weight_learns(gradient):
    _, grad = gradient
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


def test_the_scan_is_a_loop_over_the_layers(net, out):
    class Looped(DiT):
        def _layers(self, tokens, modulation, features):
            for i in range(self.config.depth):
                tokens = jax.tree.map(lambda w, i=i: w[i], self.blocks)(tokens, modulation)
            return tokens, None

    looped = jax.eval_shape(lambda: Looped(TINY, rngs=nnx.Rngs(0)))
    looped = jax.tree.unflatten(jax.tree.structure(looped), jax.tree.leaves(net))
    np.testing.assert_allclose(call(looped, X, T, LABEL), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots_saveable", "unroll": 2}])
def test_recomputing_and_unrolling_change_no_gradient(changes, gradient):
    value, grad = loss_and_gradient(tiny_dit(0, **changes))
    np.testing.assert_allclose(value, gradient[0], rtol=1e-5)
    for leaf, wanted in zip(jax.tree.leaves(grad), jax.tree.leaves(gradient[1]), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-5)


def test_bfloat16_layers_stay_near_float32(out):
    low = call(tiny_dit(0, dtype="bfloat16"), X, T, LABEL)
    assert low.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((low - out) ** 2) / jnp.mean(out**2))
    assert 1e-5 < error < 0.03  # a few roundings of 2^-9; and it does compute in bfloat16


def test_time_embedding_is_the_published_one():
    t = np.array([0.0, 1.0, 999.5])
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    angles = t[:, None] * frequencies
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    # The angle is rounded to float32: an ulp of 1000 is 6e-5.
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 256), wanted, atol=2e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch": 3}, "patch=3 does not divide image_size=8"),
        ({"heads": 0}, "heads=0 must be an int, 1 or more"),
        ({"dim": 2.5}, r"dim=2\.5 must be an int"),
        ({"hidden": -1}, "hidden=-1 must be 0 or more"),
        ({"heads": 3}, "heads=3 does not divide dim=16"),
        ({"remat": "some"}, "remat='some': use 'none', 'full', 'offload' or a name of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_config_says_what_its_samples_and_its_null_label_are():
    config = DiTConfig(image_size=8, channels=3, num_classes=5, patch=2, dim=8, depth=1, heads=1)
    assert (config.sample_shape, config.uncond) == ((8, 8, 3), 5)


def test_the_rules_cover_a_large_network_and_none_is_idle():
    config = dataclasses.replace(TINY, image_size=32, dim=1152, depth=3, heads=16, hidden=0)
    config = dataclasses.replace(config, spans=True)
    shapes = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    places = sharding.infer(shapes, SHARDING_RULES, mesh)
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(places), strict=True
    ):
        name = sharding.path_name(path)
        if leaf.size > sharding.SMALL and "label" not in name:
            assert sharding.WEIGHTS in place.spec, name
    assert places.blocks.qkv.kernel.get_value().spec == jax.P(None, sharding.WEIGHTS, "tensor")
    assert places.blocks.down.kernel.get_value().spec == jax.P(None, "tensor", sharding.WEIGHTS)


def test_split_weights_are_gathered_and_activations_stay(net, gradient):
    """With weights split over fsdp the step sends weights and their gradients, no activation."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    batch = 40  # neither it nor a device's part of it is the size of a weight

    def grad(net, x, t, label):
        return jax.grad(lambda net: jnp.mean(jnp.sin(net(x, t, label))))(net)

    with jax.set_mesh(mesh):
        places = sharding.infer(net, SHARDING_RULES, mesh)
        split = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), net, places
        )
        place = jax.sharding.NamedSharding(mesh, sharding.P(sharding.BATCH))
        data = [
            jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype, sharding=place)
            for x in (X, T, LABEL)
        ]
        sent = collectives(jax.jit(grad, out_shardings=places).lower(split, *data).compile())
    shapes = {shape for _, sizes in sent for shape in sizes}
    assert {"all-gather", "all-reduce"} <= {name for name, _ in sent}
    # Activations would show the batch, or what two, four or eight devices hold of it.
    assert not {shape for shape in shapes if shape and shape[0] in (40, 20, 10, 5)}, sent


def test_features_are_the_tokens_after_the_named_layers(net, out):
    """Those after the last layer give the output, and those after the first a net of one layer."""
    same, features = jax.jit(lambda net: net(X, T, LABEL, features=(0, 1)))(net)
    assert features.shape == (2, 4, 4, 16)
    np.testing.assert_allclose(same, out, rtol=1e-5, atol=1e-6)
    first = jax.tree.map(lambda x: x, net)
    first.blocks = jax.tree.map(lambda x: x[:1], net.blocks)
    alone, last = jax.jit(lambda net: net(X, T, LABEL, features=(0,)))(first)
    np.testing.assert_allclose(features[0], last[0], rtol=1e-5, atol=1e-6)
    assert jnp.abs(alone - out).max() > 0.01 and jnp.abs(features[0] - features[1]).max() > 0.01


def test_layers_after_the_last_feature_are_not_computed_where_it_alone_is_used(net):
    def flops(select):
        run = jax.jit(lambda net: select(*net(X, T, LABEL, features=(0,))))
        return run.lower(net).compile().cost_analysis()["flops"]

    both = flops(lambda out, features: (out, features))
    assert flops(lambda out, features: features) < 0.75 * both


@pytest.mark.parametrize("features", [(1, 0), (0, 0), (2,), (-1,)])
def test_features_of_no_layer_are_refused(net, features):
    with pytest.raises(ValueError, match=r"must ascend and name layers in \[0, 2\)"):
        net(X, T, LABEL, features=features)
