"""Schedules, shifts and the law of the drawn times, against closed forms and published numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.diffusion.schedule import (
    EDM,
    VP,
    FlowMatching,
    Schedule,
    align,
    check_steps,
    check_times,
    draw_step_times,
    sample_time,
    shift_time,
    step_times,
)

TIMES = np.linspace(0.0, 1.0, 101, dtype=np.float32)
ULP = 2.0**-23


def test_flow_matching_is_the_straight_path():
    flow = FlowMatching()
    np.testing.assert_array_equal(flow.sigma(TIMES), TIMES)
    np.testing.assert_array_equal(flow.alpha(TIMES), 1 - TIMES)


@pytest.mark.parametrize("schedule", [FlowMatching(), EDM(), VP()])
def test_numbers_of_the_host_are_computed_on_the_host(schedule):
    for level in (schedule.alpha, schedule.sigma):
        host, device = level(TIMES), level(jnp.asarray(TIMES))
        assert isinstance(host, np.ndarray) and isinstance(device, jax.Array)
        assert host.dtype == device.dtype == np.float32
        np.testing.assert_allclose(host, device, rtol=16 * ULP, atol=ULP)


def test_vp_preserves_variance_and_follows_its_beta():
    vp = VP()
    np.testing.assert_allclose(vp.alpha(TIMES) ** 2 + vp.sigma(TIMES) ** 2, 1.0, atol=4 * ULP)
    # d log(alpha) / dt = -beta(t) / 2, with beta linear from 0.1 to 20 (Song et al., equation 33).
    slope = jax.vmap(jax.grad(lambda t: jnp.log(vp.alpha(t))))(jnp.asarray(TIMES))
    np.testing.assert_allclose(slope, -0.5 * (0.1 + TIMES * 19.9), rtol=1e-5)


def test_vp_sigma_keeps_its_digits_near_the_data():
    t = np.array([1e-6, 1e-5, 1e-4])
    exact = np.sqrt(-np.expm1(-0.1 * t - 0.5 * 19.9 * t**2))
    np.testing.assert_allclose(VP().sigma(t), exact, rtol=8 * ULP)


@pytest.mark.parametrize("index, sigma", [(0, 0.002), (20, 0.00323), (500, 2.527), (980, 72.05)])
def test_edm_reproduces_the_table_of_the_published_run(index, sigma):
    # DMD2 tabulates 1000 noise levels, ascending; its entry i is t = i / 999 here.
    np.testing.assert_allclose(EDM().sigma(index / 999), sigma, rtol=2e-3)


def test_edm_ramp_has_its_ends_and_inverts():
    edm = EDM()
    np.testing.assert_allclose(edm.sigma(np.array([0.0, 1.0])), [0.002, 80.0], rtol=16 * ULP)
    sigma = np.asarray(edm.sigma(TIMES), np.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    np.testing.assert_allclose((sigma ** (1 / 7) - low) / (high - low), TIMES, atol=8 * ULP)
    np.testing.assert_array_equal(edm.alpha(TIMES), 1.0)


@pytest.mark.parametrize("schedule", [FlowMatching(), EDM(), VP()])
@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_add_noise_mixes_each_sample_or_frame_at_its_own_time(schedule, shape):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 2, 3, 4, 1), dtype=np.float32)
    t = rng.uniform(0.1, 0.9, shape).astype(np.float32)
    x_t = schedule.add_noise(x0, eps, t)
    for place in np.ndindex(*shape):
        alpha, sigma = schedule.alpha(t[place]), schedule.sigma(t[place])
        np.testing.assert_allclose(
            x_t[place], alpha * x0[place] + sigma * eps[place], rtol=1e-6, atol=1e-6
        )


def test_add_noise_is_float32_whatever_the_data_are():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert FlowMatching().add_noise(x, x, jnp.full(2, 0.5)).dtype == jnp.float32


def test_align_adds_trailing_axes():
    assert align(jnp.ones(2), jnp.ones((2, 3, 4))).shape == (2, 1, 1)
    assert align(jnp.ones((2, 3)), jnp.ones((2, 3, 4))).shape == (2, 3, 1)
    assert align(0.5, jnp.ones((2, 3))).shape == (1, 1)


def test_schedules_are_values():
    assert hash(EDM()) == hash(EDM()) and EDM() == EDM() != EDM(sigma_max=100.0)
    with pytest.raises(TypeError, match="Schedule must define alpha"):
        Schedule().alpha(0.5)


@pytest.mark.parametrize(
    "shift, wanted",
    [
        # The warped lists of Self-Forcing and, after them, the last entry of its tables.
        (5.0, [1000, 937.5, 833.3333, 625, 4.9801]),
        (8.0, [1000, 960, 888.8889, 727.2727, 7.9444]),
        (1.0, [1000, 750, 500, 250, 1]),
    ],
)
def test_shift_reproduces_published_step_lists(shift, wanted):
    times = np.array([1.0, 0.75, 0.5, 0.25, 0.001])
    np.testing.assert_allclose(1000 * shift_time(times, shift), wanted, rtol=1e-5)


def test_shifts_compose_invert_and_keep_the_ends():
    np.testing.assert_allclose(
        shift_time(shift_time(TIMES, 2.0), 4.0), shift_time(TIMES, 8.0), atol=4 * ULP
    )
    np.testing.assert_allclose(shift_time(shift_time(TIMES, 5.0), 1 / 5), TIMES, atol=8 * ULP)
    np.testing.assert_array_equal(shift_time(TIMES[[0, -1]], 5.0), [0, 1])


def test_step_times_are_even_and_end_before_the_data():
    assert step_times(4) == (1.0, 0.75, 0.5, 0.25)
    assert step_times(1) == (1.0,)


@pytest.mark.parametrize("steps", [-1, 0, 100_000_000])
def test_numbers_of_steps_that_no_sampler_takes_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be 1 or more, and 10,000 at most"):
        check_steps(steps)


@pytest.mark.parametrize("shift", [0.0, math.nan, math.inf])
def test_a_shift_that_is_no_number_above_0_is_refused(shift):
    with pytest.raises(ValueError, match=f"score_shift={shift} must be above 0"):
        check_times(score_shift=shift, clip=(0.0, 1.0))


def unshift(t, shift):
    return t / (shift - (shift - 1) * t)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.5)])
def test_sample_time_follows_its_law(shift, low, high):
    n = 20_000
    t = sample_time(jax.random.key(0), (n,), low=low, high=high, shift=shift, clip=(0.0, 1.0))
    t = np.sort(np.asarray(t, np.float64))
    law = (unshift(t, shift) - low) / (high - low)
    rank = np.arange(n) / n
    distance = max(np.max(law - rank), np.max(rank + 1 / n - law))
    assert distance < 1.63 / np.sqrt(n)  # Kolmogorov-Smirnov at one per cent


def test_sample_time_of_self_forcing_piles_up_where_it_is_known_to():
    t = np.asarray(sample_time(jax.random.key(1), (50_000,), shift=5.0))
    assert t.min() == np.float32(0.02) and t.max() == np.float32(0.98)
    # Self-Forcing draws integers, 9.2 % and 0.5 % of which are clipped; the exact shares are these.
    above, below = 1 - unshift(0.98, 5), unshift(0.02, 5)
    assert abs(above - 0.092) < 1e-3
    np.testing.assert_allclose(np.mean(t == t.max()), above, atol=3 * np.sqrt(above / t.size))
    np.testing.assert_allclose(np.mean(t == t.min()), below, atol=3 * np.sqrt(below / t.size))
    np.testing.assert_allclose(t.mean(), 0.7457, atol=3e-3)
    np.testing.assert_allclose(np.median(t), 0.8333, atol=5e-3)


def test_drawn_step_times_have_one_time_in_each_interval():
    keys = jax.random.split(jax.random.key(0), 7000)
    times = np.asarray(jax.jit(jax.vmap(lambda key: draw_step_times(key, 2, 8)))(keys))
    numbers = np.count_nonzero(times, axis=1)
    for number in range(2, 9):
        drawn = times[numbers == number]
        assert len(drawn) == pytest.approx(1000, abs=4 * np.sqrt(1000))
        assert (drawn[:, 0] == 1).all() and not drawn[:, number:].any()
        borders = np.linspace(0.98, 0.02, number)
        inner = drawn[:, 1:number]
        assert (inner <= borders[:-1] + 1e-6).all() and (inner >= borders[1:] - 1e-6).all()
        middles = (borders[:-1] + borders[1:]) / 2
        deviation = 0.96 / (number - 1) / np.sqrt(12 * len(drawn))
        np.testing.assert_allclose(inner.mean(0), middles, atol=4 * deviation)


@pytest.mark.parametrize("step", range(4))
def test_sample_time_keeps_to_the_exit_steps_interval(step):
    # In Self-Forcing the interval is meant before the shift: step 1 of 4 is 750 to 500, drawn at
    # shift 5 between 937.5 and 833.3. Low may be a traced array.
    low, high = 0.75 - step / 4, 1.0 - step / 4
    t = jax.jit(
        lambda low, high: sample_time(jax.random.key(2), (999,), low=low, high=high, shift=5.0)
    )(low, high)
    low, high = np.clip(shift_time(np.array([low, high]), 5.0), 0.02, 0.98)
    assert low <= t.min() < low + 0.02 and high - 0.01 < t.max() <= np.float32(high)


def test_sample_time_takes_an_interval_for_each_sample():
    low = jnp.array([0.1, 0.6])
    t = sample_time(jax.random.key(3), (500, 2), low=low, high=low + 0.1)
    assert np.all((t >= low) & (t <= low + 0.1))
