"""One AdamW a role: its formula, what it decays, its clip, its clock and its gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_close, assert_same, tiny_mlp

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.training.optimizer import AdamW, per_role

RNG = np.random.default_rng(0)


def draw():
    """Weights or gradients of a layer, float32."""
    shapes = {"kernel": (3, 2), "bias": (2,)}
    return {k: RNG.standard_normal(v).astype(np.float32) for k, v in shapes.items()}


def adamw_by_hand(params, gradients, spec, rates):
    """Loshchilov and Hutter, algorithm 2, in float64, behind a clip of the global norm."""
    params = {k: np.float64(v) for k, v in params.items()}
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for step, (grad, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grad.values()))
        scale = 1.0 if spec.clip is None else min(1.0, spec.clip / norm)
        for name, value in params.items():
            g = scale * np.float64(grad[name])
            first[name] = spec.b1 * first[name] + (1 - spec.b1) * g
            second[name] = spec.b2 * second[name] + (1 - spec.b2) * g**2
            m, v = first[name] / (1 - spec.b1**step), second[name] / (1 - spec.b2**step)
            decay = spec.weight_decay * value if name == "kernel" else 0.0
            params[name] = value - rate * (m / (np.sqrt(v) + spec.eps) + decay)
    return params


@pytest.mark.parametrize(
    "spec",
    [
        AdamW(1e-2, weight_decay=0.1, clip=None),
        AdamW(1e-2, b1=0.0, weight_decay=0.01, clip=0.5),
        AdamW(1e-2, warmup=2, decay="linear", clip=1e3),
    ],
)
def test_adamw_is_the_published_formula(spec):
    params, gradients = draw(), [draw() for _ in range(4)]
    tx = spec.transform(4)
    wanted = adamw_by_hand(params, gradients, spec, [spec.schedule(4)(i) for i in range(4)])
    state = tx.init(params)
    for grad in gradients:
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert_close(params, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "decay, wanted",
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_rates_rise_over_the_warmup_and_fall_over_the_rest(decay, wanted):
    schedule = AdamW(2.0, warmup=2, decay=decay).schedule(6)
    np.testing.assert_allclose([schedule(i) for i in range(7)], 2 * np.array(wanted), atol=1e-6)


def test_without_warmup_the_first_update_has_the_whole_rate():
    assert AdamW(2.0).schedule(6)(0) == 2.0
    assert AdamW(2.0, decay="cosine").schedule(6)(0) == 2.0


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay='step': use 'constant', 'linear' or 'cosine'"):
        AdamW(decay="step")


@pytest.mark.parametrize(
    "field", [{"learning_rate": -1.0}, {"warmup": -1}, {"b1": 1.0}, {"b2": -0.1}, {"clip": 0.0}]
)
def test_a_number_out_of_its_range_is_refused(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.* must be"):
        AdamW(**field)


def test_decay_takes_the_kernels_of_a_network_and_leaves_its_biases():
    params = {"generator": Denoiser(tiny_mlp(0))}
    tx = per_role({"generator": AdamW(0.1, weight_decay=0.5).transform(1)})
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, update={"generator": True})
    layer, weights = updates["generator"].net.first, params["generator"].net.first
    np.testing.assert_allclose(layer.kernel[...], -0.1 * 0.5 * weights.kernel[...], rtol=1e-5)
    np.testing.assert_array_equal(layer.bias[...], 0.0)


def two_roles(**specs):
    transforms = {role: spec.transform(10) for role, spec in specs.items()}
    tx = per_role(transforms)
    params = {role: draw() for role in specs}
    return tx, params, tx.init(params)


def test_each_role_is_clipped_by_its_own_norm():
    tx, params, state = two_roles(
        generator=AdamW(1.0, b1=0.0, b2=0.0, eps=1.0, clip=1.0),
        fake_score=AdamW(1.0, b1=0.0, b2=0.0, eps=1.0, clip=1.0),
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["generator"]["bias"] += jnp.array([300.0, 400.0])
    grads["fake_score"]["bias"] += jnp.array([0.3, 0.4])
    updates, _ = tx.update(grads, state, params, update=dict.fromkeys(params, True))
    # With these moments an update is -g / (|g| + 1), and g is (0.6, 0.8) once clipped.
    clipped, small = np.array([0.6, 0.8]), np.array([0.3, 0.4])
    np.testing.assert_allclose(updates["generator"]["bias"], -clipped / (clipped + 1), rtol=1e-5)
    np.testing.assert_allclose(updates["fake_score"]["bias"], -small / (small + 1), rtol=1e-5)


def test_a_held_role_keeps_its_weights_moments_and_clock():
    """Five critic updates for one of the generator: each schedule counts its own."""
    specs = dict(
        generator=AdamW(1e-2, warmup=3, decay="linear", weight_decay=0.1),
        fake_score=AdamW(1e-2, decay="cosine", weight_decay=0.1),
    )
    tx, params, state = two_roles(**specs)
    start, gradients = params, [{role: draw() for role in params} for _ in range(10)]
    update = jax.jit(tx.update)
    for step, grads in enumerate(gradients):
        flags = {"generator": step % 5 == 0, "fake_score": True}
        if step % 5:
            grads = grads | {"generator": jax.tree.map(lambda g: g * jnp.nan, draw())}
        held = state.inner_states["generator"]
        updates, state = update(grads, state, params, update=flags)
        if step % 5:
            assert_same(updates["generator"], jax.tree.map(jnp.zeros_like, params["generator"]))
            now = state.inner_states["generator"].inner_state
            assert_same(now.inner_state, held.inner_state.inner_state)
        params = jax.tree.map(jnp.add, params, updates)
    for role, taken in [("generator", gradients[::5]), ("fake_score", gradients)]:
        rates = [specs[role].schedule(10)(i) for i in range(len(taken))]
        wanted = adamw_by_hand(start[role], [g[role] for g in taken], specs[role], rates)
        assert_close(params[role], wanted, rtol=1e-4, atol=1e-5)
