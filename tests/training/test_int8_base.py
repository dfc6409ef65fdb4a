"""Adapters on a base in eight bits (QLoRA, Dettmers et al. 2023): what is trained and exported."""

from functools import partial

import jax
import jax.numpy as jnp
import programs
import pytest
import toys

from dmd_jax import weights
from dmd_jax.devices.paths import named_leaves
from dmd_jax.models.layers import is_int8
from dmd_jax.training.plan import _inputs
from dmd_jax.training.run import build
from dmd_jax.weights import adapters

ROLES = ("teacher", "generator", "fake_score")
X = toys.normal(0, 2, 28, 28, 1), jnp.array([0.3, 0.8]), jnp.array([1, 9])


@pytest.fixture(scope="module")
def resolve(teacher, data_dir):
    """A tiny run of configs/dmd.py:lora, some roles of which are int8."""

    def call(roles=ROLES):
        settings = {f"{role}.compute.weights_dtype": "int8" for role in roles}
        settings |= {"generator.adapter.rank": 2, "fake_score.adapter.rank": 3}
        settings["generator.compute.remat"] = "full"  # a setting in which roles may differ
        config = programs.config(teacher, data_dir, variant="lora", **settings)
        return build(config, jax.devices()[:1])

    return call


@pytest.fixture(scope="module")
def run(resolve):
    return resolve()


@pytest.fixture(scope="module")
def frozen(run):
    return run.load_frozen()


@pytest.fixture(scope="module")
def adapter(run):
    shapes = run.bind.shapes("generator")
    return {name: toys.normal(i, *x.shape) for i, (name, x) in enumerate(shapes.items())}


def rounded(net):
    """The network with the floats that its `Int8` stand for."""
    return jax.tree.map(lambda x: x.plain if is_int8(x) else x, net, is_leaf=is_int8)


def test_all_roles_share_one_base_in_eight_bits(run, frozen, resolve):
    assert set(run.frozen) == {"teacher"}
    dtypes = {name: x.dtype for name, x in named_leaves(frozen["teacher"].net.blocks).items()}
    assert {dtypes[name] for name in dtypes if name.endswith("kernel/value/values")} == {
        jnp.dtype("int8")
    }
    state, frozen_shape = run.state_shape(), run.frozen_shape()
    assert {x.dtype for x in jax.tree.leaves(state.nets)} == {jnp.dtype("float32")}
    with jax.set_mesh(run.mesh):  # both steps can be traced
        for kind in (True, False):
            step = partial(run.step, update_generator=kind)
            jax.eval_shape(step, state, frozen_shape, *_inputs(run))
    # A teacher in floats is another network.
    assert set(resolve(["generator", "fake_score"]).frozen) == {"teacher", "generator_base"}


def test_outputs_and_gradients_are_those_of_an_adapter_on_the_rounded_floats(run, frozen, adapter):
    scale = run.bind.lora["generator"].scale
    floats = rounded(frozen["teacher"])

    def in_int8(adapter, x):
        return jnp.sum(jnp.square(run.bind.network("generator", adapter, frozen)(x, *X[1:])))

    def in_floats(adapter, x):
        net = adapters.attach(floats.net, adapter, scale)
        return jnp.sum(jnp.square(type(floats)(net, floats.schedule, floats.prediction)(x, *X[1:])))

    a, b = (jax.jit(jax.value_and_grad(f, (0, 1)))(adapter, X[0]) for f in (in_int8, in_floats))
    toys.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(a[1]))


def test_an_export_adds_the_adapter_to_the_weights_of_the_file(run, frozen, adapter, teacher):
    with jax.set_mesh(run.mesh):
        merged = run.merged("generator", adapter, frozen)
    scale = run.bind.lora["generator"].scale
    base = weights.denoiser(teacher, unroll=6, remat="full").net
    toys.assert_same(merged.net, adapters.merge(base, adapter, scale))
    # On the base as it is in memory, W is rounded.
    other = run.bind.merged("generator", adapter, frozen)
    wanted = adapters.merge(rounded(frozen["teacher"]).net, adapter, scale)
    toys.assert_same(jax.tree.leaves(other.net), jax.tree.leaves(wanted))
    assert not jnp.array_equal(merged.net.blocks.qkv.kernel[...], other.net.blocks.qkv.kernel[...])
