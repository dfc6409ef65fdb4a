"""DMD and SiD on videos of a causal generator, with three networks of three configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Halved, assert_close, normal, video_networks

from dmd_jax import weights as files
from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, guided
from dmd_jax.diffusion.schedule import FlowMatching, shift_time
from dmd_jax.losses.distribution_matching import dmd_gradient
from dmd_jax.methods.causal import CausVid, SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.long_tuning import LongTuning
from dmd_jax.methods.sid import SiD
from dmd_jax.models.wan import Causal
from dmd_jax.rollouts.samplers import CausalFewStep, sampler_for
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

SHAPE = (6, 4, 4, 3)
PAIRS = Causal(2)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def nets():
    return video_networks()


def batch(num=4):
    return {
        "cond": normal(1, num, 3, 5),
        "uncond": jnp.zeros((num, 3, 5)),
        "data": normal(2, num, *SHAPE),
        "index": jnp.arange(num),
    }


def method(kind=DMD, video=None, **how):
    how = dict(times=(1.0, 0.75, 0.5), shift=5.0, score_shift=5.0, guidance=2.0) | how
    return kind(SHAPE, video=video or SelfForcing(PAIRS), **how)


def test_the_gradient_is_the_normalised_difference_of_the_scores_through_the_rollout(nets):
    """Composed by hand: rollout, noise, both scores, grad / N, and back through the rollout."""
    dmd, data = method(), batch()
    rollout_key, time_key, eps_key = jax.random.split(KEY, 3)

    @jax.jit
    def ours(generator):
        return jax.grad(lambda g: dmd.generator_loss(g, nets, data, KEY)[0])(generator)

    @jax.jit
    def by_hand(generator):
        rollout, back = jax.vjp(lambda g: dmd.rollout(g, nets, data, rollout_key).x0, generator)
        x_t, t, _ = dmd.diffuse(
            dmd.rollout(generator, nets, data, rollout_key),
            FlowMatching(),
            data["index"],
            time_key,
            eps_key,
        )
        real = guided(nets["teacher"], x_t, t, data["cond"], data["uncond"], 2.0)
        fake = nets["fake_score"](x_t, t, data["cond"])
        return back(dmd_gradient(rollout, real, fake) / rollout.size)[0]

    assert_close(ours(nets["generator"]), by_hand(nets["generator"]), rtol=2e-4, atol=1e-6)


# A method's loss and the way its videos are made meet in a Rollout alone: each is here once.
@pytest.mark.parametrize(
    "kind, video",
    [
        pytest.param(DMD, SelfForcing(PAIRS), id="DMD-self-forcing"),
        pytest.param(SiD, CausVid(PAIRS), id="SiD-causvid"),
    ],
)
def test_a_step_trains_both_networks_and_accumulation_changes_nothing(nets, kind, video):
    tx = per_role({role: AdamW(1e-3).transform(10) for role in ("generator", "fake_score")})
    trainable = {role: nets[role] for role in ("generator", "fake_score")}
    state, frozen = init_state(trainable, tx), {"teacher": nets["teacher"]}
    how = dict(method=method(kind, video), tx=tx, update_generator=True)
    data = {name: x for name, x in batch().items() if name != "index"}

    def step(accumulate):
        return jax.jit(lambda s: train_step(s, frozen, data, KEY, accumulate=accumulate, **how))(
            state
        )

    (whole, metrics), (parts, _) = step(1), step(2)
    assert all(np.isfinite(x) for name, x in metrics.items() if "gap" not in name)
    for role in trainable:
        assert metrics[f"{role}/skipped"] == 0 and metrics[f"{role}/update_norm"] > 0
    # Adam divides by the gradient's size: where that is rounding, so is the update.
    assert_close(parts.opt_state, whole.opt_state, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("image", [False, True])
def test_a_long_rollout_is_compared_in_its_last_frames(nets, image):
    """Of 6 frames the last 4; the block that holds the image latent has no part in the loss."""
    long = method(video=SelfForcing(PAIRS))
    dmd = method(video=SelfForcing(PAIRS, compared=4, image_latent=image))
    nets = nets | {"vae": Halved()}

    def with_gradient(method):
        """(x0, mask, gradient of the sum of the last two frames)."""

        @jax.jit
        def run(generator):
            def loss(generator):
                rollout = method.rollout(generator, nets, batch(), KEY)
                return rollout.x0[:, -2:].sum(), (rollout.x0, rollout.mask)

            gradient, made = jax.grad(loss, has_aux=True)(generator)
            return *made, gradient

        return run(nets["generator"])

    whole, _, wanted = with_gradient(long)
    x0, mask, gradient = with_gradient(dmd)
    assert_close(x0[:, 1:], whole[:, 3:])
    first = 0.5 * whole[:, 2:3] + 3 if image else whole[:, 2:3]  # of frames 0, 1 and 2
    assert_close(x0[:, :1], first)
    np.testing.assert_array_equal(mask, [[False] * 2 + [True] * 2] * 4)
    assert_close(gradient, wanted, rtol=2e-4, atol=1e-5)


def test_rollouts_of_drawn_length_are_compared_in_as_many_frames(nets):
    """With 2 or 3 blocks: of the shorter videos all frames count, and the first is an image."""
    dmd = method(video=SelfForcing(PAIRS, compared=4, image_latent=True, least_blocks=2))
    nets, seen = nets | {"vae": Halved()}, set()
    rollout_of = jax.jit(lambda key: dmd.rollout(nets["generator"], nets, batch(), key)[:2])
    for seed in range(8):
        x0, mask = rollout_of(jax.random.key(seed))
        assert x0.shape == (4, 4, 4, 4, 3)
        shorter = bool(mask[0, 0])
        seen.add(shorter)
        np.testing.assert_array_equal(mask, [[shorter] * 2 + [True] * 2] * 4)
        # Halved adds the number of frames that it decodes, 3.
        assert (x0[:, 0].mean() > 1.5) != shorter
    assert seen == {True, False}


def test_blocks_are_counted_by_their_mean_number():
    """Of 3 blocks, 2 or 3 are made, and the last 2 pass gradient."""
    drawn = SelfForcing(PAIRS, compared=4, least_blocks=2)
    assert drawn.expected_blocks(SHAPE) == (2.5, 2.0)
    assert SelfForcing(PAIRS).expected_blocks(SHAPE) == (3.0, 3.0)
    assert LongTuning(PAIRS, frames=14, overlap=2).expected_blocks(SHAPE) == (7 / 3, 7 / 3)


def test_frames_that_the_mask_leaves_out_pass_no_gradient(nets):
    dmd = method(video=SelfForcing(PAIRS, compared=4))

    @jax.jit
    def run(generator):
        rollout = dmd.rollout(generator, nets, batch(), KEY)

        def loss(x0):
            return dmd.compare(rollout._replace(x0=x0), nets, batch(), KEY, jax.random.key(8))[0]

        return rollout.mask, jax.grad(loss)(rollout.x0)

    mask, gradient = run(nets["generator"])
    kept = np.asarray(mask[0])
    assert not np.any(gradient[:, ~kept]) and np.all(np.any(gradient[:, kept], (0, 2, 3, 4)))


def test_the_scores_are_compared_above_the_time_after_the_exit_step(nets):
    dmd = method(above_exit=True, score_shift=1.0, clip=(0.0, 1.0))

    @jax.jit
    def times(key):
        rollout = dmd.rollout(nets["generator"], nets, batch(), key)
        return dmd.diffuse(rollout, FlowMatching(), jnp.arange(4), KEY, KEY)[1], rollout.t_to

    for seed in range(8):
        t, lowest = times(jax.random.key(seed))
        assert np.all(t >= lowest)


def test_training_and_inference_share_blocks_window_sink_and_context(nets):
    """A rollout that runs to its last step is what the sampler draws from the same noise."""
    video = SelfForcing(Causal(2, window=4, sink=1), first_times=(1.0, 0.6), context_time=0.1)
    dmd = method(video=video, last_step_share=1.0)
    sampler = dmd.sampler(3, 1.0)
    assert sampler == CausalFewStep((1.0, 0.75, 0.5), 5.0, video.causal, (1.0, 0.6), 0.1)
    noise_key, _, step_key = jax.random.split(KEY, 3)
    rollout = jax.jit(lambda generator: dmd.rollout(generator, nets, batch(), KEY).x0)
    noise = randomness.normal(noise_key, jnp.arange(4), SHAPE)
    given = noise, batch()["cond"], None, jax.random.split(step_key)[0], jnp.arange(4)
    drawn = jax.jit(lambda generator: sampler(generator, *given))(nets["generator"])
    assert_close(drawn, rollout(nets["generator"]), rtol=2e-5, atol=2e-5)


def test_the_header_of_an_export_says_how_to_sample_it(nets, tmp_path):
    dmd = method(video=SelfForcing(Causal(2, window=4, sink=1), context_time=None))
    files.save(tmp_path / "student.safetensors", nets["generator"], **dmd.notes())
    assert sampler_for(tmp_path / "student.safetensors") == dmd.sampler(3, 1.0)
    notes = dict(times=(1.0, 0.5), shift=1.0, causal=dict(frames_per_block=2))  # no more is needed
    files.save(tmp_path / "short.safetensors", nets["generator"], **notes)
    assert sampler_for(tmp_path / "short.safetensors") == CausalFewStep((1.0, 0.5), 1.0, PAIRS)


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_causvid_calls_the_generator_once_with_a_time_for_each_block(teacher_forcing):
    """The network is a probe: it returns its time as the velocity."""
    calls = []

    def probe(x, t, cond, **kw):
        calls.append(kw)
        return jnp.broadcast_to(t[..., None, None, None], x.shape)

    video = CausVid(Causal(2, first_alone=True), teacher_forcing=teacher_forcing)
    data = batch(64) | {"data": normal(2, 64, 7, 4, 4, 3)}
    dmd = DMD((7, 4, 4, 3), times=(1.0, 0.5), shift=5.0, video=video)
    rollout = dmd.rollout(Denoiser(probe), {}, data, KEY)
    noise_key = jax.random.split(KEY, 3)[0]
    noise = randomness.normal(noise_key, data["index"], (7, 4, 4, 3))
    levels = np.asarray(shift_time(np.float32([1.0, 0.5]), 5.0))
    times = []
    for t in levels:  # which of them gives each element
        x0 = (1 - t) * data["data"] + t * noise - t * 1000 * t
        times.append(np.all(np.isclose(rollout.x0, x0, atol=1e-2), (2, 3, 4)))
    assert np.all(times[0] ^ times[1])
    for first, stop in [(0, 1), (1, 3), (3, 5), (5, 7)]:
        assert np.all(times[0][:, first:stop] == times[0][:, first : first + 1])
    assert 0.3 < times[0][:, [0, 1, 3, 5]].mean() < 0.7
    (call,) = calls
    assert call["causal"] == video.causal and ("context" in call) == teacher_forcing


@pytest.mark.parametrize("context_time, wanted", [(0.0, 0.0), (0.2, 0.2), (None, 5 / 6)])
def test_causvid_after_real_blocks_sees_the_context_of_inference(context_time, wanted):
    """Noised to the context time; to that of the last call, whose keys and values None keeps."""
    calls = []

    def probe(x, t, cond, **kw):
        calls.append(kw)
        return jnp.zeros_like(x)

    video = CausVid(PAIRS, context_time=context_time, teacher_forcing=True)
    data = batch(64)
    dmd = method(video=video, times=(1.0, 0.5))
    dmd.rollout(Denoiser(probe), {}, data, KEY)
    (call,) = calls
    np.testing.assert_allclose(call["context_time"], np.full(64, 1000 * wanted), rtol=1e-6)
    noise = np.asarray(call["context"] - (1 - wanted) * data["data"])
    np.testing.assert_allclose(noise.std(), wanted, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    "how, complaint",
    [
        (dict(video=SelfForcing(Causal(4))), "videos: 6 frames do not divide into blocks of 4"),
        (dict(video=SelfForcing(PAIRS, graded=3)), "graded=3 of 6 frames"),
        (dict(video=SelfForcing(PAIRS, compared=3)), "graded=3 of 6 frames"),
        (dict(video=SelfForcing(PAIRS, image_latent=True)), "image_latent needs `compared`"),
        (dict(video=SelfForcing(PAIRS, least_blocks=2)), "least_blocks=2 needs `compared`"),
        (dict(video=SelfForcing(PAIRS, compared=4, least_blocks=1)), "at least the compared=4"),
        (dict(video=SelfForcing(PAIRS, compared=4, least_blocks=4)), "at most the 6 frames"),
        (dict(video=SelfForcing(PAIRS, graded=0)), "graded=0 leaves no frame"),
        (dict(strides=(1, 3)), "a causal rollout uses all of `times`"),
        (
            dict(video=SelfForcing(PAIRS, per_block_exit=True), above_exit=True),
            "need one exit step for all blocks",
        ),
        (dict(video=CausVid(PAIRS), below_exit=True), "need one exit step for all blocks"),
    ],
    ids=str,
)
def test_rollouts_that_cannot_be_are_refused(how, complaint):
    with pytest.raises(ValueError, match=complaint):
        method(**how)


def test_images_and_impossible_times_are_refused():
    with pytest.raises(ValueError, match="makes videos, not samples"):
        DMD((8, 8, 1), video=SelfForcing())
    with pytest.raises(ValueError, match=r"context_time=1.0 must be in \[0, 1\), or None"):
        SelfForcing(context_time=1.0)
    with pytest.raises(ValueError, match="must descend"):
        SelfForcing(first_times=(0.5, 1.0))
    with pytest.raises(ValueError, match="guidance is in the weights"):
        method().sampler(3, 2.0)
