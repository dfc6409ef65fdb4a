"""Whole train steps on meshes of eight devices, where nothing divides, are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import normal, tiny_dit, weights

from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.models import dit, wan
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.optimizer import Optimizer, per_role
from dmd_jax.training.step import init_state, train_step

pytestmark = pytest.mark.slow

# Thousands of sums in float32 (6e-8 each), in the norm of an array; 1e-6 was found.
ROUNDING = 1e-5
ROLES = ("generator", "fake_score")


class Momentum(Optimizer):
    """After one step, its state is the gradient itself."""

    def direction(self):
        return optax.trace(0.9)


TX = per_role({role: Momentum(1e-2, clip=None).transform(1) for role in ROLES})


def small_wan(heads, seed):
    config = WanConfig(8 * heads, 24, heads, 1, 3, 3, text_dim=5, freq_dim=8, reach=7)
    return Denoiser(weights(lambda rngs: Wan(config, rngs=rngs), seed))


def videos():
    """6 frames of 6 tokens in blocks of 3, by networks of 5, 3 and 6 heads."""
    shape = (6, 4, 6, 3)
    nets = {role: small_wan(n, n) for role, n in (("teacher", 5), ("generator", 3))}
    nets["fake_score"] = small_wan(6, 6)
    batch = {"cond": normal(1, 8, 3, 5), "uncond": jnp.zeros((8, 3, 5))}
    rollout = SelfForcing(Causal(3, window=4, sink=1))
    how = dict(times=(1.0, 0.5), shift=5.0, score_shift=5.0, guidance=2.0)
    return nets, DMD(shape, video=rollout, **how), batch, wan.SHARDING_RULES


def images():
    """Images of 9 tokens, by networks of 3 heads."""
    nets = {
        role: Denoiser(tiny_dit(seed, image_size=12, dim=24, heads=3))
        for seed, role in enumerate((*ROLES, "teacher"))
    }
    batch = {"cond": jnp.arange(8) % 3, "uncond": jnp.full(8, 3)}
    return nets, DMD((12, 12, 1), guidance=2.0), batch, dit.SHARDING_RULES


@functools.cache
def begin(make):
    """(frozen networks, state, batch, method, rules); arrays on the host, which a mesh takes as
    they are: from a device, each would be cut by a program of its own.
    """
    nets, method, batch, rules = make()
    frozen = {"teacher": nets.pop("teacher")}
    return *jax.device_get((frozen, init_state(nets, TX), batch)), method, rules


def train(make, axes, state=None, steps=1):
    """[(losses and other metrics, the state)] after each of some steps on a mesh, from a state or
    from weights.
    """
    frozen, first, batch, method, rules = begin(make)
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        frozen = jax.device_put(frozen, sharding.infer(frozen, rules, mesh))
        places = sharding.infer(first, rules, mesh)
        state = jax.device_put(first if state is None else state, places)
        step = functools.partial(train_step, method=method, tx=TX, update_generator=True)
        step = jax.jit(step, out_shardings=(places, None))
        batch, taken = sharding.global_batch(batch), []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, jax.random.key(0))
            taken.append((metrics, state))
    return taken


@functools.cache
def on_one_device(make):
    """After one step, and after two."""
    return jax.device_get(train(make, {"devices": jax.devices()[:1]}, steps=2))


def assert_same(found, wanted):
    """Metrics, gradients (in the optimizer's state), weights and averages: array by array."""
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(found))
    for (path, a), b in zip(found, jax.tree.leaves(wanted), strict=True):
        name, a, b = jax.tree_util.keystr(path), np.float64(a), np.float64(b)
        if np.isnan(b).any():  # a metric of times that were not drawn
            np.testing.assert_array_equal(a, b, name)
            continue
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= ROUNDING * size, (name, error, size)


# Alone, data splits the batch as fsdp does, and nothing else.
ALONE = [{"data": 1, axis: 8} for axis in ("fsdp", "context", "tensor")]
TOGETHER = {"data": 2, "fsdp": 2, "context": 2}


@pytest.mark.parametrize("axes", [*ALONE, TOGETHER], ids=str)
def test_a_step_on_images_is_that_of_one_device(axes):
    assert_same(train(images, axes)[0], on_one_device(images)[0])


@pytest.mark.parametrize("axes", ALONE, ids=str)
def test_a_step_on_videos_is_that_of_one_device(axes):
    assert_same(train(videos, axes)[0], on_one_device(videos)[0])


def test_a_run_on_videos_goes_on_on_another_mesh_and_each_step_is_that_of_one_device(tmp_path):
    first, second = on_one_device(videos)
    [found] = train(videos, TOGETHER)
    assert_same(found, first)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, found[1])
        checkpointer.wait()
        axes = {"data": 1, "context": 4, "tensor": 2}
        places = sharding.infer(found[1], wan.SHARDING_RULES, sharding.make_mesh(**axes))
        other = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            found[1],
            places,
        )
        restored, _, _ = checkpointer.restore_latest(other)
    assert_same(train(videos, axes, restored)[0], second)
