"""Roles beside one network's file: a discriminator's features, a reward, and experts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import toys
from ml_collections import ConfigDict

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.rollouts.samplers import sampler_for
from dmd_jax.training import loop, roles
from dmd_jax.training.adapters import LoRA
from dmd_jax.training.configuration import complete
from dmd_jax.training.description import describe
from dmd_jax.training.roles import ByNoise
from dmd_jax.training.run import build
from dmd_jax.weights import export


@pytest.fixture
def config(teacher, data_dir):
    config = programs.config(teacher, data_dir, variant="dmd2")
    config.discriminator.model.blocks = (0,)  # the tiny teacher has one layer
    return config


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_its_heads_have_the_width_of_the_features(config, features):
    config.method.features = features
    run = build(config, jax.devices()[:1])
    assert run.nets["discriminator"].config.dim == run.frozen["teacher"].net.config.dim == 16
    shape = run.state_shape()
    assert shape.nets["discriminator"].heads.project.kernel.shape == (1, 16, 64)
    # 16 x 4 weights of tokens, 16 x 64 values, a layer of 64, a logit, and their biases and norm
    count = 16 * 4 + 4 + 16 * 64 + 64 + 64 * 64 + 64 + 64 + 1 + 32
    assert f"discriminator {count:>13,}   float32" in describe(run)


def test_layers_that_the_network_does_not_have_are_refused(config):
    config.discriminator.model.blocks = (0, 3)
    with pytest.raises(ValueError, match=r"blocks=\(0, 3\) must be below the depth 1 of config\.t"):
        build(config, jax.devices()[:1])


def test_weights_of_a_file_are_refused(config):
    config.discriminator.weights = "teacher"
    with pytest.raises(ValueError, match="its heads are always new"):
        build(config, jax.devices()[:1])


def test_its_heads_are_neither_int8_nor_with_the_host(config):
    with config.unlocked():
        config.discriminator.compute = dict(memory="host")
    with pytest.raises(ValueError, match=r"its heads have no such settings\. Remove it"):
        build(config, jax.devices()[:1])


def test_features_of_a_role_that_is_not_there_are_refused(config):
    config.method.features = "teachers"
    with pytest.raises(ValueError, match=r"config\.method\.features='teachers'.*'teacher'"):
        build(config, jax.devices()[:1])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bright:
    """The reward of docs/methods.md."""

    def load(self, source):
        return self

    def __call__(self, x0, cond):
        return jnp.mean(x0, axis=(1, 2, 3))


@pytest.fixture
def rewarded(teacher, data_dir):
    return programs.config(teacher, data_dir, variant="reward", **{"evaluate.steps": (4,)})


def test_a_rewards_network_is_an_argument_of_the_step(rewarded):
    run = build(rewarded, jax.devices()[:2])
    shape, loaded = run.frozen_shape()["reward"], run.load_frozen()["reward"]
    assert jax.tree.structure(shape) == jax.tree.structure(loaded)
    shape, loaded = jax.tree.leaves(shape), jax.tree.leaves(loaded)
    assert [(x.shape, x.sharding) for x in shape] == [(x.shape, x.sharding) for x in loaded]
    count = sum(x.size for x in jax.tree.leaves(loaded))
    assert f"reward      {count:>14,}    stored" in describe(run)


def test_a_reward_without_a_network_is_its_own_class(rewarded):
    rewarded.reward = complete(ConfigDict(dict(cls=Bright)))
    run = build(rewarded, jax.devices()[:1])
    assert run.load_frozen()["reward"] == run.frozen_shape()["reward"] == Bright()


def tinted(tint, x0, cond):
    return jnp.mean(tint * x0, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Tinted:
    """A reward with an array, from a file."""

    file: str

    def load(self, source):
        return jax.tree_util.Partial(tinted, jnp.load(self.file))


def test_the_arrays_of_a_reward_belong_to_the_identity_of_a_run(rewarded, tmp_path):
    file, found = tmp_path / "tint.npy", []
    rewarded.reward = complete(ConfigDict(dict(cls=Tinted, file=str(file))))
    for tint in (1.0, 1.0, 2.0):
        np.save(file, np.full(3, tint))
        found.append(loop._identity(build(rewarded, jax.devices()[:1]))["reward.sha256"])
    assert found[0] == found[1] != found[2]


def test_a_reward_that_is_missing_or_does_not_fit_is_refused(rewarded):
    rewarded.reward.network = "mnist_teacher"
    with pytest.raises(ValueError, match=r"config\.reward: .* holds no classifier"):
        build(rewarded, jax.devices()[:1])
    with rewarded.unlocked():
        del rewarded.reward
    with pytest.raises(ValueError, match=r"RewardDMD needs a reward: set config\.reward"):
        build(rewarded, jax.devices()[:1])


@pytest.fixture
def phased(teacher, data_dir):
    return programs.config(teacher, data_dir, variant="phased", **{"evaluate.steps": (4,)})


def test_experts_start_as_copies_of_one_file_and_the_student_is_one_file(phased, tmp_path):
    run = build(phased, jax.devices()[:1])
    state, frozen = run.start()
    for role in ("generator", "fake_score"):
        assert state.nets[role].net.boundaries == (500.0,)
        for net in state.nets[role].net.nets:
            toys.assert_same(net, frozen["teacher"].net)
    assert "generator           32,200   float32" in describe(run)
    path = tmp_path / "student.safetensors"
    weights.save(path, state.ema, **run.method.notes())
    assert sampler_for(path) == run.evaluator.samplers[0]
    phased.fake_score.weights = str(path)
    with pytest.raises(ValueError, match=r"holds experts already: remove config\.fake_score\.exp"):
        build(phased, jax.devices()[:1])
    with phased.unlocked():
        del phased.fake_score.experts
    assert build(phased, jax.devices()[:1]).nets["fake_score"].net.boundaries == (500.0,)


def test_experts_of_a_teacher_are_kept_in_int8_as_one_network_is(phased):
    with phased.unlocked():
        phased.teacher.experts = complete(ConfigDict(dict(cls=ByNoise, boundaries=(0.5,))))
        phased.teacher.compute.weights_dtype = "int8"
    run = build(phased, jax.devices()[:1])
    teacher = run.load_frozen()["teacher"]
    wanted = run.frozen_shape()["teacher"]
    kept = [[(x.shape, x.dtype) for x in jax.tree.leaves(net)] for net in (teacher, wanted)]
    assert kept[0] == kept[1]
    alone = weights.denoiser(phased.teacher.weights, int8=True)
    for net in teacher.net.nets:
        toys.assert_same(jax.tree.leaves(net), jax.tree.leaves(alone.net))


def test_each_expert_of_a_pair_starts_from_its_part(tmp_path):
    size = WanConfig(16, 24, 2, 1, 4, 4, text_dim=5, freq_dim=8)
    nets = [toys.weights(lambda rngs: Wan(size, rngs=rngs), seed) for seed in range(2)]
    for name, net in zip("ab", nets, strict=True):
        export.diffusers(tmp_path / name, net, scheduler=export.many_step(5.0))
    (tmp_path / "b" / "transformer").rename(tmp_path / "a" / "transformer_2")
    experts = dict(cls=ByNoise, parts=("transformer", "transformer_2"))
    config = ConfigDict({"teacher": dict(weights=str(tmp_path / "a"), experts=experts)})
    abstract = roles.abstract(config, "teacher", source=None, files=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    pair = roles.load(config, "teacher", roles.placed(abstract, {"": abstract}, mesh)).net
    assert pair.boundaries == (875.0,)
    for net, wanted in zip(pair.nets, nets, strict=True):
        toys.assert_same(jax.tree.leaves(net), jax.tree.leaves(wanted))
    both = weights.fingerprint(tmp_path / "a", ("transformer", "transformer_2"))
    assert roles.fingerprint(config, "teacher") == both


def test_adapters_of_experts_are_on_a_base_of_experts(phased):
    with phased.unlocked():
        phased.generator.adapter = complete(ConfigDict(dict(cls=LoRA, rank=2, alpha=2.0)))
    run = build(phased, jax.devices()[:1])
    shapes, bases = run.bind.shapes("generator"), run.bind.bases
    assert bases == {"generator": "generator_base"}
    assert {name.split("/")[1] for name in shapes} == {"0", "1"}
    step = partial(run.step, update_generator=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    label = jax.ShapeDtypeStruct((8,), jnp.int32)
    batch = {"cond": label, "uncond": label}
    after, _ = jax.eval_shape(step, run.state_shape(), run.frozen_shape(), batch, key)
    assert after.nets["generator"].keys() == shapes.keys()


def test_experts_of_random_weights_are_refused(phased):
    phased.generator.weights = "random"
    with pytest.raises(ValueError, match=r"experts start from weights, and .* is 'random'"):
        build(phased, jax.devices()[:1])


def test_experts_are_refused_by_a_method_whose_batches_have_times_of_all_of_them(teacher, data_dir):
    config = programs.config(teacher, data_dir)
    with config.unlocked():
        config.teacher.experts = complete(ConfigDict(dict(cls=ByNoise, boundaries=(0.5,))))
    with pytest.raises(
        ValueError, match=r"config\.teacher has experts, .* DMD draws a time for each"
    ):
        build(config, jax.devices()[:1])


def test_networks_that_are_not_those_of_the_phases_are_refused(phased):
    phased.generator.experts.boundaries = (0.5, 0.25)
    with pytest.raises(ValueError, match=r"config\.method: the generator has 3 experts for the 2"):
        build(phased, jax.devices()[:1])
    phased.generator.experts.boundaries = (1.5,)
    with pytest.raises(ValueError, match=r"config\.generator\.experts: boundaries=\(1\.5,\) must"):
        build(phased, jax.devices()[:1])
