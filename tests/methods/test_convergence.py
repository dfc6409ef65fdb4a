"""Whole trainings of a tiny generator whose teacher is known in closed form, in seconds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, exact, tiny_mlp

from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.sid import SiD
from dmd_jax.rollouts.backward_simulation import backward_simulation
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, merge, train_step

BATCH = {"cond": jnp.zeros((256, 1)), "uncond": jnp.zeros((256, 1))}


def train(nets, teacher, method, tx, steps, bind=merge):
    """The nets after `steps` steps, all in one compiled loop."""

    def step(state, _):
        state, metrics = train_step(
            state,
            {"teacher": teacher},
            BATCH,
            jax.random.key(0),
            method=method,
            tx=tx,
            bind=bind,
            update_generator=True,
        )
        return state, metrics["generator/skipped"]

    # Thousands of tiny steps: worth a better compiled loop than other tests are.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    run = jax.jit(
        lambda state: jax.lax.scan(step, state, None, length=steps), compiler_options=options
    )
    state, skipped = run(init_state(nets, tx))
    assert not skipped.any()
    return state.nets


def own_score(trainable, frozen):
    """A `bind` that gives an affine generator of N(0, 1) its exact score, as a constant."""
    generator = jax.lax.stop_gradient(trainable["generator"].net)
    fake_score = exact(generator.shift[:, None], 1.0)
    fake_score = dataclasses.replace(
        fake_score, net=dataclasses.replace(fake_score.net, std=jnp.abs(generator.scale[0]))
    )
    return merge(trainable, frozen) | {"fake_score": fake_score}


def test_exact_scores_bring_a_gaussian_generator_to_the_teachers_mean_and_width():
    method = DMD((1,), times=(1.0,))
    tx = per_role({"generator": AdamW(3e-2, b1=0.5, b2=0.99, decay="cosine").transform(400)})
    nets = {"generator": affine([1.3], [-0.4])}
    nets = train(nets, exact([[0.7]], 0.5), method, tx, 400, bind=own_score)
    got = nets["generator"].net
    np.testing.assert_allclose([abs(got.scale[0]), got.shift[0]], [0.5, 0.7], atol=1e-3)


def learn_mixture(method, means, std, hidden, steps):
    """4,000 samples of an MLP that `method` trained on a mixture, with another MLP as critic."""
    means = np.asarray(means, np.float32)
    spec = AdamW(1e-2, b1=0.5, b2=0.99, decay="cosine")
    tx = per_role({role: spec.transform(steps) for role in ("generator", "fake_score")})
    nets = {
        role: Denoiser(tiny_mlp(seed, dim=means.shape[1], hidden=hidden), prediction=Velocity(1.0))
        for seed, role in enumerate(("generator", "fake_score"))
    }
    nets = train(nets, exact(means, std), method, tx, steps)
    noise = jax.random.normal(jax.random.key(1), (4000, means.shape[1]))
    sample = jax.jit(
        lambda generator: (
            backward_simulation(
                generator,
                noise,
                None,
                jax.random.key(2),
                times=method.times,
                schedule=generator.schedule,
                exit_step=len(method.times) - 1,
            ).x0
        )
    )
    return np.asarray(sample(nets["generator"]))


def modes(samples, means):
    """(share, mean, width) of the samples that are nearest to each mean."""
    nearest = np.linalg.norm(samples[:, None] - np.asarray(means), axis=-1).argmin(1)
    groups = [samples[nearest == k] for k in range(len(means))]
    return (
        np.array([len(g) / len(samples) for g in groups]),
        np.array([g.mean(0) for g in groups]),
        np.array([g.std(0) for g in groups]),
    )


@pytest.mark.parametrize(
    "method",
    [
        DMD((1,), times=(1.0,), clip=(0.02, 0.5), normalize=False),
        SiD((1,), times=(1.0,), clip=(0.02, 0.5), normalize=False),
    ],
    ids=["DMD", "SiD"],
)
def test_a_one_step_student_learns_both_modes_of_its_teacher(method):
    means = [[-1.0], [1.0]]
    samples = learn_mixture(method, means, 0.25, hidden=32, steps=1000)
    share, mean, width = modes(samples, means)
    np.testing.assert_allclose(share, 0.5, atol=0.05)
    np.testing.assert_allclose(mean, means, atol=0.1)
    # One broad mode of the same variance would have halves of width 0.62; a point has none.
    np.testing.assert_allclose(width, 0.25, atol=0.12)


def test_a_two_step_student_covers_four_modes_in_the_plane():
    means = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
    method = DMD((2,), times=(1.0, 0.5), clip=(0.02, 0.9), normalize=False, last_step_share=0.5)
    samples = learn_mixture(method, means, 0.4, hidden=64, steps=1000)
    share, mean, width = modes(samples, means)
    np.testing.assert_allclose(share, 0.25, atol=0.1)
    np.testing.assert_allclose(mean, means, atol=0.2)
    assert width.max() < 0.57
