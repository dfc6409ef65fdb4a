"""f-distill: weights of the DMD gradient from the discriminator's logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_gan import BATCH, SLOPE, gradient, noisy

from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.losses.f_divergence import ForwardKL, ReverseKL
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.methods.f_distill import FDistill

FIELDS = dict(times=(1.0,), gan_weight=0.0)


def test_the_reverse_kl_is_dmd2():
    fields = dict(times=(1.0,), gan_weight=0.3)
    got, *_ = gradient(FDistill((2,), divergence=ReverseKL(), **fields))
    np.testing.assert_array_equal(got, gradient(DMD2((2,), **fields))[0])


def test_samples_alone_in_their_bins_are_dmd_without_a_prior():
    method = FDistill((2,), divergence=ForwardKL(), bins=100_000, prior=0.0, **FIELDS)
    plain, *_ = gradient(DMD((2,), times=(1.0,)))
    np.testing.assert_allclose(gradient(method)[0], plain, rtol=1e-5)


def test_the_gradient_is_weighted_by_the_density_ratio_of_each_sample():
    method = FDistill((2,), divergence=ForwardKL(), bins=1, ratio_clip=(1e-3, 1e3), **FIELDS)
    grad, _, rollout = gradient(method)
    plain, *_ = gradient(DMD((2,), times=(1.0,)))
    x_t, _ = noisy(method, rollout)
    ratio = jnp.exp(x_t @ SLOPE)
    wanted = (ratio / jnp.mean(ratio))[:, None] * plain
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-7)
    assert np.abs(grad - plain).max() > 0.01


def test_bins_are_of_the_times_before_the_shift():
    """Two samples of one shifted tenth, but of two tenths before, do not share a mean."""
    method = FDistill((2,), divergence=ForwardKL(), score_shift=5.0, prior=0.0, **FIELDS)
    t = shift_time(jnp.array([0.75, 0.85]), 5.0)
    assert (t > 0.9).all()
    np.testing.assert_allclose(method.weights(jnp.array([1.0, 2.0]), t), 1.0, rtol=1e-6)
    same = method.weights(jnp.array([1.0, 2.0]), shift_time(jnp.array([0.75, 0.76]), 5.0))
    assert same[1] / same[0] == pytest.approx(np.e, rel=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ratio_clip": (0.0, 1.0)}, "must ascend, from above 0"),
        ({"bins": 0}, "bins=0 must be 1 or more"),
        ({"prior": -1.0}, r"prior=-1\.0 0 or more"),
    ],
)
def test_numbers_without_a_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FDistill(BATCH["data"].shape[1:], **fields)
