"""FLOPs counted from a jaxpr are those of the closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import toys
from jax.experimental import pallas as pl

from dmd_jax.devices import sharding
from dmd_jax.training.flops import count

P = jax.P
B, N, K, M = 3, 4, 5, 6


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def test_a_matrix_product_takes_two_flops_an_entry_and_contracted_index():
    assert count(jnp.matmul, shape(N, K), shape(K, M)) == 2 * N * K * M
    assert count(jnp.matmul, shape(B, N, K), shape(B, K, M)) == 2 * B * N * K * M
    two_axes = partial(jnp.einsum, "bnk,bmk->nm")
    assert count(two_axes, shape(B, N, K), shape(B, M, K)) == 2 * B * N * K * M


def test_elementwise_work_is_not_counted():
    assert count(lambda x: jnp.sum(jnp.exp(x) + x), shape(N, K)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_takes_a_filter_for_every_output(groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    flops = count(convolve, shape(B, 8, 8, 4), shape(3, 3, 4 // groups, 10))
    assert flops == 2 * B * 6 * 6 * 10 * 3 * 3 * 4 // groups


def test_a_gradient_takes_two_more_products():
    def loss(w, x):
        return jnp.sum(jnp.square(x @ w))

    unit = 2 * N * K * M
    assert count(jax.grad(loss), shape(K, M), shape(N, K)) == 2 * unit
    assert count(jax.grad(loss, (0, 1)), shape(K, M), shape(N, K)) == 3 * unit


def test_rematerialisation_takes_the_forward_pass_again():
    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.square(jnp.sin(x @ w) @ w))(w, x))

    unit = 2 * N * K * K
    plain = count(jax.value_and_grad(lambda w, x: jnp.sum(jnp.square(jnp.sin(x @ w) @ w))),
                  shape(K, K), shape(N, K))  # fmt: skip
    assert plain == 5 * unit  # two forward, three backward: x needs no gradient
    assert count(jax.value_and_grad(loss), shape(K, K), shape(N, K)) > plain


def test_a_scan_counts_its_body_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights, unroll=2)[0]

    unit = 2 * N * K * K
    assert count(layers, shape(N, K), shape(7, K, K)) == 7 * unit
    grad = jax.grad(lambda w, x: jnp.sum(layers(x, w)))
    assert count(grad, shape(7, K, K), shape(N, K)) == 3 * 7 * unit


def test_what_no_result_needs_does_not_count():
    def first(x, weights):
        def layer(x, w):
            return x @ w, None

        taps, _ = jax.lax.scan(layer, x, weights[:2])
        jax.lax.scan(jax.checkpoint(layer), taps, weights[2:])  # nobody has its result
        return taps

    assert count(first, shape(N, K), shape(7, K, K)) == 2 * 2 * N * K * K


def test_a_loop_of_constant_length_needs_no_help_and_one_of_traced_length_does():
    def loop(length, x, w):
        return jax.lax.fori_loop(0, length, lambda _, x: x @ w, x)

    x, w, unit = shape(N, K), shape(K, K), 2 * N * K * K
    assert count(lambda x, w: loop(3, x, w), x, w) == 3 * unit
    length = jax.ShapeDtypeStruct((), jnp.int32)
    assert count(loop, length, x, w, trips={"": 2.5}) == 2.5 * unit
    with pytest.raises(ValueError, match="expected number of iterations in `trips`"):
        count(loop, length, x, w)


def test_loops_of_traced_length_have_numbers_by_the_jitted_function_that_they_are_in():
    def inner(length, x, w):
        return jax.lax.fori_loop(0, length, lambda _, x: x @ w, x)

    @jax.jit
    def outer(length, x, w):
        return jax.lax.fori_loop(0, length, lambda _, x: inner(length, x, w), x)

    length, unit = jax.ShapeDtypeStruct((), jnp.int32), 2 * N * K * K
    trips = {"": 2.5, "outer": 4}
    assert count(outer, length, shape(N, K), shape(K, K), trips=trips) == 4 * 2.5 * unit
    with pytest.raises(ValueError, match="expected number of iterations"):
        count(outer, length, shape(N, K), shape(K, K), trips={"outer": 4})


def test_the_larger_branch_counts():
    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    flag = jax.ShapeDtypeStruct((), jnp.bool)
    assert count(either, flag, shape(N, K), shape(K, K)) == 2 * 2 * N * K * K


def test_nested_functions_count_once():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    unit = 2 * N * K * M
    assert count(jax.jit(product), shape(N, K), shape(K, M)) == unit
    grad = jax.value_and_grad(lambda x, w: jnp.sum(product(x, w)), (0, 1))
    assert count(grad, shape(N, K), shape(K, M)) == 3 * unit


def test_parts_on_several_devices_count_together():
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )
    assert count(product, shape(8, K), shape(K, M)) == 2 * 8 * K * M


def test_a_kernel_counts_for_every_part_of_its_grid():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    product = pl.pallas_call(
        kernel,
        out_shape=shape(16, 8),
        grid=(4,),
        in_specs=[pl.BlockSpec((4, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
    )
    assert count(product, shape(16, 8), shape(8, 8)) == 2 * 16 * 8 * 8


def test_a_transformer_costs_what_its_weights_and_its_attention_say():
    net = toys.tiny_dit(0)
    c = net.config
    batch, tokens = 5, (c.image_size // c.patch) ** 2
    token_weights = (
        sum(c.depth * n for n in (c.dim * 3 * c.dim, c.dim * c.dim, 3 * c.dim * c.hidden))
        + 2 * c.dim * c.patch**2 * c.channels
    )  # patch and head
    sample_weights = 256 * c.dim + c.dim * c.dim + c.dim * 6 * c.dim + c.dim * 2 * c.dim
    attention = c.depth * 2 * tokens * tokens * c.dim
    wanted = 2 * batch * (tokens * token_weights + sample_weights + attention)
    label = jax.ShapeDtypeStruct((batch,), jnp.int32)
    flops = count(type(net).__call__, net, shape(batch, *c.sample_shape), shape(batch), label)
    assert flops == wanted
