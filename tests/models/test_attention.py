"""Attention: values, gradients and memory; the kernels and devices agree on all of them."""

import functools
import re

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from masks_in_words import plain

from dmd_jax.devices import sharding
from dmd_jax.models.attention import (
    BlockCausal,
    Causal,
    TeacherForcing,
    attention,
    cudnn,
    forward_mode,
    splash,
    tiled,
)

# Sums of some hundred products in float32 (6e-8 each), then an exponential, in the norm.
ROUNDING = 3e-6
# The same with inputs and results of 8 bits (4e-3 each).
ROUNDING_BF16 = 1e-2


# --- Helpers --------------------------------------------------------------------------------------


def dense(q, k, v, *, mask=None, visible=None):
    """Attention by its formula, in float32 or float64, with all scores in memory."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = jnp.where(jnp.arange(k.shape[1]) < visible, scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(plain(mask, q.shape[1]), scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v)


def inputs(queries, keys=None, batch=1, heads=2, width=8, dtype=jnp.float32):
    """(q, k, v) with scores of several units: a softmax that is neither flat nor a maximum."""
    keys = keys or queries
    lengths = {"q": queries, "k": keys, "v": keys}
    return tuple(
        jnp.asarray(foreign.tensor(name, (batch, length, heads, width), 1.5), dtype)
        for name, length in lengths.items()
    )


def with_gradients(f):
    """f -> (out, gradients of its product with a fixed direction by q, k and v), compiled."""

    def value(q, k, v, *visible):
        out = f(q, k, v, *visible)
        direction = foreign.tensor("direction", out.shape)
        return jnp.vdot(out.astype(jnp.float32), direction), out

    def both(q, k, v, *visible):
        gradients, out = jax.grad(value, (0, 1, 2), has_aux=True)(q, k, v, *visible)
        return out, *gradients

    return jax.jit(both)


def assert_same(outputs, wanted, tolerance=ROUNDING):
    assert len(outputs) == len(wanted)
    for name, a, b in zip(("out", "dq", "dk", "dv"), outputs, wanted, strict=False):
        assert a.shape == b.shape, name
        assert foreign.relative_error(a, b) < tolerance, name


def collectives(f, *args):
    """How often each collective is in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    names = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found = re.findall(rf" ({names})(?:-start)?\(", text)
    return {name: found.count(name) for name in found}


# --- Values ---------------------------------------------------------------------------------------

# Lengths that are no multiple of a chunk or a tile; few keys and many.
LENGTHS = [(5, 7), (1, 300), (300, 300), (29, 1601), (1601, 29), (811, 811)]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_values_and_gradients_are_those_of_the_formula(queries, keys):
    args = inputs(queries, keys, batch=2)
    assert_same(with_gradients(attention)(*args), with_gradients(dense)(*args))


@pytest.mark.parametrize(("queries", "keys", "visible"), [(5, 40, 17), (70, 900, 800)])
def test_keys_that_are_not_visible_do_not_count(queries, keys, visible):
    args = inputs(queries, keys)
    by_hand = with_gradients(lambda q, k, v: dense(q, k[:, :visible], v[:, :visible]))(*args)
    outputs = with_gradients(lambda q, k, v, visible: attention(q, k, v, visible=visible))(
        *args, jnp.int32(visible)
    )
    assert_same(outputs, by_hand)
    for gradient in outputs[2:]:
        np.testing.assert_array_equal(gradient[:, visible:], 0)


SEQUENCES = [
    (BlockCausal(Causal(2), 5), 63),
    (BlockCausal(Causal(3), 40), 400),
    (BlockCausal(Causal(3, first_alone=True, window=4, sink=1), 40), 400),
    (BlockCausal(Causal(3, window=5, sink=1), 2), 333),  # more blocks than chunks
    (TeacherForcing(BlockCausal(Causal(2), 40), 240), 480),
    (TeacherForcing(BlockCausal(Causal(2, first_alone=True, window=3, sink=1), 30), 210), 420),
    (TeacherForcing(BlockCausal(Causal(1), 3), 150), 300),
]


@pytest.mark.parametrize(("mask", "length"), SEQUENCES, ids=str)
def test_masked_values_and_gradients_are_those_of_the_formula(mask, length):
    args = inputs(length)
    outputs = with_gradients(functools.partial(attention, mask=mask))(*args)
    assert_same(outputs, with_gradients(functools.partial(dense, mask=mask))(*args))


def test_a_mask_and_visible_keys_hold_together():
    mask, args, visible = BlockCausal(Causal(3), 40), inputs(400), jnp.int32(250)
    outputs = with_gradients(lambda *x: attention(*x[:3], mask=mask, visible=x[3]))(*args, visible)
    assert_same(
        outputs, with_gradients(lambda *x: dense(*x[:3], mask=mask, visible=x[3]))(*args, visible)
    )


@pytest.mark.parametrize("length", [60, 400])
def test_bfloat16_is_within_its_rounding(length):
    args = inputs(length, dtype=jnp.bfloat16)
    outputs = with_gradients(attention)(*args)
    assert all(x.dtype == jnp.bfloat16 for x in outputs)
    wanted = with_gradients(dense)(*(x.astype(jnp.float32) for x in args))
    assert_same(outputs, wanted, ROUNDING_BF16)


def test_scores_that_would_overflow_do_not():
    q, k, v = inputs(300)
    out = attention(100 * q, 100 * k, v)
    assert jnp.isfinite(out).all()
    assert foreign.relative_error(out, dense(100 * q, 100 * k, v)) < 1e-2


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "attention takes q"),
        (((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "attention takes q"),
        (((1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)), "attention takes q"),
        (((1, 4, 8), (1, 4, 8), (1, 4, 8)), "attention takes q"),  # where are the heads?
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, words):
    with pytest.raises(ValueError, match=words):
        attention(*(jnp.zeros(shape) for shape in shapes))


def test_other_arguments_that_do_not_fit_are_refused():
    q, k, v = inputs(12)
    with pytest.raises(ValueError, match="all of one dtype"):
        attention(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"visible is bool\[12\]: it must be int32\[\]"):
        attention(q, k, v, visible=jnp.ones(12, bool))
    with pytest.raises(ValueError, match="a mask is for queries and keys of one sequence"):
        attention(q[:, :4], k, v, mask=BlockCausal(Causal(1), 2))
    with pytest.raises(ValueError, match="halves of 5 tokens needs 10 tokens, not 12"):
        attention(q, k, v, mask=TeacherForcing(BlockCausal(Causal(1), 1), 5))


# --- Forward mode ---------------------------------------------------------------------------------


def derivative(f, *args):
    """(out, its derivative along fixed directions of q, k and v), compiled."""
    directions = tuple(foreign.tensor(f"direction {i}", x.shape) for i, x in enumerate(args))
    return jax.jit(lambda *args: jax.jvp(f, args, directions))(*args)


@pytest.mark.parametrize(("mask", "length"), [(None, 811), SEQUENCES[2]], ids=str)
def test_in_forward_mode_attention_has_the_derivative_of_the_formula(mask, length):
    args = inputs(length)
    with forward_mode():
        found = derivative(functools.partial(attention, mask=mask), *args)
    assert_same(found, derivative(functools.partial(dense, mask=mask), *args))


def test_forward_mode_hides_keys_and_works_on_a_mesh():
    visible, args = jnp.int32(29), inputs(16, 40, batch=2, heads=4)
    wanted = derivative(lambda q, k, v: dense(q, k, v, visible=visible), *args)
    with jax.set_mesh(sharding.make_mesh(data=2, context=2, tensor=2)), forward_mode():
        found = derivative(lambda q, k, v: attention(q, k, v, visible=visible), *args)
    assert_same(found, wanted)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_kernel_has_no_jvp_outside_of_forward_mode_and_none_is_used_within(platform, monkeypatch):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    device = jax.sharding.AbstractDevice("any", 1, platform)
    mesh = AbstractMesh((1,) * 4, sharding.AXES, (AxisType.Auto,) * 4, abstract_device=device)
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

    def lowered():
        tangent = jax.jit(lambda x: jax.jvp(lambda x: attention(x, x, x), (x,), (x,)))
        return tangent.trace(x).lower(lowering_platforms=(platform,)).as_text()

    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
            lowered()
        with forward_mode():
            assert "custom_call" not in lowered()
        with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
            lowered()


# --- The kernel of a TPU --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="mask")
def interpreted(q, k, v, visible=None, *, mask=None):
    """Splash attention without a TPU."""
    return splash.attend(q, k, v, visible, mask=mask, interpret=True)


@pytest.mark.parametrize(
    ("mask", "queries", "keys"),
    [
        (None, 256, 256),
        (None, 200, 140),
        (BlockCausal(Causal(3), 32), 256, 256),
        (BlockCausal(Causal(3), 20), 250, 250),
        (BlockCausal(Causal(2, first_alone=True, window=3, sink=1), 20), 260, 260),
        (TeacherForcing(BlockCausal(Causal(2, window=4, sink=1), 20), 130), 260, 260),
    ],
    ids=str,
)
def test_the_kernel_of_a_tpu_computes_the_same(mask, queries, keys):
    args = inputs(queries, keys, heads=2, width=128)
    outputs = with_gradients(functools.partial(interpreted, mask=mask))(*args)
    wanted = with_gradients(functools.partial(tiled.attend, visible=None, mask=mask))(*args)
    assert_same(outputs, wanted)


def test_the_kernel_of_a_tpu_hides_what_is_not_visible():
    args = inputs(40, 300, batch=2, width=64)
    wanted = with_gradients(lambda q, k, v: dense(q, k[:, :170], v[:, :170]))(*args)
    assert_same(with_gradients(interpreted)(*args, jnp.int32(170)), wanted)


@pytest.mark.parametrize("visible", [20, 128, 130, 300])
def test_the_kernel_of_a_tpu_does_not_compute_with_blocks_of_keys_that_are_hidden(visible):
    """NaN there would spread to every query: a weight of 0 times NaN is NaN."""
    q, k, v = inputs(200, 300, batch=2, width=64)
    wanted = with_gradients(lambda q, k, v: dense(q, k[:, :visible], v[:, :visible]))(q, k, v)
    hidden = -(-visible // 128) * 128
    k, v = (x.at[:, hidden:].set(jnp.nan) for x in (k, v))
    assert_same(with_gradients(interpreted)(q, k, v, jnp.int32(visible)), wanted)


# --- The kernel of a CUDA device ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "kept"),
    [
        (None, 20, 40, 40),
        (None, 21, 257, 257),  # CLIP's features are 257
        (None, 20, 41, 30),
        (BlockCausal(Causal(3, first_alone=True, window=4, sink=1), 5), 65, 65, 65),
        (BlockCausal(Causal(3), 4), 48, 48, 31),
        (TeacherForcing(BlockCausal(Causal(2, window=3, sink=1), 5), 35), 70, 70, 70),
    ],
    ids=str,
)
def test_what_cudnn_is_given_computes_the_same(mask, queries, keys, kept, monkeypatch):
    """XLA stands in for cuDNN, at lengths that cuDNN supports."""
    xla = jax.nn.dot_product_attention

    def instead(q, k, v, *, implementation, **kw):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        return xla(*exact, implementation="xla", **kw).astype(q.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    args = inputs(queries, keys, batch=2, dtype=jnp.bfloat16)
    visible = None if kept == keys else jnp.int32(kept)
    result = with_gradients(lambda *x: cudnn.attend(*x, visible, mask=mask))(*args)
    exact = (x.astype(jnp.float32) for x in args)
    wanted = with_gradients(lambda *x: dense(*x, mask=mask, visible=visible))(*exact)
    assert_same(result, wanted, ROUNDING_BF16)


# --- Devices --------------------------------------------------------------------------------------

# What each mesh may send in the forward pass and in the backward pass beside it.
MESHES = [
    ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {}),
    ({"data": 2, "context": 2, "tensor": 2}, {"all-to-all": 4}, {"all-to-all": 4}),
    ({"data": 1, "fsdp": 2, "context": 4}, {"all-to-all": 4}, {"all-to-all": 4}),
]


def placed(args, mesh):
    """Arrays split over the mesh as the docstring of `attention` says."""
    spec = sharding.P(sharding.BATCH, "context", "tensor")
    return tuple(jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in args)


@pytest.mark.parametrize("mask", [None, BlockCausal(Causal(3, window=4, sink=1), 20)], ids=str)
@pytest.mark.parametrize(("axes", "forward", "backward"), MESHES, ids=str)
def test_eight_devices_compute_what_one_does_and_send_nothing_else(axes, forward, backward, mask):
    args = inputs(320, batch=4, heads=4)
    f = functools.partial(attention, mask=mask)
    wanted = with_gradients(f)(*args)
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        args = placed(args, mesh)
        assert_same(with_gradients(f)(*args), wanted)
        assert collectives(f, *args) == forward
        assert collectives(with_gradients(f), *args) == {
            name: forward[name] + backward[name] for name in forward
        }


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "batch", "heads"),
    [
        (None, 321, 321, 2, 4),  # tokens do not divide
        (BlockCausal(Causal(3), 10), 330, 330, 2, 3),  # nor heads, under a mask
        (None, 330, 330, 2, 3),  # nor heads, without
        (None, 330, 330, 1, 4),  # nor the batch
        (None, 330, 330, 2, 6),  # two groups of two devices
        (None, 330, 20, 2, 3),  # few keys
        (None, 21, 330, 2, 3),  # many, as those of a cache
        (TeacherForcing(BlockCausal(Causal(3), 10), 170), 340, 340, 2, 4),
    ],
    ids=str,
)
def test_what_does_not_divide_is_computed_all_the_same(mask, queries, keys, batch, heads):
    args = inputs(queries, keys, batch=batch, heads=heads)
    f = functools.partial(attention, mask=mask)
    wanted = with_gradients(f)(*args)
    with jax.set_mesh(sharding.make_mesh(data=2, context=4)):
        assert_same(with_gradients(f)(*args), wanted)


def test_few_keys_are_whole_on_every_device():
    (q, _, _), (_, k, v) = inputs(320, batch=2), inputs(20, batch=2)
    mesh = sharding.make_mesh(data=2, context=4)
    rows = jax.sharding.NamedSharding(mesh, sharding.P(sharding.BATCH))
    with jax.set_mesh(mesh):
        k, v = jax.device_put((k, v), rows)
        assert collectives(attention, *placed((q,), mesh), k, v) == {}


@pytest.mark.parametrize(
    ("heads", "sent"), [(3, {"all-gather": 2}), (6, {"all-to-all": 4, "all-gather": 2})]
)
def test_heads_that_do_not_divide_bring_keys_together(heads, sent):
    mesh = sharding.make_mesh(data=2, context=4)
    with jax.set_mesh(mesh):
        args = placed(inputs(320, batch=2, heads=heads), mesh)
        assert collectives(attention, *args) == sent


@pytest.mark.parametrize("heads", [3, 4])
def test_a_cache_is_seen_as_far_as_it_is_filled_on_any_mesh(heads):
    args, visible = inputs(40, 400, batch=2, heads=heads), jnp.int32(330)
    f = with_gradients(lambda *x: attention(*x[:3], visible=x[3]))
    wanted = f(*args, visible)
    with jax.set_mesh(sharding.make_mesh(data=2, context=2, tensor=2)):
        assert_same(f(*args, visible), wanted)


def test_a_cache_is_split_by_heads_and_is_not_sent():
    (q, _, _), (_, k, v) = inputs(40, batch=2, heads=4), inputs(400, batch=2, heads=4)
    mesh = sharding.make_mesh(data=2, context=2, tensor=2)
    by_heads = jax.sharding.NamedSharding(mesh, sharding.heads_spec(4, axis=0))
    with jax.set_mesh(mesh):
        k, v = jax.device_put((k, v), by_heads)
        assert k.sharding.shard_shape(k.shape) == (1, 400, 1, 8)
        assert collectives(attention, *placed((q,), mesh), k, v) == {"all-to-all": 2}


# --- Programs for other platforms -----------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, BlockCausal(Causal(3, window=9, sink=1), 1560)], ids=str)
@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (1, 2, 4, 1)], ids=str)
@pytest.mark.parametrize(
    ("platform", "kernel"), [("tpu", "tpu_custom_call"), ("cuda", "__cudnn$fmhaSoftmaxBackward")]
)
def test_the_mesh_chooses_the_kernel(platform, kernel, axes, mask, monkeypatch):
    """At the length of a real video, on a host that has no such device and no such library."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    device = jax.sharding.AbstractDevice("any", 1, platform)
    mesh = AbstractMesh(axes, sharding.AXES, (AxisType.Auto,) * 4, abstract_device=device)
    x = jax.ShapeDtypeStruct((2, 21 * 1560, 8, 128), jnp.bfloat16)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, mask=mask).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert kernel in text
    assert ("all_to_all" in text) == (axes[2] > 1)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [None, BlockCausal(Causal(3), 512), TeacherForcing(BlockCausal(Causal(2), 512), 4096)],
    ids=str,
)
def test_no_array_has_the_square_of_the_length(mask):
    length, heads = 8192, 4
    x = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    f = functools.partial(attention, mask=mask)
    scores = 4 * length**2
    for program, most in (jax.jit(f), scores / 2), (with_gradients(f), scores):
        assert program.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < most
