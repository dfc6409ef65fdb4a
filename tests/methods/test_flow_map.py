"""Consistency, SCM, MeanFlow: the exact map is their rest, and training finds it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import FLOW, GaussianFlow, gaussian_flow, normal, tiny_dit

from dmd_jax.diffusion.denoiser import X0, Denoiser, Velocity
from dmd_jax.diffusion.schedule import VP
from dmd_jax.methods.consistency import Consistency
from dmd_jax.methods.flow_map import warmth
from dmd_jax.methods.mean_flow import MeanFlow, average_velocity
from dmd_jax.methods.scm import SCM
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

KEY = jax.random.key(3)
MEAN, STD, COND, W = 0.3, 0.6, 0.5, 3.0
TEACHER = gaussian_flow(MEAN, STD)
# Of the guided teacher: that of the condition, beyond the unconditional one.
GUIDED = MEAN + W * COND


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deaf:
    """A network that ignores its condition, which is in its numbers."""

    net: GaussianFlow

    def __call__(self, x_t, t, cond, *, span=None):
        return self.net(x_t, t, span=span)


def student(std=STD, mean=GUIDED, jumps=True):
    return Denoiser(Deaf(gaussian_flow(mean, std, jumps=jumps).net), FLOW, Velocity(1.0))


def batch(n, step=10**6, shape=(2,)):
    cond = jnp.full(n, COND)
    return {
        "data": GUIDED + STD * normal(0, n, *shape),
        "cond": cond,
        "uncond": 0.0 * cond,
        "index": jnp.arange(n),
        "step": jnp.full(n, step),
    }


METHODS = [
    Consistency((2,), guidance=W, least_gap=0.01, stage=1),
    SCM((2,), guidance=W, warmup=0),
    MeanFlow((2,), guidance=W, warmup=0, share=1.0),
]
names = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@partial(jax.jit, static_argnames="method")
def residual(method, generator, data):
    _, (observed, rollout) = method.generator_loss(generator, {"teacher": TEACHER}, data, KEY)
    assert rollout is None
    return method.metrics(observed)["map/residual"]


@names
@pytest.mark.parametrize("batched", [True, False])
def test_the_exact_map_of_the_guided_teacher_leaves_nothing(method, batched):
    method = dataclasses.replace(method, batched_guidance=batched)
    exact = residual(method, student(), batch(200))
    # The continuous ones to float32; the teacher's Euler step is exact to its length.
    assert exact < (0.1 if isinstance(method, Consistency) else 1e-4)
    assert residual(method, student(mean=MEAN + COND), batch(200)) > 3 * exact + 0.1  # unguided
    if isinstance(method, MeanFlow):
        return  # its map is asked for both times: it has no other
    assert residual(method, student(jumps=False), batch(200)) > 3 * exact + 0.1  # the teacher


def test_a_shorter_step_leaves_less():
    coarse, fine = (
        residual(dataclasses.replace(METHODS[0], least_gap=gap), student(), batch(200))
        for gap in (0.04, 0.01)
    )
    assert fine < 0.4 * coarse


@names
def test_training_turns_the_width_of_a_wrong_map_into_the_exact_one(method):
    """Of two numbers, mean and width; the teacher's own map is where a run starts."""
    tx = per_role({"generator": AdamW(learning_rate=0.02, b1=0.0, decay="cosine").transform(300)})
    given = {name: x for name, x in batch(64).items() if name not in ("index", "step")}

    def step(state, _):
        state, metrics = train_step(
            state, {"teacher": TEACHER}, given, KEY, method=method, tx=tx, update_generator=True
        )
        return state, metrics["generator/skipped"]

    state = init_state({"generator": student(1.0, 0.0)}, tx)
    state, skipped = jax.jit(lambda state: jax.lax.scan(step, state, None, length=300))(state)
    net = state.nets["generator"].net.net
    assert not skipped.any()
    np.testing.assert_allclose([net.mean, net.std], [GUIDED, STD], atol=0.05)


@names
def test_the_gradient_is_the_students_alone_and_finite(method):
    def loss(generator, teacher):
        return method.generator_loss(generator, {"teacher": teacher}, batch(8), KEY)[0]

    own, teachers = jax.jit(jax.grad(loss, (0, 1)))(student(1.0), TEACHER)
    assert all(jnp.isfinite(x) and x != 0 for x in jax.tree.leaves(own))
    assert all(x == 0 for x in jax.tree.leaves(teachers))


def test_times_are_logit_normal_and_those_of_mean_flow_are_pairs():
    method = MeanFlow((2,), time_mean=-0.4, time_std=1.0, share=0.25)
    t, r = method.draw_times(batch(4000), KEY)
    logit = np.log(t / (1 - t))
    same = np.asarray(t == r)
    assert same.mean() == pytest.approx(0.75, abs=4 * np.sqrt(0.19 / 4000))
    assert logit[same].mean() == pytest.approx(-0.4, abs=0.08)
    assert logit[same].std() == pytest.approx(1.0, abs=0.06)
    assert (r <= t).all() and (r > 0).all()
    t, r = SCM((2,)).draw_times(batch(8), KEY)
    assert (r == 0).all() and (t > 0).all()


def test_the_gap_shrinks_by_stages_to_its_least():
    method = Consistency((2,), shrink=4.0, stage=10, least_gap=0.01)
    gaps = method.gap(jnp.array([0, 9, 10, 20, 30, 1000]))
    np.testing.assert_allclose(gaps, [1 / 4, 1 / 4, 1 / 16, 1 / 64, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(warmth(jnp.array([0, 4, 9, 50]), 10), [0.1, 0.5, 1.0, 1.0])
    np.testing.assert_array_equal(warmth(jnp.array([0]), 0), 1.0)


def test_mean_flow_gives_a_dit_the_span_in_its_units_of_time():
    net, label = tiny_dit(0, depth=1, spans=True), jnp.arange(3)
    x, t, r = normal(4, 3, 8, 8, 1), jnp.array([0.9, 0.5, 0.3]), jnp.array([0.1, 0.5, 0.0])
    call = jax.jit(lambda x, t, span: net(x, t, label, span=span))
    at_once = jax.jit(lambda x, t, r: average_velocity(Denoiser(net), label)(x, t, r))(x, t, r)
    np.testing.assert_allclose(at_once, call(x, 1000 * t, 1000 * (t - r)), rtol=1e-4, atol=1e-5)
    assert jnp.abs(at_once - call(x, 1000 * t, 0 * t)).max() > 1e-3


def test_a_dit_without_spans_is_refused_and_one_with_them_learns_them():
    """In shapes: the gradient has the weights of the span."""
    data = batch(3, shape=(8, 8, 1)) | {"cond": jnp.arange(3), "uncond": jnp.full(3, 3)}
    method, teacher = MeanFlow((8, 8, 1), guidance=2.0), {"teacher": Denoiser(tiny_dit(1))}

    def loss(generator):
        return method.generator_loss(generator, teacher, data, KEY)[0]

    grad = jax.eval_shape(jax.grad(loss), Denoiser(tiny_dit(0, spans=True)))
    assert grad.net.span.kernel.shape == (256, 16)
    with pytest.raises(ValueError, match="takes no span: its config has spans=False"):
        jax.eval_shape(loss, Denoiser(tiny_dit(0)))


@names
def test_other_networks_are_refused(method):
    with pytest.raises(ValueError, match=r"config\.generator predicts X0"):
        other = Denoiser(student().net, FLOW, X0())
        method.generator_loss(other, {"teacher": TEACHER}, batch(4), KEY)
    with pytest.raises(ValueError, match=r"config\.teacher has the schedule VP"):
        teacher = Denoiser(TEACHER.net, VP(), X0())
        method.generator_loss(student(), {"teacher": teacher}, batch(4), KEY)


@pytest.mark.parametrize(
    "cls, fields, complaint",
    [
        (SCM, dict(times=(0.5, 1.0)), "must descend"),
        (SCM, dict(shift=0.0), "shift=0.0 must be"),
        (SCM, dict(time_std=0.0), "time_std=0.0 must be"),
        (SCM, dict(warmup=-1), "warmup=-1 must be"),
        (SCM, dict(tangent_c=0.0), "tangent_c=0.0 above"),
        (Consistency, dict(shrink=1.0), "shrink=1.0 must be"),
        (Consistency, dict(stage=0), "stage=0 1 or more"),
        (Consistency, dict(least_gap=0.0), "least_gap=0.0 must be"),
        (Consistency, dict(huber=0.0), "huber=0.0 above"),
        (MeanFlow, dict(share=1.5), "share=1.5 must be"),
        (MeanFlow, dict(c=0.0), "c=0.0 above"),
    ],
)
def test_numbers_without_a_meaning_are_refused(cls, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        cls((2,), **fields)
