"""UMT5: equal to transformers, padding is masked, devices, refusals."""

import dataclasses
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.models import umt5
from dmd_jax.models.umt5 import SHARDING_RULES, UMT5, UMT5Config, position_buckets
from dmd_jax.weights import umt5 as names
from dmd_jax.weights.table import fill, their_shapes

STORED = Path(__file__).with_name("umt5_reference.npz")
SMALL = UMT5Config(vocab=40, dim=24, ffn=32, heads=4, head_dim=6, depth=2)
# The rounding of float32 (6e-8) through some hundred operations, in the norm. Scores are not
# scaled, so that the softmax is steep and passes rounding on enlarged.
ROUNDING = 2e-5


def network(config):
    """A UMT5 whose weights are those that `foreign.give_weights` gives to transformers' encoder."""
    shape = jax.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    rows = names.table(config, "diffusers")
    theirs = their_shapes(shape, rows)
    return fill(shape, rows, lambda name: foreign.weight(name, theirs[name]))


def inputs(config, batch=2, length=12, longest=None):
    """(ids, mask): row i is half as long as the row before it, the first is full or `longest`."""
    spread = np.abs(foreign.tensor("ids", (batch, length))) * 1e4
    lengths = np.maximum(1, (longest or length) >> np.arange(batch))
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, spread.astype(np.int32) % config.vocab, 0), mask


def transformers_encoder(config):
    """transformers' encoder of that configuration and those weights."""
    transformers = pytest.importorskip("transformers")
    settings = names.to_settings(config, "diffusers")
    theirs = transformers.UMT5Config(**settings)
    return foreign.give_weights(transformers.UMT5EncoderModel(theirs))


def transformers_embeddings(config, ids, mask):
    """[B, L, D] by transformers' UMT5EncoderModel."""
    encoder = transformers_encoder(config)
    import torch

    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
        return encoder(**given).last_hidden_state.numpy()


def random_case(seed):
    """A configuration and sizes drawn at random: (config, keywords of `inputs`)."""
    rng = np.random.default_rng(seed)
    config = UMT5Config(
        vocab=int(rng.integers(10, 300)),
        dim=int(rng.integers(4, 60)),
        ffn=int(rng.integers(8, 80)),
        heads=int(rng.integers(1, 7)),
        head_dim=int(rng.integers(2, 17)),
        depth=int(rng.integers(1, 5)),
        buckets=int(rng.choice([8, 32, 32, 64])),
        max_distance=int(rng.choice([20, 128, 128])),
    )
    length = 512 if seed % 8 == 7 else int(rng.integers(1, 200))
    sizes = dict(
        batch=int(rng.integers(1, 4)), length=length, longest=int(rng.integers(1, length + 1))
    )
    return config, sizes


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(24))
def test_equals_transformers(seed):
    config, sizes = random_case(seed)
    ids, mask = inputs(config, **sizes)
    result = jax.jit(lambda *given: network(config)(*given))(ids, mask)
    assert foreign.relative_error(result, transformers_embeddings(config, ids, mask)) < ROUNDING


@pytest.mark.torch
@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 20), (8, 128), (64, 100)])
def test_buckets_are_those_of_transformers_at_every_distance(buckets, distance):
    """A distance of a power of two is on an edge between buckets, where rounding decides."""
    config = dataclasses.replace(SMALL, buckets=buckets, max_distance=distance)
    attention = transformers_encoder(config).encoder.block[0].layer[0].SelfAttention
    import torch

    where = torch.arange(600)
    theirs = attention._relative_position_bucket(where[None] - where[:, None])
    np.testing.assert_array_equal(position_buckets(600, buckets, distance), theirs.numpy())


def test_buckets_by_hand():
    buckets = position_buckets(200, 32, 128)
    assert buckets[0, :10].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24, 24]
    assert buckets[:10, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert buckets[0, 16] == 26 and buckets[0, 127] == buckets[0, 199] == 31


STORED_CASES = {"short": dict(length=12), "long": dict(length=160, batch=1, longest=150)}


def store():
    """Makes the stored numbers: PYTHONPATH=.:tests python -c "...test_umt5.store()"."""
    arrays = {
        name: transformers_embeddings(SMALL, *inputs(SMALL, **sizes))
        for name, sizes in STORED_CASES.items()
    }
    np.savez_compressed(STORED, **arrays)


@pytest.mark.parametrize("name", STORED_CASES)
def test_equals_the_stored_numbers_of_transformers(name):
    ids, mask = inputs(SMALL, **STORED_CASES[name])
    with np.load(STORED) as stored:
        assert foreign.relative_error(network(SMALL)(ids, mask), stored[name]) < ROUNDING


def test_padding_is_seen_by_nobody():
    net, (ids, mask) = network(SMALL), inputs(SMALL)
    other = np.where(mask, ids, 7)
    np.testing.assert_array_equal(net(ids, mask)[mask], net(other, mask)[mask])
    shorter = net(ids[1:, :6], mask[1:, :6])
    np.testing.assert_allclose(net(ids, mask)[1:, :6], shorter, rtol=0, atol=1e-5)


def test_a_mask_may_be_integers():
    net, (ids, mask) = network(SMALL), inputs(SMALL)
    np.testing.assert_array_equal(net(ids, mask), net(ids, mask.astype(np.int32)))


def test_bfloat16_is_near_float32():
    """Some percent: bfloat16 rounds by 2^-9, and scores that are not scaled enlarge it."""
    ids, mask = inputs(SMALL)
    out = network(dataclasses.replace(SMALL, dtype="bfloat16"))(ids, mask)
    assert out.dtype == jnp.float32
    assert 1e-4 < foreign.relative_error(out, network(SMALL)(ids, mask)) < 5e-2


def test_eight_devices_give_what_one_gives():
    net, (ids, mask) = network(SMALL), inputs(SMALL, batch=4)
    run = jax.jit(lambda net, ids, mask: net(ids, mask))
    wanted = run(net, ids, mask)
    mesh = sharding.make_mesh(data=2, fsdp=2, context=1, tensor=2)
    placed = jax.device_put(net, sharding.infer(net, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        result = run(placed, *sharding.global_batch((ids, mask)))
    assert foreign.relative_error(result, wanted) < ROUNDING


def test_large_weights_have_a_rule():
    net = jax.eval_shape(lambda: UMT5(umt5.XXL, rngs=nnx.Rngs(0)))
    sharding.infer(net, SHARDING_RULES, sharding.make_mesh())


def test_the_preset_has_the_published_size():
    net = jax.eval_shape(lambda: UMT5(umt5.XXL, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(net)) / 1e9 == pytest.approx(5.68, abs=0.01)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: dataclasses.replace(SMALL, buckets=6), "buckets=6"),
        (lambda: dataclasses.replace(SMALL, max_distance=8), "max_distance=8"),
        (lambda: dataclasses.replace(SMALL, dtype="float16"), "float16"),
        (lambda: network(SMALL)(np.zeros(3, int), np.ones(3)), r"must both be \[B, L\]"),
        (lambda: network(SMALL)(np.zeros((1, 3), int), np.ones((1, 4))), r"must both be \[B, L\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
