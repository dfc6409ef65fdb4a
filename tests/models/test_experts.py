"""Experts: which network is called, what gets the gradient, and their file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned
from dmd_jax.diffusion.schedule import EDM
from dmd_jax.models.experts import Experts, combine, expert_of

NETS = [Denoiser(toys.tiny_mlp(seed)) for seed in range(3)]
THREE = combine(NETS, (0.8, 0.5))
X = toys.normal(0, 4, 2)


@pytest.mark.parametrize(
    "time, number", [(1.0, 0), (0.8, 0), (0.79, 1), (0.5, 1), (0.49, 2), (0.0, 2)]
)
def test_the_time_chooses_and_a_boundary_belongs_to_the_noisier(time, number):
    t = jnp.full(4, time)
    np.testing.assert_array_equal(THREE(X, t, None), NETS[number](X, t, None))


def test_a_number_chooses_whatever_the_time():
    t = jnp.full(4, 0.9)
    for number, net in enumerate(NETS):
        np.testing.assert_array_equal(expert_of(THREE, number)(X, t, None), net(X, t, None))
    assert expert_of(NETS[0], 1) is NETS[0]


def test_only_the_called_network_gets_a_gradient():
    def loss(denoiser, number):
        return jnp.sum(expert_of(denoiser, number)(X, jnp.full(4, 0.9), None))

    grads = jax.jit(jax.grad(loss))(THREE, 1).net.nets
    moved = [any(jnp.any(g != 0) for g in jax.tree.leaves(grad)) for grad in grads]
    assert moved == [False, True, False]


def test_boundaries_are_in_the_units_of_the_networks():
    edm = [Denoiser(toys.tiny_mlp(seed), EDM(), EDMPreconditioned()) for seed in range(2)]
    pair = combine(edm, (0.5,))
    assert pair.net.boundaries == pytest.approx([np.log(EDM().sigma(0.5)) / 4])
    for time, one in ((0.6, edm[0]), (0.4, edm[1])):
        t = jnp.full(4, time)
        np.testing.assert_array_equal(pair(X, t, None), one(X, t, None))


@pytest.mark.parametrize("boundaries", [(), (0.5,), (0.5, 0.8), (1.0, 0.5), (0.5, 0.0)])
def test_boundaries_that_do_not_divide_the_networks_are_refused(boundaries):
    with pytest.raises(ValueError, match="must be 2 times, descending within"):
        combine(NETS, boundaries)


@pytest.mark.parametrize(
    "other",
    [
        Denoiser(toys.tiny_dit(0, depth=1), prediction=X0()),
        Denoiser(toys.tiny_dit(0), EDM(), X0()),
        Denoiser(toys.tiny_dit(0)),
    ],
    ids=["config", "schedule", "prediction"],
)
def test_experts_that_differ_are_refused(other):
    """One schedule, prediction and config is that of all: another would be silently lost."""
    with pytest.raises(ValueError, match=r"expert 1 is of .*, but expert 0 of .*: all must agree"):
        combine([Denoiser(toys.tiny_dit(0), prediction=X0()), other], (0.5,))


def test_a_file_of_experts_is_read_again_as_they_are(tmp_path):
    pair = combine([Denoiser(toys.tiny_dit(seed)) for seed in range(2)], (0.875,))
    weights.save(tmp_path / "pair.safetensors", pair, phases=(2, 2))
    read = weights.denoiser(tmp_path / "pair.safetensors", remat="full")
    assert isinstance(read.net, Experts) and read.net.boundaries == (875.0,)
    assert [net.config.remat for net in read.net.nets] == ["full", "full"]
    toys.assert_same(jax.tree.leaves(read), jax.tree.leaves(pair))
    assert weights.notes(tmp_path / "pair.safetensors") == {"phases": [2, 2]}
