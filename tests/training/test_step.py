"""The train step: who moves when, what is skipped, what is averaged, what is equal to what."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import affine, assert_close, assert_same, collectives, exact, tiny_mlp

from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.pretrain import Pretrain
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import EMA, TrainState, init_state, merge, train_step

ROLES = ("generator", "fake_score")
SPEC = AdamW(0.1, weight_decay=0.1, decay="linear")
TX = per_role(
    {role: SPEC.transform(100) for role in ROLES}, {role: SPEC.schedule(100) for role in ROLES}
)
KEY = jax.random.key(11)
STATIC = ("method", "tx", "bind", "update_generator", "ema", "reuse_rollout", "accumulate")
step = jax.jit(train_step, static_argnames=STATIC)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Losses to work out by hand: (scale a)^2 + shift b of each role, a and b from the batch."""

    @staticmethod
    def loss(denoiser, a, b):
        return jnp.mean((denoiser.net.scale * a) ** 2 + denoiser.net.shift * b)

    def rollout(self, generator, nets, batch, key):
        x0 = generator.net.scale * jax.random.normal(key, batch["index"].shape)
        return Rollout(x0, None, jnp.float32(1), jnp.float32(0), None)

    def generator_loss(self, generator, nets, batch, key):
        result = self.rollout(generator, nets, batch, key)
        loss = self.loss(generator, batch["a"], batch["generator"])
        return loss, ({"rollout": result.x0}, result)

    def critic_loss(self, critics, nets, rollout, batch, key):
        loss = self.loss(critics["fake_score"], batch["a"], batch["fake_score"])
        scale = jnp.broadcast_to(nets["generator"].net.scale, batch["index"].shape)
        return loss, {"critic_sample": rollout.x0, "scale": scale}

    def metrics(self, observed):
        return {name: jnp.mean(values) for name, values in observed.items()}


TOY = Toy()
BATCH = {"a": jnp.arange(4.0), "generator": jnp.ones(4), "fake_score": jnp.ones(4)}
toy_step = partial(step, key=KEY, method=TOY, tx=TX)


def toy_state():
    return init_state({"generator": affine(0.5, 0.1), "fake_score": affine(-0.5, 0.2)}, TX)


def adam(state, role):
    """A role's own optimizer state: moments and counts."""
    return state.opt_state.inner_states[role].inner_state.inner_state


def everything(state, role):
    """All that belongs to a role."""
    return (state.nets[role], adam(state, role), state.ema if role == "generator" else None)


def test_both_roles_move_on_the_generators_steps():
    state, metrics = toy_step(toy_state(), {}, BATCH, update_generator=True)
    # The first step of Adam is the sign of the gradient times the rate; decay spares both.
    assert_close(state.nets["generator"].net.scale, 0.4, rtol=1e-5)
    assert_close(state.nets["fake_score"].net.scale, -0.4, rtol=1e-5)
    # d/d scale = 2 scale mean(a^2) = 3.5 and d/d shift = 1.
    assert_close(metrics["generator/grad_norm"], np.hypot(3.5, 1.0), rtol=1e-5)
    assert_close(metrics["generator/loss"], 0.5**2 * 3.5 + 0.1, rtol=1e-5)
    assert metrics["generator/skipped"] == metrics["fake_score/skipped"] == 0.0
    assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics.values())


def test_the_generator_is_frozen_to_the_bit_on_critic_steps():
    state, _ = toy_step(toy_state(), {}, BATCH, update_generator=True)
    moments = jax.tree.leaves(adam(state, "generator"))
    assert sum(bool(jnp.any(m != 0)) for m in moments) > 4  # else staying put would prove nothing
    after, metrics = toy_step(state, {}, BATCH, update_generator=False)
    assert_same(everything(after, "generator"), everything(state, "generator"))
    assert after.nets["fake_score"].net.scale != state.nets["fake_score"].net.scale
    assert after.step == 2 and not any(name.startswith("generator/") for name in metrics)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("bad, other", [ROLES, ROLES[::-1]])
def test_a_loss_that_is_not_finite_skips_that_roles_whole_update(bad, other, poison):
    state, _ = toy_step(toy_state(), {}, BATCH, update_generator=True)
    poisoned = BATCH | {bad: BATCH[bad].at[2].set(poison)}
    after, metrics = toy_step(state, {}, poisoned, update_generator=True)
    assert_same(everything(after, bad), everything(state, bad))
    assert (metrics[f"{bad}/skipped"], metrics[f"{other}/skipped"]) == (1.0, 0.0)
    clean, _ = toy_step(state, {}, BATCH, update_generator=True)
    assert_same(everything(after, other), everything(clean, other))
    assert after.step == 2


def test_a_gradient_that_is_not_finite_skips_the_update_though_the_loss_is():
    # sqrt at zero: the value is 0 and the slope infinite.
    class Root(Toy):
        @staticmethod
        def loss(denoiser, a, b):
            return jnp.sqrt(jnp.abs(denoiser.net.shift))

    nets = {role: affine(1.0, 0.0) for role in ROLES}
    state = init_state(nets, TX)
    after, metrics = toy_step(state, {}, BATCH, method=Root(), update_generator=True)
    assert jnp.isfinite(metrics["generator/loss"]) and metrics["generator/skipped"] == 1.0
    assert_same(everything(after, "generator"), everything(state, "generator"))


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been():
    state = toy_state()
    poisoned = BATCH | {"generator": jnp.full(4, jnp.nan), "fake_score": jnp.full(4, jnp.nan)}
    skipped, _ = toy_step(state, {}, poisoned, update_generator=True)
    assert skipped.step == 1
    for flag in (False, True):
        skipped, _ = toy_step(skipped, {}, BATCH, update_generator=flag)
        state, _ = toy_step(state, {}, BATCH, update_generator=flag)
    # Toy's losses draw nothing, so that the step's number makes no difference.
    for role in ROLES:
        assert_same(everything(skipped, role), everything(state, role))


def test_average_follows_its_formula_from_its_start_and_moves_with_the_generator_alone():
    state, ema = toy_state(), EMA(decay=0.9, start=2)
    average = None
    for number, flag in enumerate([True, True, True, False, True]):
        state, _ = toy_step(state, {}, BATCH, update_generator=flag, ema=ema)
        now = float(state.nets["generator"].net.scale)
        if number < 2:
            average = now
        elif flag:
            average = 0.9 * average + 0.1 * now
        assert_close(state.ema.net.scale, average, rtol=1e-5)
    assert abs(average - now) > 1e-3


def test_warmup_limits_the_decay_to_the_published_ramp_from_the_start_on():
    ema, average = EMA(decay=0.5, start=3, warmup=True), {"x": jnp.float32(1.0)}
    new = {"x": jnp.float32(0.0)}  # what stays of the average is the decay
    decays = [float(ema(average, new, jnp.int32(step))["x"]) for step in range(30)]
    wanted = [0.0] * 3 + [min(0.5, (1 + n) / (10 + n)) for n in range(27)]
    np.testing.assert_allclose(decays, wanted, rtol=1e-6)
    assert decays[-1] == 0.5


def test_each_of_several_averages_follows_its_own_decay():
    ema = EMA(decay=0.9, more_decays=(0.5, 0.999))
    nets = {"generator": affine(0.5, 0.1), "fake_score": affine(-0.5, 0.2)}
    several = init_state(nets, TX, ema)
    assert list(several.more_ema) == ["0.5", "0.999"]
    alone = {str(d): init_state(nets, TX) for d in (0.9, 0.5, 0.999)}
    poisoned = BATCH | {"generator": jnp.full(4, jnp.nan)}
    for batch, flag in [(BATCH, True), (BATCH, False), (poisoned, True), (BATCH, True)]:
        several, _ = toy_step(several, {}, batch, update_generator=flag, ema=ema)
        for name, state in alone.items():
            spec = EMA(decay=float(name))
            alone[name], _ = toy_step(state, {}, batch, update_generator=flag, ema=spec)
    assert_same(several.ema, alone["0.9"].ema)
    assert_same(several.more_ema, {name: alone[name].ema for name in ("0.5", "0.999")})
    assert several.more_ema["0.5"].net.scale != several.more_ema["0.999"].net.scale


@pytest.mark.parametrize(
    "fields", [{"decay": 1.0}, {"start": -1}, {"more_decays": (1.5,)}, {"more_decays": (0.99,)}]
)
def test_an_average_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)|repeats a decay"):
        EMA(**fields)


def test_a_state_with_one_average_has_the_paths_of_stored_checkpoints():
    role = "opt_state/inner_states/{0}/inner_state/"
    inner = role + "inner_state/1/"
    moments = [inner + f"0/{m}/{{0}}/net/{w}" for m in ("mu", "nu") for w in ("scale", "shift")]
    paths = [role + "step", inner + "0/count", inner + "2/count", *moments]
    paths.extend(f"nets/{{0}}/net/{w}" for w in ("scale", "shift"))
    wanted = {path.format(name) for path in paths for name in ROLES}
    assert set(named_leaves(toy_state())) == wanted | {"step", "ema/net/scale", "ema/net/shift"}


def test_rates_and_norms_are_those_of_the_update():
    state, _ = toy_step(toy_state(), {}, BATCH, update_generator=True)
    state, skipped = toy_step(
        state, {}, BATCH | {"generator": jnp.full(4, jnp.nan)}, update_generator=True
    )
    assert skipped["generator/update_norm"] == 0.0
    after, metrics = toy_step(state, {}, BATCH, update_generator=True)

    def vector(net):
        return np.array([net.net.scale, net.net.shift])

    for role, updates in [("generator", 1), ("fake_score", 2)]:
        before, now = vector(state.nets[role]), vector(after.nets[role])
        # A skipped update does not advance the schedule of its role.
        assert_close(metrics[f"{role}/learning_rate"], 0.1 * (1 - updates / 100), rtol=1e-5)
        assert_close(metrics[f"{role}/update_norm"], np.linalg.norm(now - before), rtol=1e-5)
        assert_close(metrics[f"{role}/weight_norm"], np.linalg.norm(now), rtol=1e-6)


def test_state_is_fresh_float32_buffers():
    nets = {role: Denoiser(tiny_mlp(0)) for role in ROLES}
    nets["fake_score"] = nets["generator"]  # both start as the teacher, in its bfloat16
    nets = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nets)
    given = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(nets)}
    state = init_state(nets, TX)
    leaves = jax.tree.leaves((state.nets, state.ema))
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
    mine = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(mine)) == len(mine) and not given & set(mine)
    assert state.step == 0


def test_donation_consumes_the_state_and_nothing_else():
    weights = {role: affine(0.5, 0.1) for role in ROLES}
    state = init_state(weights, TX)
    donated = jax.jit(train_step, static_argnames=STATIC, donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        for flag in (True, False):
            before = state
            state, _ = donated(state, {}, BATCH, KEY, method=TOY, tx=TX, update_generator=flag)
            assert all(x.is_deleted() for x in jax.tree.leaves((before.nets, before.opt_state)))
    assert float(weights["generator"].net.scale) == 0.5


def test_a_step_is_a_pure_function_of_state_and_key():
    state = toy_state()
    first, found = toy_step(state, {}, BATCH, update_generator=True)
    again, repeated = toy_step(state, {}, BATCH, update_generator=True)
    assert_same((again, repeated), (first, found))
    later = dataclasses.replace(state, step=jnp.int32(7))
    assert toy_step(later, {}, BATCH, update_generator=True)[1]["rollout"] != found["rollout"]
    other = step(state, {}, BATCH, jax.random.key(12), method=TOY, tx=TX, update_generator=True)
    assert other[1]["rollout"] != found["rollout"]


def test_the_critic_sees_the_generators_rollout_or_one_of_its_own():
    reused = toy_step(toy_state(), {}, BATCH, update_generator=True)[1]
    assert reused["critic_sample"] == reused["rollout"] != 0.0
    fresh = toy_step(toy_state(), {}, BATCH, update_generator=True, reuse_rollout=False)[1]
    assert fresh["rollout"] == reused["rollout"]
    assert fresh["critic_sample"] != fresh["rollout"]
    # Between the generator's steps there is nothing to reuse.
    for reuse in (True, False):
        alone = toy_step(toy_state(), {}, BATCH, update_generator=False, reuse_rollout=reuse)[1]
        assert alone["critic_sample"] == fresh["critic_sample"]


@pytest.mark.parametrize("reuse", [True, False])
def test_both_gradients_are_taken_at_the_same_weights(reuse):
    state, metrics = toy_step(toy_state(), {}, BATCH, update_generator=True, reuse_rollout=reuse)
    assert metrics["scale"] == 0.5 and state.nets["generator"].net.scale != 0.5


def adapt(trainable, frozen):
    """A toy adapter: the generator is a frozen base plus a trained difference."""
    base = frozen["base"]
    nets = merge(trainable, frozen)
    return nets | {"generator": jax.tree.map(jnp.add, base, trainable["generator"])}


def test_bind_makes_the_nets_that_the_method_sees():
    base = affine(0.5, 0.1)
    state = init_state({"generator": affine(0.25, 0.0), "fake_score": affine(-0.5, 0.2)}, TX)
    after, metrics = toy_step(state, {"base": base}, BATCH, update_generator=True, bind=adapt)
    assert metrics["scale"] == 0.75
    assert_close(metrics["generator/loss"], 0.75**2 * 3.5 + 0.1, rtol=1e-5)
    assert_close(metrics["generator/grad_norm"], np.hypot(2 * 0.75 * 3.5, 1.0), rtol=1e-5)
    # What is trained, averaged and kept is the difference.
    assert_close(after.nets["generator"].net.scale, 0.15, rtol=1e-5)
    assert jax.tree.structure(after.ema) == jax.tree.structure(state.nets["generator"])


DISTILL = {"cond": jnp.zeros((8, 1)), "uncond": jnp.zeros((8, 1))}
FROZEN = {"teacher": exact([[0.5, 0.0]], 0.7)}
# The update is the gradient: what is compared is not flattened by Adam.
SGD = per_role({role: optax.sgd(1.0) for role in ROLES})


def distill_state():
    return init_state({"generator": affine(0.5, [0.1, 0.2]), "fake_score": affine(0.3, 0.1)}, SGD)


def distill(state, *, frozen=FROZEN, data=DISTILL, **settings):
    method = DMD((2,), times=(1.0, 0.5))
    return step(state, frozen, data, KEY, method=method, tx=SGD, update_generator=True, **settings)


def test_accumulation_equals_the_whole_batch():
    state, metrics = distill(distill_state())
    for parts in (2, 4, 8):
        other, found = distill(distill_state(), accumulate=parts)
        assert_close((other, found), (state, metrics), rtol=1e-5, atol=1e-6)
    assert metrics["samples/diversity"] > 0.1  # that of single samples is 0


def test_accumulation_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="accumulate=3 does not divide the batch of 8"):
        distill(distill_state(), accumulate=3)


def test_accumulation_moves_no_activation_between_devices():
    """On eight devices gradients and metrics are summed, and nothing else is sent.

    The networks pin nothing and ignore the condition: that the batch is split is the step's doing.
    """
    mesh = sharding.make_mesh(data=2, fsdp=4)
    batch = jax.sharding.NamedSharding(mesh, sharding.P(sharding.BATCH))
    whole = jax.sharding.NamedSharding(mesh, sharding.P())

    def abstract(tree, place):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    method = DMD((2,), times=(1.0, 0.5), guidance=2.0)
    state = init_state({role: Denoiser(tiny_mlp(0)) for role in ROLES}, SGD)
    data = {name: jnp.zeros((16, 1)) for name in ("cond", "uncond")}
    with jax.set_mesh(mesh):
        compiled = step.lower(
            abstract(state, whole),
            abstract(FROZEN, whole),
            abstract(data, batch),
            KEY,
            method=method,
            tx=SGD,
            update_generator=True,
            accumulate=2,
        ).compile()
    weights = {x.shape for x in jax.tree.leaves(state.nets)}
    sums = weights | {shape[::-1] for shape in weights} | {(), method.sample_shape}
    sent = collectives(compiled)
    assert {name for name, _ in sent} == {"all-reduce"}
    assert {shape for _, shapes in sent for shape in shapes} <= sums


def test_a_non_finite_teacher_silences_its_sample_and_trains_on():
    mixture = FROZEN["teacher"].net

    def teacher(x, t, cond):
        return jnp.where(cond > 0, jnp.nan, mixture(x, t, None))

    frozen = {"teacher": dataclasses.replace(FROZEN["teacher"], net=jax.tree_util.Partial(teacher))}
    data = DISTILL | {"cond": DISTILL["cond"].at[3].set(1.0)}
    state, metrics = distill(distill_state(), frozen=frozen, data=data)
    assert metrics["samples/nonfinite"] == 1 / 8 and metrics["generator/skipped"] == 0.0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


def test_pretraining_needs_no_critic():
    tx = per_role({"generator": AdamW(1e-2).transform(10)})
    state = init_state({"generator": Denoiser(tiny_mlp(0))}, tx)
    data = DISTILL | {"data": jnp.ones((8, 2))}
    after, metrics = step(
        state, {}, data, KEY, method=Pretrain((2,)), tx=tx, update_generator=True, accumulate=2
    )
    assert isinstance(after, TrainState) and set(metrics) == {
        f"generator/{name}"
        for name in ("loss", "grad_norm", "skipped", "update_norm", "weight_norm")
    }
    assert jnp.any(
        after.nets["generator"].net.last.bias[...] != state.nets["generator"].net.last.bias[...]
    )
