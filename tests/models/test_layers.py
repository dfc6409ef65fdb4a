"""The scan over layers: what the backward pass of a layer keeps, and where."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import toys

from dmd_jax.models.layers import scan

DEPTH, B, D = 3, 4, 8


def loss(x, weights, remat):
    def layer(x, weight):
        return jnp.tanh(jnp.tanh(x @ weight) @ weight.T), None

    return jnp.sum(scan(layer, x, weights, remat=remat, unroll=1)[0])


@pytest.fixture
def gradients():
    """{remat: the gradient of all arguments, not compiled}."""
    return {remat: jax.grad(partial(loss, remat=remat), (0, 1)) for remat in ("full", "offload")}


def test_inputs_that_wait_in_the_memory_of_the_host_give_the_same_gradient(gradients):
    x, weights = toys.normal(0, B, D), toys.normal(1, DEPTH, D, D)
    toys.assert_same(*(jax.jit(gradient)(x, weights) for gradient in gradients.values()))


def test_only_the_inputs_of_layers_wait_there(gradients):
    shapes = jax.ShapeDtypeStruct((B, D), "float32"), jax.ShapeDtypeStruct((DEPTH, D, D), "float32")
    text = {remat: str(jax.make_jaxpr(f)(*shapes)) for remat, f in gradients.items()}
    assert "<host>" not in text["full"] and f"f32[{DEPTH},{B},{D}]" in text["full"]
    assert f"f32<host>[{DEPTH},{B},{D}]" in text["offload"]
    assert f"f32[{DEPTH},{B},{D}]" not in text["offload"]  # nor do they stay on the devices
    assert f"f32<host>[{DEPTH},{D},{D}]" not in text["offload"]
