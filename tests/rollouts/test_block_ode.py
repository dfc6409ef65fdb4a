"""The ODE of a causal network, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_close, weights

from dmd_jax import weights as files
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.rollouts.block_ode import block_ode
from dmd_jax.rollouts.ode import ode
from dmd_jax.rollouts.samplers import CausalFewStep, CausalManyStep, ManyStep, sampler_for
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced

SHAPE = (6, 4, 4, 3)
KEY = jax.random.key(0)
TIMES = (1.0, 0.6, 0.2)
CONFIG = WanConfig(16, 24, 2, 2, 3, 3, text_dim=5, freq_dim=8, reach=6)


@pytest.fixture(scope="module")
def net():
    return Denoiser(weights(lambda rngs: Wan(CONFIG, rngs=rngs), 0))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


NOISE, COND, UNCOND = normal(0, 2, *SHAPE), normal(1, 2, 3, 5), jnp.zeros((2, 3, 5))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("causal", [Causal(2), Causal(2, window=3, sink=1)], ids=["all", "window"])
def test_each_block_is_the_ode_after_the_blocks_that_were_made_before_it(net, guidance, causal):
    """Along the video itself, teacher forcing solves the same ODE for all blocks at once."""
    video = jax.jit(
        lambda net: block_ode(
            net, NOISE, COND, UNCOND, KEY, times=TIMES, causal=causal, guidance=guidance, shift=3.0
        )
    )(net)

    @jax.jit
    def forced(net, video):
        student = TeacherForced(net, causal)

        def guided(x, t, _):
            cond, uncond = (student(x, t, After(c, video)) for c in (COND, UNCOND))
            return uncond + guidance * (cond - uncond)

        return ode(guided, NOISE, None, times=TIMES, shift=3.0, schedule=net.schedule)

    assert_close(video, forced(net, video), rtol=5e-5, atol=5e-5)


def test_a_lone_first_frame_is_a_block(net):
    noise = normal(0, 2, 5, *SHAPE[1:])
    causal = Causal(2, first_alone=True)
    how = dict(times=TIMES, causal=causal)
    video = block_ode(net, noise, COND, UNCOND, KEY, **how)
    first = block_ode(net, noise[:, :1], COND, UNCOND, KEY, **how)
    assert_close(video[:, :1], first, rtol=2e-5, atol=2e-5)


def test_noise_in_the_context_is_seen_by_later_blocks_alone(net):
    how = dict(times=TIMES, causal=Causal(2))
    clean = block_ode(net, NOISE, COND, UNCOND, KEY, **how)
    noisy = block_ode(net, NOISE, COND, UNCOND, KEY, context_time=0.3, **how)
    assert_close(noisy[:, :2], clean[:, :2], rtol=2e-5, atol=2e-5)
    assert not np.allclose(noisy[:, 2:], clean[:, 2:], atol=1e-3)


@pytest.mark.parametrize(
    "sampler",
    [
        CausalManyStep(50, causal=Causal(2, window=4, sink=1), context_time=0.1),
        CausalFewStep((1.0, 0.5), 3.0, Causal(1, True), (1.0, 0.9, 0.8), None),
        CausalFewStep((1.0, 0.5), 3.0, Causal(3), None, 0.2),
    ],
    ids=str,
)
def test_a_file_says_how_its_network_is_sampled(net, sampler, tmp_path):
    files.save(tmp_path / "net.safetensors", net, **sampler.notes())
    assert sampler_for(tmp_path / "net.safetensors") == sampler


@pytest.mark.parametrize("way", [ManyStep, CausalManyStep])
def test_a_network_is_sampled_with_the_shift_of_its_training(net, tmp_path, way):
    files.save(tmp_path / "net.safetensors", net, **way(8, 2.0, shift=5.0).notes())
    assert sampler_for(tmp_path / "net.safetensors", steps=8, guidance=2.0) == way(8, 2.0, 5.0)
    assert sampler_for(tmp_path / "net.safetensors", steps=8, shift=1.0) == way(8)


def test_a_causal_network_has_one_solver(net, tmp_path):
    files.save(tmp_path / "net.safetensors", net, **CausalManyStep(50).notes())
    with pytest.raises(ValueError, match="is causal, and sampled by euler alone"):
        sampler_for(tmp_path / "net.safetensors", solver="unipc")
