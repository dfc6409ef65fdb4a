"""Optimizers by role: formulas, schedules, weight decay, clipping, update counts and gates."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import assert_close, assert_same, tiny_mlp

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.training.optimizer import AdamW, Muon, Optimizer, per_role

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


@pytest.mark.parametrize(
    "decay, wanted",
    [
        ("linear", [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0, 0.5, 1, 0.882843, 0.6, 0.317157, 0.2, 0.2]),
    ],
)
def test_a_decayed_rate_ends_at_its_end_value(decay, wanted):
    spec = AdamW(2.0, warmup=2, decay=decay, end_value=0.4)
    rates = [spec.schedule(6)(i) for i in range(8)]
    np.testing.assert_allclose(rates, 2 * np.array(wanted), atol=1e-6)


def test_an_end_value_that_no_decay_reaches_is_refused():
    with pytest.raises(ValueError, match=r"end_value=0.5 has no effect with decay='constant'"):
        AdamW(1.0, end_value=0.5)
    with pytest.raises(ValueError, match=r"end_value=2.0 must be in \[0, learning_rate=1.0\]"):
        AdamW(1.0, decay="linear", end_value=2.0)


@pytest.mark.parametrize("field", [{"decayed": "(kernel"}, {"matrices": "*"}])
def test_a_bad_regular_expression_is_refused(field):
    name, pattern = next(iter(field.items()))
    with pytest.raises(ValueError) as refused:
        Muon(**field)
    assert str(refused.value).startswith(f"{name}={pattern!r} is no regular expression: ")


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay='step': use 'constant', 'linear' or 'cosine'"):
        AdamW(decay="step")


@pytest.mark.parametrize(
    "field", [{"learning_rate": -1.0}, {"warmup": -1}, {"b1": 1.0}, {"b2": -0.1}, {"clip": 0.0}]
)
def test_a_number_out_of_its_range_is_refused(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.* must be"):
        AdamW(**field)


def test_adamw_is_optax_adamw_bit_for_bit_and_in_the_structure_of_its_state():
    """Stored checkpoints name the moments by their paths in this structure."""
    spec = AdamW(1e-2, b1=0.5, weight_decay=0.1, clip=0.5, warmup=2, decay="cosine")
    mask = {"kernel": True, "bias": False}
    rate = spec.schedule(5)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(rate, 0.5, 0.999, 1e-8, weight_decay=0.1, mask=mask),
    )
    params = other = draw()
    ours = spec.transform(5)
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(5):
        grad = draw()
        updates, state = ours.update(grad, state, params)
        their_updates, their_state = theirs.update(grad, their_state, other)
        params = optax.apply_updates(params, updates)
        other = optax.apply_updates(other, their_updates)
    assert jax.tree.structure(state) == jax.tree.structure(their_state)
    assert_same((params, state), (other, their_state))


def blocks():
    """Parameters of two stacked layers and of an output layer, as a network has them."""
    shapes = {
        "blocks": {"up": {"kernel": (2, 3, 5), "bias": (2, 5)}},
        "head": {"kernel": (5, 4)},
    }
    is_shape = dict(is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda s: RNG.standard_normal(s).astype(np.float32), shapes, **is_shape)


def test_muon_orthogonalises_each_stacked_layer_and_leaves_the_rest_to_adamw():
    params, grads = blocks(), [blocks() for _ in range(3)]
    spec = Muon(1e-2, b1=0.5, clip=None, weight_decay=0.1, beta=0.9)
    adam = AdamW(1e-2, b1=0.5, clip=None, weight_decay=0.1)
    tx, rest = spec.transform(3), adam.transform(3)
    state, rest_state = tx.init(params), rest.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        wanted, rest_state = rest.update(grad, rest_state, params)
        assert_same(updates["head"], wanted["head"])
        assert_same(updates["blocks"]["up"]["bias"], wanted["blocks"]["up"]["bias"])
    # The same layers, each by itself, as optax has it.
    alone = optax.contrib.muon(1e-2, beta=0.9, weight_decay=0.1, consistent_rms=0.2, adam_b1=0.5)
    for layer in range(2):
        take = [g["blocks"]["up"]["kernel"][layer] for g in grads]
        weight = params["blocks"]["up"]["kernel"][layer]
        layer_state = alone.init(weight)
        for grad in take:
            wanted, layer_state = alone.update(grad, layer_state, weight)
        assert_close(updates["blocks"]["up"]["kernel"][layer], wanted, rtol=1e-4, atol=1e-7)


def test_an_update_of_muon_has_the_stated_root_mean_square_times_the_rate():
    """Liu et al. 2025: rms sqrt(max(in, out)) times an orthogonal matrix has that of AdamW."""
    params = {"blocks": {"kernel": RNG.standard_normal((2, 8, 32)).astype(np.float32)}}
    tx = Muon(1e-2, clip=None, rms=0.2).transform(1)
    updates, _ = tx.update(params, tx.init(params), params)
    rms = np.sqrt(np.mean(np.square(updates["blocks"]["kernel"]), (1, 2)))
    # Five iterations leave singular values between 0.6 and 1.3.
    assert np.all((rms > 0.5 * 0.2e-2) & (rms < 1.4 * 0.2e-2))


@pytest.mark.parametrize(
    "matrices, message",
    [
        ("nowhere", "matches no parameter; use AdamW"),
        ("bias", r"bias \(2,\); a matrix has two axes"),
    ],
)
def test_matrices_that_are_none_are_refused(matrices, message):
    with pytest.raises(ValueError, match=message):
        Muon(matrices=matrices).transform(1).init(draw())


def test_the_optimizer_in_the_docs_is_lion():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    (source,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {"__name__": "notebook"}
    exec(source, names)
    Lion = names["Lion"]
    params = draw()
    spec = Lion(2e-3, clip=None, weight_decay=0.5, b1=0.8)
    tx = per_role({"generator": spec.transform(4)}, {"generator": spec.schedule(4)})
    params, grads = {"generator": params}, {"generator": draw()}
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params, update={"generator": True})
    kernel = np.sign(grads["generator"]["kernel"]) + 0.5 * params["generator"]["kernel"]
    np.testing.assert_allclose(updates["generator"]["kernel"], -2e-3 * kernel, rtol=1e-5)
    np.testing.assert_allclose(tx.learning_rates(state)["generator"], 2e-3, rtol=1e-6)


def test_a_base_without_a_direction_says_so():
    with pytest.raises(NotImplementedError, match=r"Optimizer defines no direction\(\)"):
        Optimizer().transform(1)


def test_rates_are_known_of_roles_with_a_schedule():
    spec = AdamW(1.0, warmup=4)
    roles = {"generator": spec.transform(8), "fake_score": optax.sgd(1.0)}
    tx = per_role(roles, {"generator": spec.schedule(8), "fake_score": spec.schedule(8)})
    params = {role: draw() for role in roles}
    state = tx.init(params)
    for flag in (True, False, True):
        _, state = tx.update(params, state, params, update=dict.fromkeys(roles, flag))
    rates = tx.learning_rates(state)
    assert rates.keys() == {"generator"}  # plain SGD has no update count
    assert rates["generator"] == 0.5 and rates["generator"].dtype == jnp.float32


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
        stored = state.inner_states["generator"]
        updates, state = update(grads, state, params, update=flags)
        if step % 5:
            assert_same(updates["generator"], jax.tree.map(jnp.zeros_like, params["generator"]))
            now = state.inner_states["generator"].inner_state
            assert_same(now.inner_state, stored.inner_state.inner_state)
        params = jax.tree.map(jnp.add, params, updates)
    for role, taken in [("generator", gradients[::5]), ("fake_score", gradients)]:
        rates = [specs[role].schedule(10)(i) for i in range(len(taken))]
        wanted = adamw_by_hand(start[role], [g[role] for g in taken], specs[role], rates)
        assert_close(params[role], wanted, rtol=1e-4, atol=1e-5)
