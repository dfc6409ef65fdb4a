"""Wan: equal to diffusers, precision, devices, features, sizes, refusals."""

import dataclasses
import re
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_wan import IMAGE, ROUNDING, SMALL, inputs, network

from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models import kv_cache, wan
from dmd_jax.models.wan import SHARDING_RULES, Causal, Conditions, Wan, WanConfig
from dmd_jax.weights import wan as names

STORED = Path(__file__).with_name("wan_reference.npz")


def with_gradient(net, x, timestep, cond):
    """(velocity, gradient of its product with a fixed direction)."""

    def value(x):
        out = net(x, timestep, cond)
        return jnp.vdot(out, foreign.tensor("direction", out.shape)), out

    gradient, out = jax.grad(value, has_aux=True)(x)
    return out, gradient


def diffusers_with_gradient(config, x, timestep, cond):
    """The same by diffusers' WanTransformer3DModel."""
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = names.to_settings(config, "diffusers")
    settings.pop("_class_name")
    module = foreign.give_weights(diffusers.WanTransformer3DModel(**settings))
    text, frames, image = cond if isinstance(cond, Conditions) else (cond, None, None)
    tokens = x.shape[2] * x.shape[3] // 4
    latents = torch.tensor(x, requires_grad=True)
    full = latents if frames is None else torch.cat([latents, torch.tensor(frames)], -1)
    if timestep.ndim == 2:  # diffusers takes a time for each token
        timestep = np.repeat(timestep, tokens, axis=1)
    out = module(
        full.permute(0, 4, 1, 2, 3),
        torch.tensor(timestep),
        torch.tensor(text),
        None if image is None else torch.tensor(image),
        return_dict=False,
    )[0].permute(0, 2, 3, 4, 1)
    (out * torch.tensor(foreign.tensor("direction", tuple(out.shape)))).sum().backward()
    return out.detach().numpy(), latents.grad.numpy()


def random_case(seed):
    """A configuration and sizes drawn at random: (config, keywords of `inputs`)."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 7))
    image = seed % 5 == 4
    config = WanConfig(
        dim=heads * int(rng.choice([8, 12, 16, 22, 30])),
        ffn=int(rng.integers(8, 80)),
        heads=heads,
        depth=int(rng.integers(1, 4)),
        in_channels=7 if image else 4,
        out_channels=4,
        text_dim=int(rng.integers(4, 20)),
        image_dim=12 if image else 0,
        freq_dim=int(rng.choice([16, 64, 256])),
    )
    sizes = dict(
        frames=int(rng.integers(1, 6)),
        height=2 * int(rng.integers(1, 5)),
        width=2 * int(rng.integers(1, 5)),
        batch=int(rng.integers(1, 3)),
        text=512 if image else int(rng.integers(1, 40)),  # diffusers counts on 512 beside an image
        per_frame=seed % 4 == 3,
    )
    return config, sizes


@pytest.mark.torch
@pytest.mark.parametrize("seed", [*range(8), 19])  # an image, a time a frame, both, and neither
def test_equals_diffusers_in_value_and_gradient(seed):
    config, sizes = random_case(seed)
    given = inputs(config, **sizes)
    wanted = diffusers_with_gradient(config, *given)
    made = jax.jit(with_gradient)(network(config), *given)
    for ours, theirs in zip(made, wanted, strict=True):
        assert foreign.relative_error(ours, theirs) < ROUNDING


STORED_CASES = {
    "text": (SMALL, {}),
    "image": (IMAGE, dict(text=512)),
    "frames": (SMALL, dict(per_frame=True)),
}


def store():
    """Makes the stored numbers: PYTHONPATH=.:tests python -c "...test_wan.store()"."""
    arrays = {}
    for name, (config, sizes) in STORED_CASES.items():
        out, gradient = diffusers_with_gradient(config, *inputs(config, **sizes))
        arrays |= {f"{name}/out": out, f"{name}/gradient": gradient}
    np.savez_compressed(STORED, **arrays)


@pytest.mark.parametrize("name", STORED_CASES)
def test_equals_the_stored_numbers_of_diffusers(name):
    config, sizes = STORED_CASES[name]
    out, gradient = jax.jit(with_gradient)(network(config), *inputs(config, **sizes))
    with np.load(STORED) as stored:
        assert foreign.relative_error(out, stored[f"{name}/out"]) < ROUNDING
        assert foreign.relative_error(gradient, stored[f"{name}/gradient"]) < ROUNDING


def test_one_time_for_all_frames_is_that_time_for_each():
    net, (x, timestep, text) = network(SMALL), inputs(SMALL)
    each = np.repeat(timestep[:, None], x.shape[1], axis=1)
    run = jax.jit(lambda *args: net(*args))
    assert foreign.relative_error(run(x, each, text), run(x, timestep, text)) < 1e-6


def test_remat_and_unrolling_change_nothing():
    given = inputs(SMALL)
    plain = jax.jit(with_gradient)(network(SMALL), *given)
    other = dataclasses.replace(SMALL, remat="full", unroll=2)
    for a, b in zip(jax.jit(with_gradient)(network(other), *given), plain, strict=True):
        assert foreign.relative_error(a, b) < 1e-6


def test_bfloat16_is_near_float32():
    """Half a percent: bfloat16 rounds by 2^-9 and the residual stream is rounded at each layer."""
    given = inputs(SMALL)
    half = network(dataclasses.replace(SMALL, dtype="bfloat16"))
    out, wanted = (jax.jit(lambda net: net(*given))(net) for net in (half, network(SMALL)))
    assert out.dtype == jnp.float32
    assert 1e-5 < foreign.relative_error(out, wanted) < 3e-2


# With four devices to a video, neither its 18 tokens nor the two heads divide.
@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(data=2, context=4)], ids=str)
def test_eight_devices_give_what_one_gives(axes):
    net, (x, timestep, text) = network(SMALL), inputs(SMALL, batch=4, per_frame=True)
    wanted = jax.jit(with_gradient)(net, x, timestep, text)
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(net, sharding.infer(net, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        made = jax.jit(with_gradient)(placed, *sharding.global_batch((x, timestep, text)))
    for a, b in zip(made, wanted, strict=True):
        assert foreign.relative_error(a, b) < ROUNDING


def test_tokens_of_other_devices_are_sent_for_attention_alone():
    """Also where frames have times of their own, and end in the middle of a device's tokens."""
    config = dataclasses.replace(SMALL, dim=32, heads=4)
    net, (x, timestep, text) = network(config), inputs(config, frames=6, batch=2, per_frame=True)
    with jax.set_mesh(sharding.make_mesh(data=2, context=4)):
        given = sharding.global_batch((x, timestep, text))
        program = jax.jit(lambda *args: net(*args)).lower(*given).compile().as_text()
    # Queries, keys, values and results of the layers' loop; and what the network returns.
    assert len(re.findall(r" all-to-all(?:-start)?\(", program)) == 4
    gathered = re.findall(r"\[([\d,]+)\]\S* (?:all-gather|collective-permute)\S*\(", program)
    assert gathered
    for shape in gathered:
        assert np.prod([int(n) for n in shape.split(",")]) <= x[0].size
    assert not re.search(r" (?:all-reduce|reduce-scatter)(?:-start)?\(", program)


def test_a_denoiser_takes_it_as_it_is():
    net, (x, _, text) = network(SMALL), inputs(SMALL)
    t = np.array([0.25, 1.0], np.float32)
    x0 = Denoiser(net)(x, t, text)
    wanted = x - t[:, None, None, None, None] * net(x, 1000 * t, text)
    np.testing.assert_allclose(x0, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(x=np.zeros((2, 3, 5, 6, 4))), "even H and W"),
        (dict(x=np.zeros((2, 3, 4, 6, 16))), r"must be \[B, F, H, W, 4\]"),
        (dict(x=np.zeros((3, 4, 6, 4))), r"must be \[B, F, H, W, 4\]"),
        (dict(timestep=np.zeros((2, 2))), "timestep"),
        (dict(text=np.zeros((2, 7, 9))), r"text .* must be \[2, L, 10\]"),
        (dict(text=np.zeros((1, 7, 10))), r"text .* must be \[2, L, 10\]"),
        (dict(text=Conditions(np.zeros((2, 7, 10)), np.zeros((2, 3, 4, 6, 2)))), "no other takes"),
        (dict(context=np.zeros((2, 3, 4, 6, 4))), "need `causal`"),
        (dict(causal=Causal(), start=0), "a cache needs `start`"),
        (dict(context_time=np.zeros(2)), "there is none"),
        (dict(causal=Causal(), context_time=0.0), "there is none"),
        (
            dict(causal=Causal(), context=np.zeros((2, 3, 4, 6, 4)), context_time=np.zeros((2, 3))),
            r"context_time \(2, 3\) must be \(\) or \(2,\)",
        ),
        # As many tokens, of frames of another shape.
        (dict(causal=Causal(), context=np.zeros((2, 3, 6, 4, 4))), r"must be \[2, 3, 4, 6, 4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(change, complaint):
    x, timestep, text = inputs(SMALL)
    given = dict(x=x, timestep=timestep, text=text) | change
    with pytest.raises(ValueError, match=complaint):
        network(SMALL)(**given)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(frames=np.zeros((2, 1, 4, 6, 2))), r"frames .* must be \[2, 3, 4, 6, 2\]"),
        (dict(frames=np.zeros((2, 3, 4, 6, 1))), r"frames .* must be \[2, 3, 4, 6, 2\]"),
        (dict(image=np.zeros((2, 14))), r"image .* must be \[2, I, 14\]"),
        (dict(image=None), "needs its `Conditions`"),
    ],
)
def test_conditions_of_other_shapes_are_refused(change, complaint):
    x, timestep, conditions = inputs(IMAGE)
    with pytest.raises(ValueError, match=complaint):
        network(IMAGE)(x, timestep, conditions._replace(**change))


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: dataclasses.replace(SMALL, heads=5), "heads=5"),
        (lambda: dataclasses.replace(SMALL, out_channels=9), "out_channels=9"),
        (lambda: dataclasses.replace(SMALL, depth=0), "depth=0 must be an int"),
        (lambda: dataclasses.replace(SMALL, freq_dim=7), "freq_dim=7 even"),
        (lambda: dataclasses.replace(SMALL, dtype="float16"), "float16"),
        (lambda: kv_cache.ring(Causal(window=6, sink=1), 6), "must have room for 7"),
    ],
)
def test_numbers_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# Parameters of the published checkpoints, as their model cards round them.
@pytest.mark.parametrize(
    "config, billions",
    [(wan.T2V_1_3B, 1.42), (wan.T2V_14B, 14.29), (wan.I2V_14B, 16.40), (wan.TI2V_5B, 5.00)],
    ids=["t2v_1_3b", "t2v_14b", "i2v_14b", "ti2v_5b"],
)
def test_the_presets_have_the_published_size(config, billions):
    net = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(net))
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_features_are_the_tokens_after_the_named_layers():
    """Against a plain loop over three layers that keeps the tokens after each."""
    kept = []

    class Looped(Wan):
        def _layers(self, tokens, embedding, conditions, attend, cached=None, features=()):
            modulation = self._modulation(embedding)
            for i in range(self.config.depth):
                block = jax.tree.map(lambda w, i=i: w[i], self.blocks)
                tokens, _ = block(tokens, modulation, conditions, lambda *x: attend(*x, None))
                kept.append(tokens)
            return tokens, None

    config = dataclasses.replace(SMALL, depth=3)
    net, args = network(config), inputs(config)
    looped = jax.eval_shape(lambda: Looped(config, rngs=nnx.Rngs(0)))
    looped = jax.tree.unflatten(jax.tree.structure(looped), jax.tree.leaves(net))
    wanted, tokens = jax.jit(lambda net: (net(*args), jnp.stack(kept)))(looped)
    out, features = jax.jit(lambda net: net(*args, features=(0, 1)))(net)
    assert features.shape == (2, 2, 3 * 2 * 3, 48)
    assert foreign.relative_error(out, wanted) < ROUNDING
    for made, plain in zip(features, tokens, strict=False):  # those of the last were not asked for
        assert foreign.relative_error(made, plain) < ROUNDING
    assert foreign.relative_error(features[0], features[1]) > 0.01
    with pytest.raises(ValueError, match="features are those of whole videos"):
        net(*args, features=(0,), causal=Causal(1), context=args[0])
