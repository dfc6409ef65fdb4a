"""DMD's gradient, loss and critic's regression, against arithmetic and exact Gaussian scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, exact

from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.losses.distribution_matching import (
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    masked_mean,
    teacher_error,
)

RNG = np.random.default_rng(0)
X0, REAL, FAKE = RNG.standard_normal((3, 2, 4, 3)).astype(np.float32)  # [B, F, D]
FRAMES = np.array([[True, True, False, True], [False, False, True, True]])


def test_masked_mean_counts_what_the_mask_keeps():
    assert masked_mean(X0) == pytest.approx(X0.mean(), rel=1e-5)
    assert masked_mean(X0, FRAMES) == pytest.approx(X0[FRAMES].mean(), rel=1e-5)
    assert masked_mean(X0, np.array([True, False])) == pytest.approx(X0[0].mean(), rel=1e-5)
    element = X0 > 0
    assert masked_mean(X0, element) == pytest.approx(X0[element].mean(), rel=1e-5)
    assert masked_mean(X0, np.zeros(2, bool)) == 0.0


def test_what_the_mask_drops_may_be_anything():
    x = np.where(FRAMES[..., None], X0, np.nan)
    assert masked_mean(x, FRAMES) == pytest.approx(X0[FRAMES].mean(), rel=1e-5)


def test_gradient_is_the_difference_over_each_samples_teacher_error():
    n = np.abs(X0 - REAL).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(dmd_gradient(X0, REAL, FAKE), (FAKE - REAL) / n, rtol=1e-5)
    np.testing.assert_array_equal(dmd_gradient(X0, REAL, FAKE, normalize=False), FAKE - REAL)


def test_a_teacher_closer_to_x0_makes_a_larger_gradient():
    # Some documents state the opposite; but the teacher's error is the divisor.
    near = X0 + 0.1 * (REAL - X0)
    fake = FAKE - REAL
    far = dmd_gradient(X0, REAL, REAL + fake)
    np.testing.assert_allclose(dmd_gradient(X0, near, near + fake), 10 * far, rtol=1e-4)


def test_gradient_normaliser_counts_what_the_mask_keeps():
    n = [np.abs(X0 - REAL)[b][FRAMES[b]].mean() for b in range(2)]
    wanted = (FAKE - REAL) / np.reshape(n, (2, 1, 1))
    np.testing.assert_allclose(dmd_gradient(X0, REAL, FAKE, mask=FRAMES), wanted, rtol=1e-5)


def test_gradient_normaliser_per_block_of_frames():
    n = np.abs(X0 - REAL).reshape(2, 2, 2, 3).mean((2, 3)).repeat(2, axis=1)[..., None]
    grad = dmd_gradient(X0, REAL, FAKE, frames_per_block=2)
    np.testing.assert_allclose(grad, (FAKE - REAL) / n, rtol=1e-5)
    np.testing.assert_allclose(teacher_error(X0, REAL, frames_per_block=2), n, rtol=1e-5)
    with pytest.raises(ValueError, match="4 frames do not divide into blocks of 3"):
        dmd_gradient(X0, REAL, FAKE, frames_per_block=3)


def test_a_block_that_is_masked_whole_leaves_the_others_alone():
    # Self-Forcing's mask drops a window's first block; LongLive's normaliser is per block.
    mask = np.array([[False, False, True, True]] * 2)
    grad = dmd_gradient(X0, REAL, FAKE, mask=mask, frames_per_block=2)
    n = np.abs(X0 - REAL)[:, 2:].mean((1, 2), keepdims=True)
    np.testing.assert_allclose(grad[:, 2:], ((FAKE - REAL) / n.repeat(4, 1))[:, 2:], rtol=1e-5)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["real", "fake"])
def test_a_prediction_that_is_not_finite_silences_its_sample_alone(bad, which):
    predictions = {"real": REAL.copy(), "fake": FAKE.copy()}
    predictions[which][0, 2, 1] = bad
    grad = dmd_gradient(X0, predictions["real"], predictions["fake"])
    np.testing.assert_array_equal(grad[0], 0.0)
    np.testing.assert_array_equal(grad[1], dmd_gradient(X0, REAL, FAKE)[1])


@pytest.mark.parametrize("fake", [FAKE, REAL])
def test_a_teacher_error_of_zero_silences_its_sample_alone(fake):
    x0 = np.stack([REAL[0], X0[1]])  # x/0 and 0/0 in sample 0
    grad = dmd_gradient(x0, REAL, fake)
    np.testing.assert_array_equal(grad[0], 0.0)
    np.testing.assert_array_equal(grad[1], dmd_gradient(X0, REAL, fake)[1])


def test_gradient_is_float32_and_a_constant():
    grad = dmd_gradient(*(jnp.asarray(a, jnp.bfloat16) for a in (X0, REAL, FAKE)))
    assert grad.dtype == jnp.float32
    slopes = jax.grad(lambda *a: jnp.sum(dmd_gradient(*a)), (0, 1, 2))(X0, REAL, FAKE)
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("mask", [None, np.array([True, False]), FRAMES, X0 > 0])
def test_loss_has_the_value_and_the_gradient_that_it_promises(mask):
    grad = FAKE - REAL
    kept = np.ones_like(X0, bool) if mask is None else mask
    kept = np.broadcast_to(np.reshape(kept, kept.shape + (1,) * (3 - kept.ndim)), X0.shape)
    value, slope = jax.value_and_grad(dmd_loss)(X0, grad, mask)
    np.testing.assert_allclose(value, 0.5 * np.mean(grad[kept] ** 2), rtol=1e-5)
    # grad / N, neither 2 grad nor grad: 0.5 cancels the square's 2 and the mean divides by N.
    np.testing.assert_allclose(slope, np.where(kept, grad / kept.sum(), 0), rtol=1e-5)


def test_loss_needs_no_float64_where_the_naive_form_fails():
    x0 = jnp.asarray(1e4 * X0, jnp.bfloat16)
    grad = FAKE - REAL

    def naive(x0, grad):
        target = jax.lax.stop_gradient(x0 - grad.astype(x0.dtype))
        return 0.5 * jnp.mean(jnp.square((x0 - target).astype(jnp.float32)))

    value, slope = jax.value_and_grad(dmd_loss)(x0, grad)
    assert slope.dtype == jnp.bfloat16
    # One rounding to bfloat16: half an ulp is 2^-9 of the value's power of two.
    np.testing.assert_allclose(np.float32(slope), grad / grad.size, rtol=2.0**-8)
    np.testing.assert_allclose(value, 0.5 * np.mean(grad**2), rtol=1e-5)
    wrong_value, wrong = jax.value_and_grad(naive)(x0, grad)
    assert np.mean(np.abs(np.float32(wrong) * grad.size - grad) > 0.5 * np.abs(grad)) > 0.5
    assert abs(wrong_value / value - 1) > 0.5


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_loss_in_float32_does_not_depend_on_the_size_of_x0(scale):
    grad = FAKE - REAL
    value, slope = jax.value_and_grad(dmd_loss)(scale * X0, grad)
    np.testing.assert_array_equal(value, dmd_loss(X0, grad))
    np.testing.assert_allclose(slope, grad / grad.size, rtol=1e-6)


def test_loss_refuses_float16():
    with pytest.raises(ValueError, match="underflows in float16"):
        dmd_loss(jnp.asarray(X0, jnp.float16), FAKE - REAL)


def test_a_generator_that_is_not_finite_makes_a_loss_that_is_not():
    # The train step then skips the update; a silent zero would hide a broken generator.
    x0 = X0.copy()
    x0[0, 0, 0] = np.inf
    assert not jnp.isfinite(dmd_loss(jnp.asarray(x0), dmd_gradient(x0, REAL, FAKE)))


def test_denoising_loss_by_hand():
    error = (REAL - FAKE) ** 2
    assert denoising_loss(REAL, FAKE) == pytest.approx(error.mean(), rel=1e-5)
    weight = np.array([2.0, 0.5], np.float32)
    wanted = (weight[:, None, None] * error).mean()
    assert denoising_loss(REAL, FAKE, weight) == pytest.approx(wanted, rel=1e-5)
    wanted = (weight[:, None, None] * error)[FRAMES].mean()
    assert denoising_loss(REAL, FAKE, weight, FRAMES) == pytest.approx(wanted, rel=1e-5)
    low = denoising_loss(jnp.asarray(REAL, jnp.bfloat16), jnp.asarray(FAKE, jnp.bfloat16))
    assert low.dtype == jnp.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: dmd_gradient(X0, REAL[:1], FAKE),
        lambda: dmd_gradient(X0, REAL, FAKE[..., :1]),
        lambda: dmd_loss(X0, (FAKE - REAL)[:, :1]),
        lambda: dmd_loss(X0, FAKE - REAL, FRAMES[:1]),
        lambda: dmd_loss(X0, FAKE - REAL, np.float32(FRAMES)),
        lambda: denoising_loss(REAL, FAKE[0]),
    ],
    ids=range(6),
)
def test_the_declared_shapes_find_what_would_broadcast_silently(call):
    with pytest.raises(TypeError, match="Type-check error"):
        call()


# From here on the scores are exact: data N(m, s^2), generator N(b, a^2), both in one dimension.
SCHEDULES = [FlowMatching(), EDM(), VP()]
T = 0.4
TEACHER_MEAN, TEACHER_STD, SCALE, SHIFT = 0.7, 0.5, 1.3, -0.4


def score(x_t, mean, std, alpha, sigma):
    """d log p(x_t) / d x_t of the noised N(mean, std^2)."""
    return (alpha * mean - x_t) / (alpha**2 * std**2 + sigma**2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_denoiser_is_tweedies(schedule):
    alpha, sigma = float(schedule.alpha(T)), float(schedule.sigma(T))
    x_t = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    wanted = (x_t + sigma**2 * score(x_t, TEACHER_MEAN, TEACHER_STD, alpha, sigma)) / alpha
    x0 = exact([[TEACHER_MEAN]], TEACHER_STD, schedule)(x_t, jnp.full(7, T), None)
    np.testing.assert_allclose(x0, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient_with_exact_scores_is_their_difference(schedule):
    alpha, sigma = float(schedule.alpha(T)), float(schedule.sigma(T))
    x_t = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    real = exact([[TEACHER_MEAN]], TEACHER_STD, schedule)(x_t, jnp.full(7, T), None)
    fake = exact([[SHIFT]], SCALE, schedule)(x_t, jnp.full(7, T), None)
    difference = score(x_t, SHIFT, SCALE, alpha, sigma) - score(
        x_t, TEACHER_MEAN, TEACHER_STD, alpha, sigma
    )
    # d x_t / d x0 = alpha, so this is (sigma / alpha)^2 times the gradient of the KL in x0.
    wanted = (sigma / alpha) ** 2 * alpha * difference
    grad = dmd_gradient(x_t, real, fake, normalize=False)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_generator_of_equal_width_is_pulled_to_the_teachers_mean(schedule):
    alpha, sigma = float(schedule.alpha(T)), float(schedule.sigma(T))
    x_t = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    real, fake = (exact([[m]], TEACHER_STD, schedule) for m in (TEACHER_MEAN, SHIFT))
    t = jnp.full(7, T)
    grad = dmd_gradient(x_t, real(x_t, t, None), fake(x_t, t, None), normalize=False)
    # The same for every x_t; negative if the generator's mean is the lower one: descent raises it.
    width = sigma**2 / (alpha**2 * TEACHER_STD**2 + sigma**2)
    np.testing.assert_allclose(grad, width * (SHIFT - TEACHER_MEAN), rtol=1e-4)
    assert np.all(np.asarray(grad) < 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_descends_the_diffused_kl(schedule):
    """E of the loss's gradient = (sigma / alpha)^2 d KL(generator || teacher at t) / d weights."""
    alpha, sigma = schedule.alpha(T), schedule.sigma(T)

    def kl(scale, shift):
        fake = jnp.square(alpha * scale) + jnp.square(sigma)
        real = jnp.square(alpha * TEACHER_STD) + jnp.square(sigma)
        away = jnp.square(alpha * (shift - TEACHER_MEAN))
        return 0.5 * (jnp.log(real / fake) + (fake + away) / real - 1)

    # The integrand is quadratic in z and eps, so the four points (±1, ±1) integrate it exactly.
    z = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
    eps = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
    teacher, fake = (
        exact([[m]], s, schedule) for m, s in [(TEACHER_MEAN, TEACHER_STD), (SHIFT, SCALE)]
    )

    def loss(generator):
        x0 = generator(z, jnp.ones(4), None)
        t = jnp.full(4, T)
        x_t = schedule.add_noise(x0, eps, t)
        real, predicted = teacher(x_t, t, None), fake(x_t, t, None)
        return dmd_loss(x0, dmd_gradient(x0, real, predicted, normalize=False))

    grad = jax.grad(loss)(affine(SCALE, SHIFT, schedule)).net
    wanted = [(sigma / alpha) ** 2 * g for g in jax.grad(kl, (0, 1))(SCALE, SHIFT)]
    np.testing.assert_allclose([grad.scale, grad.shift], wanted, rtol=1e-3)
