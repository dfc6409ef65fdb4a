"""One network as a function to x0: parametrisations, preconditioning, guidance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from toys import assert_close, collectives, tiny_mlp

from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity, guided
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching, align

EPS32 = 2.0**-23
PAIRS = [
    (Velocity(), FlowMatching()),
    (Epsilon(), FlowMatching()),
    (Epsilon(), VP()),
    (Epsilon(), EDM()),
    (X0(), FlowMatching()),
    (X0(), VP()),
    (X0(), EDM()),
    (EDMPreconditioned(), EDM()),
    (EDMPreconditioned(sigma_data=1.3), EDM()),
]
TIMES = jnp.asarray([0.02, 0.3, 0.7, 0.98])


@pytest.fixture(scope="module")
def data():
    """x0 and eps, [4, 3, 2]."""
    return np.random.default_rng(0).standard_normal((2, 4, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("prediction, schedule", PAIRS)
def test_the_target_gives_back_x0(prediction, schedule, data):
    x0, eps = data
    x_t = schedule.add_noise(x0, eps, TIMES)
    target = prediction.target(x0, eps, TIMES, schedule)
    # Rounding grows as the formula says: by 1 / alpha for x_t, by x0_scale for the output.
    alpha, scale = schedule.alpha(TIMES), prediction.x0_scale(TIMES, schedule)
    bound = np.abs(x_t) / align(alpha, x0) + align(scale, x0) * np.abs(target) + np.abs(x0)
    error = np.abs(prediction.x0(target, x_t, TIMES, schedule) - x0)
    assert np.all(error <= 8 * EPS32 * bound)


@pytest.mark.parametrize("prediction, schedule", PAIRS)
def test_x0_scale_is_the_derivative_of_x0(prediction, schedule):
    def x0(raw, t):
        return prediction.x0(raw, jnp.full(1, 0.7), t, schedule)[0]

    slope = jax.vmap(jax.grad(lambda raw, t: x0(raw[None], t[None])))(jnp.full(4, 0.2), TIMES)
    np.testing.assert_allclose(np.abs(slope), prediction.x0_scale(TIMES, schedule), rtol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_preconditioning_is_the_published_one(sigma_data, data):
    x_t, raw = data
    prediction, schedule = EDMPreconditioned(sigma_data), EDM()
    s = np.asarray(schedule.sigma(TIMES), np.float64)[:, None, None]
    total = s**2 + sigma_data**2
    scaled, noise = prediction.inputs(x_t, TIMES, schedule)
    np.testing.assert_allclose(scaled, x_t / np.sqrt(total), rtol=1e-5)
    np.testing.assert_allclose(noise, np.log(s[:, 0, 0]) / 4, rtol=1e-5, atol=1e-6)
    wanted = sigma_data**2 / total * x_t + s * sigma_data / np.sqrt(total) * raw
    np.testing.assert_allclose(
        prediction.x0(raw, x_t, TIMES, schedule), wanted, rtol=1e-5, atol=1e-6
    )
    # An unweighted regression of F is EDM's: lambda(sigma) = 1 / c_out^2 times the error of D.
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    np.testing.assert_allclose(
        prediction.x0_scale(TIMES, schedule) ** -2, weight[:, 0, 0], rtol=1e-5
    )


def test_a_prediction_without_meaning_under_a_schedule_is_refused():
    for schedule in (VP(), EDM()):
        with pytest.raises(ValueError, match="Velocity is the derivative of the straight path"):
            Denoiser(None, schedule, Velocity())
    for schedule in (VP(), FlowMatching()):
        with pytest.raises(ValueError, match="EDMPreconditioned needs the schedule EDM"):
            Denoiser(None, schedule, EDMPreconditioned())


@pytest.mark.parametrize("prediction, schedule", PAIRS)
def test_a_denoiser_passes_through_jit_and_grad(prediction, schedule):
    denoiser = Denoiser({"w": jnp.float32(2.0)}, schedule, prediction)
    grad = jax.jit(jax.grad(lambda d: d.net["w"] ** 2))(denoiser)
    assert grad.net["w"] == 4.0 and grad.schedule == schedule and grad.prediction == prediction


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_the_network_sees_its_own_units_and_keywords(shape, data):
    x_t = data[0]
    t = jnp.linspace(0.1, 0.9, np.prod(shape)).reshape(shape)
    found = {}

    def net(x, t, cond, **kwargs):
        found.update(kwargs, t=t, cond=cond)
        return x, "cache"

    out = Denoiser(net, prediction=Velocity(time_scale=1000.0)).predict(x_t, t, "cond", layer=3)
    np.testing.assert_allclose(found["t"], 1000 * t, rtol=EPS32)
    assert (found["cond"], found["layer"], out.aux) == ("cond", 3, "cache")
    np.testing.assert_allclose(out.x0, x_t - align(t, x_t) * x_t, rtol=1e-6)
    np.testing.assert_array_equal(out.raw, x_t)


def test_x0_is_float32_whatever_the_network_runs_in(data):
    x_t = jnp.asarray(data[0], jnp.bfloat16)
    denoiser = Denoiser(lambda x, t, cond: x.astype(jnp.bfloat16))
    out = denoiser.predict(x_t, TIMES, None)
    assert out.x0.dtype == out.raw.dtype == jnp.float32 and out.aux is None
    # 1 - t in bfloat16 would be wrong in the third digit.
    wanted = (1 - np.asarray(TIMES))[:, None, None] * np.asarray(x_t, np.float32)
    np.testing.assert_allclose(denoiser(x_t, TIMES, None), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 3), (1, 3, 1)])
def test_an_output_of_another_shape_is_refused(shape, data):
    """One channel of data, two of output (a mean and a variance): it would broadcast."""
    denoiser = Denoiser(lambda x, t, cond: jnp.ones(shape))
    with pytest.raises(ValueError, match=r"returned .* for x_t of \(4, 3, 1\)"):
        denoiser(jnp.asarray(data[0][..., :1]), TIMES, None)


class Counting:
    """A denoiser x0 = (x + a + mean b) t that stores the batch sizes of its calls."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond):
        self.batches.append(x.shape[0])
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
        return (x + align(cond["a"], x) + align(jnp.mean(cond["b"], axis=1), x)) * t


CONDS = [
    {"a": jnp.arange(4.0) * s, "b": jnp.arange(8.0).reshape(4, 2) * s + 1} for s in (1.0, -0.3)
]


def test_guidance_of_one_costs_one_call(data):
    counting = Counting()
    for w in (1, 1.0):
        counting.batches.clear()
        x0 = guided(counting, data[0], TIMES, *CONDS, w)
        assert counting.batches == [4]
        np.testing.assert_array_equal(x0, counting(data[0], TIMES, CONDS[0]))


@pytest.mark.parametrize("batched, calls", [(True, [8]), (False, [4, 4])])
@pytest.mark.parametrize("per_frame", [False, True])
def test_guidance_is_linear_in_the_conditions(batched, calls, per_frame, data):
    counting = Counting()
    t = jnp.repeat(TIMES[:, None], 3, 1) * jnp.array([1.0, 0.9, 0.8]) if per_frame else TIMES
    cond, uncond = (counting(data[0], t, c) for c in CONDS)
    counting.batches.clear()
    # Self-Forcing writes cond + s (cond - uncond) with s = 3: that is w = 4 here.
    x0 = guided(counting, data[0], t, *CONDS, 4.0, batched=batched)
    assert counting.batches == calls
    np.testing.assert_allclose(x0, cond + 3.0 * (cond - uncond), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        guided(counting, data[0], t, *CONDS, 0.0, batched=batched), uncond, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("batched", [True, False])
def test_gradients_pass_through_both_passes(batched, data):
    net = tiny_mlp(0, dim=6)
    denoiser = Denoiser(lambda x, t, cond: net(x + cond, t, cond))
    x = jnp.asarray(data[0].reshape(4, 6))
    conds = jnp.asarray(data[1].reshape(4, 6)), jnp.zeros((4, 6))

    def by_hand(x, cond, uncond):
        return jnp.sum(-0.5 * denoiser(x, TIMES, uncond) + 1.5 * denoiser(x, TIMES, cond))

    def loss(x, cond, uncond):
        return jnp.sum(guided(denoiser, x, TIMES, cond, uncond, 1.5, batched=batched))

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, *conds)
    assert_close(grads, jax.jit(jax.grad(by_hand, (0, 1, 2)))(x, *conds), atol=1e-5)
    assert all(jnp.any(g != 0) for g in grads)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_guidance_moves_no_activation_between_devices(axis):
    denoiser = Denoiser(tiny_mlp(0))

    def interleaved(denoiser, x, t, cond):
        return guided(denoiser, x, t, cond, 0 * cond, 2.0)

    def concatenated(denoiser, x, t, cond):
        both = denoiser(jnp.concatenate([x, x]), jnp.concatenate([t, t]), None)
        return jnp.sum(jnp.stack(jnp.split(both, 2)), 0)

    mesh = sharding.make_mesh(**{"data": 1, axis: 8})
    batch = NamedSharding(mesh, sharding.P(sharding.BATCH))

    def compiled(function):
        def grad(denoiser, *batch):
            return jax.grad(lambda d: jnp.mean(function(d, *batch) ** 2))(denoiser)

        arrays = jnp.ones((16, 2)), jnp.ones(16), jnp.ones(16)
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch) for a in arrays]
        whole = NamedSharding(mesh, sharding.P())
        net = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), denoiser
        )
        with jax.set_mesh(mesh):
            return collectives(jax.jit(grad).lower(net, *arrays).compile())

    weights = {leaf.shape for leaf in jax.tree.leaves(denoiser)}
    weights |= {shape[::-1] for shape in weights} | {()}
    sent = compiled(interleaved)
    assert {name for name, _ in sent} == {"all-reduce"}
    assert {shape for _, shapes in sent for shape in shapes} <= weights
    # The same check finds the transfers of a doubling by concatenation.
    assert {name for name, _ in compiled(concatenated)} - {"all-reduce"}


def test_frozen_fields_make_denoisers_of_one_family_compatible():
    denoiser = Denoiser(tiny_mlp(0))
    twin = dataclasses.replace(denoiser, net=tiny_mlp(1))
    assert jax.tree.structure(denoiser) == jax.tree.structure(twin)
