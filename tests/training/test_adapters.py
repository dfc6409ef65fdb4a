"""Runs that train adapters: one base for all roles, and nothing else changes."""

import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import tiny_runs
import toys

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves, tree_bytes
from dmd_jax.training import adapters, loop
from dmd_jax.training.adapters import LoRA
from dmd_jax.training.description import describe
from dmd_jax.training.run import build as resolve

P = jax.P
# Cheap, and constant over the steps: a run may then be prolonged.
SMALL = {
    "steps": 4,
    "checkpoint.every": 2,
    "evaluate.every": 4,
    "evaluate.features": "",
    "evaluate.steps": (4,),
    "generator.optimizer.decay": "constant",
    "generator.adapter.rank": 2,
    "fake_score.adapter.rank": 3,
}


@pytest.fixture(scope="module")
def build(teacher, data_dir):
    """A tiny run of configs/dmd.py:lora, on one device by default."""

    def call(devices=1, **overrides):
        config = programs.config(teacher, data_dir, variant="lora", **(SMALL | overrides))
        return resolve(config, jax.devices()[:devices])

    return call


def step_of(run, state, frozen, update_generator=True):
    """(state, metrics) after one step on the run's first batch."""
    with jax.set_mesh(run.mesh):
        step = jax.jit(partial(run.step, update_generator=update_generator))
        return step(state, frozen, next(run.batches(0)), loop.root_key(run.config))


def start(run):
    with jax.set_mesh(run.mesh):
        return run.start()


def moved(state):
    """The same state with adapters whose B is not zero: only then A has a gradient."""
    nets = jax.tree.map(lambda x: x + 0.05, state.nets)
    return type(state)(state.step, nets, jax.tree.map(jnp.copy, nets["generator"]), state.opt_state)


@pytest.fixture(scope="module")
def plain(build):
    """(state, metrics) after a step on one device of a run with one base and whole batches."""
    run = build()
    state, frozen = start(run)
    return jax.device_get(step_of(run, moved(state), frozen))


def test_only_the_factors_are_trained_stored_and_averaged(build):
    run = build()
    state, frozen = start(run)
    assert set(frozen) == {"teacher"}
    names = {f"blocks/{layer}" for layer in ("qkv", "out", "gate", "up", "down")}
    factors = {f"{name}/{which}/kernel" for name in names for which in "AB"}
    assert state.nets["generator"].keys() == state.ema.keys() == factors
    assert {x.dtype for x in jax.tree.leaves((state.nets, state.ema))} == {np.dtype("float32")}
    assert not any("head" in name or "bias" in name for name in named_leaves(state))
    nets = run.bind(state.nets, frozen)
    x, t, label = toys.normal(0, 2, 28, 28, 1), jnp.array([0.3, 0.8]), jnp.array([1, 9])
    for role in ("generator", "fake_score"):
        toys.assert_same(nets[role](x, t, label), frozen["teacher"](x, t, label))


def test_all_roles_share_one_base(build, plain, teacher, tmp_path):
    copies = {}
    for role in ("generator", "fake_score"):
        copies[f"{role}.weights"] = str(tmp_path / f"{role}.safetensors")
        shutil.copy(teacher, copies[f"{role}.weights"])
    shared, apart = build(), build(**copies)
    base = tree_bytes(shared.frozen["teacher"])
    assert tree_bytes(shared.frozen_shape()) == base
    assert tree_bytes(apart.frozen_shape()) == 3 * base
    assert set(apart.frozen) == {"teacher", "generator_base", "fake_score_base"}
    state_bytes = {tree_bytes(run.state_shape()) for run in (shared, apart)}
    (state_bytes,) = state_bytes
    assert state_bytes < 6 * base  # of whole networks it would be 7
    lines = describe(shared).splitlines()
    assert len([line for line in lines if "adapter of teacher" in line]) == 2
    assert not any("_base" in line for line in lines)
    assert "adapter of generator_base" in describe(apart)
    # The same gradients, which the moments of the first step show.
    state, frozen = start(apart)
    after, metrics = step_of(apart, moved(state), frozen)
    toys.assert_close(after.opt_state, plain[0].opt_state, rtol=1e-5, atol=1e-8)
    for role in ("generator", "fake_score"):
        assert metrics[f"{role}/grad_norm"] > 0


def test_roles_share_a_base_that_is_not_the_teachers(build, teacher, tmp_path):
    shutil.copy(teacher, tmp_path / "other.safetensors")
    path = str(tmp_path / "other.safetensors")
    run = build(**{"generator.weights": path, "fake_score.weights": path})
    assert set(run.frozen) == {"teacher", "generator_base"}
    assert run.bind.bases == {"generator": "generator_base", "fake_score": "generator_base"}
    assert "generator.sha256" in loop._identity(run)


def test_a_base_in_another_dtype_is_another_base(build):
    run = build(**{"generator.compute.dtype": "bfloat16", "fake_score.compute.remat": "full"})
    assert run.bind.bases == {"generator": "generator_base", "fake_score": "teacher"}
    assert run.bind.network("fake_score", *start_of(run, "fake_score")).net.config.remat == "full"


def start_of(run, role):
    state, frozen = start(run)
    return state.nets[role], frozen


def test_factors_are_split_as_their_kernels(build):
    shape = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
    run = build(devices=4, **shape)
    state, everywhere = run.state_shape(), ("tensor", *sharding.WEIGHTS)
    for tree in (state.nets["generator"], state.ema):
        assert tree["blocks/qkv/A/kernel"].sharding.spec == P(None, sharding.WEIGHTS, None)
        assert tree["blocks/qkv/B/kernel"].sharding.spec == P(None, None, everywhere)
        assert tree["blocks/down/A/kernel"].sharding.spec == P(None, everywhere, None)
        assert tree["blocks/down/B/kernel"].sharding.spec == P(None, None, sharding.WEIGHTS)
    found = named_leaves(state.opt_state)
    moments = [x for name, x in found.items() if name.endswith("mu/generator/blocks/qkv/A/kernel")]
    assert [x.sharding.spec for x in moments] == [P(None, sharding.WEIGHTS, None)]


def test_each_device_keeps_its_part_of_the_factors(build):
    run = build(devices=4, **{"mesh.data": 1, "mesh.fsdp": 4})
    for name, x in named_leaves(run.state_shape().nets["generator"]).items():
        assert 4 * math.prod(x.sharding.shard_shape(x.shape)) == x.size, name


def test_an_export_is_written_from_parts_and_stays_in_parts(build, tmp_path):
    """Whole, float32 weights may be too large for a device that trains on its part of them."""
    run = build(devices=4, **{"mesh.data": 1, "mesh.fsdp": 4})
    state, frozen = start(run)
    adapter = moved(state).ema
    with jax.set_mesh(run.mesh):
        exported = loop._export(run, adapter, frozen, tmp_path / "a.safetensors", 1)
    for name, x in named_leaves(exported.net.blocks).items():
        if name.endswith("kernel"):
            assert not x.sharding.is_fully_replicated, name
    one = {"teacher": jax.device_put(frozen["teacher"], jax.devices()[0])}
    wanted = run.bind.merged("generator", jax.device_put(adapter, jax.devices()[0]), one)
    toys.assert_close(
        weights.denoiser(tmp_path / "a.safetensors").net, wanted.net, rtol=1e-5, atol=1e-6
    )


def test_a_mesh_computes_what_one_device_does(build, plain):
    run = build(devices=4, **{"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2})
    state, frozen = start(run)
    after = jax.device_get(step_of(run, moved(state), frozen)[0])
    toys.assert_close(after.opt_state, plain[0].opt_state, rtol=2e-3, atol=1e-6)


def test_in_a_network_the_parts_of_a_kernel_are_gathered_as_the_kernel_is():
    rules = ((r"up/kernel$", P("fsdp", "tensor")), (r"bias$", P()))
    everywhere = ("tensor", *sharding.WEIGHTS)
    specs = {
        "blocks/up/kernel/value/base": P("fsdp", "tensor"),
        "blocks/up/kernel/value/base/values": P("fsdp", "tensor"),
        "blocks/up/kernel/value/base/scales": P(None, "tensor"),
        "blocks/up/kernel/value/A": P("fsdp", None),
        "blocks/up/kernel/value/B": P(None, everywhere),
        "blocks/up/A/kernel": P("fsdp", None),
        "blocks/up/B/kernel": P(None, everywhere),
        "blocks/A/kernel": None,
    }
    assert {name: sharding._find(rules, name) for name in specs} == specs
    assert sharding.relevant(rules, ["blocks/up/kernel"]) == rules[:1]


def test_accumulation_changes_nothing(build, plain):
    run = build(accumulate=2)
    state, frozen = start(run)
    after = step_of(run, moved(state), frozen)[0]
    toys.assert_close(after.opt_state, plain[0].opt_state, rtol=1e-3, atol=1e-6)


def test_muon_orthogonalises_the_factors(build):
    run = build(**{"generator.optimizer.cls": "Muon"})
    state, frozen = start(run)
    after, _ = step_of(run, state, frozen)
    B = after.nets["generator"]["blocks/qkv/B/kernel"]  # was zero
    values = np.linalg.svd(B[0], compute_uv=False)
    assert values.min() > 0.5 * values.max() > 0


def test_a_run_resumes_bit_for_bit_and_exports_both_forms(build, teacher, tmp_path, no_report):
    tiny_runs.start(build(), tmp_path / "straight")
    tiny_runs.start(build(steps=2), tmp_path / "stopped")
    tiny_runs.start(build(), tmp_path / "stopped")
    run, straight = build(), tmp_path / "straight"
    state, other = (tiny_runs.final(run, tmp_path / name, 4)[0] for name in ("straight", "stopped"))
    toys.assert_same(state, other)
    assert programs.same_tensors(straight / loop.EXPORT, tmp_path / "stopped" / loop.EXPORT)
    merged = weights.denoiser(straight / loop.EXPORT)
    toys.assert_same(merged.net, run.bind.merged("generator", state.ema, run.load_frozen()).net)
    base = weights.denoiser(teacher)
    toys.assert_same(merged.net.head.kernel[...], base.net.head.kernel[...])
    assert not jnp.array_equal(merged.net.blocks.qkv.kernel[...], base.net.blocks.qkv.kernel[...])
    # The adapter's file starts another run where this one's average ended.
    again = build(**{"generator.adapter.weights": str(straight / loop.ADAPTER)})
    toys.assert_same(start(again)[0].nets["generator"], state.ema)
    # Its base must be the same.
    programs.save_tiny(tmp_path / "other.safetensors", seed=3)
    changed = {"generator.weights": str(tmp_path / "other.safetensors")}
    with pytest.raises(ValueError, match=r"was trained on another base than .*other"):
        build(**changed, **{"generator.adapter.weights": str(straight / loop.ADAPTER)})
    with pytest.raises(ValueError, match=r"config.generator.adapter: .*another rank"):
        build(
            **{
                "generator.adapter.weights": str(straight / loop.ADAPTER),
                "generator.adapter.rank": 4,
            }
        )


@pytest.mark.parametrize(
    "overrides, reason",
    [
        ({"generator.adapter.rank": 0}, "config.generator.adapter: rank=0 must be 1 or more"),
        ({"generator.adapter.alpha": 0.0}, "alpha=0.0 above 0"),
        ({"generator.adapter.matrices": "("}, "is no expression"),
        ({"fake_score.adapter.matrices": "x"}, "config.fake_score.adapter: .*matches no weight"),
        ({"generator.adapter.weights": "absent"}, "config.generator.adapter: there is no file"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(build, overrides, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        build(**overrides)


def test_an_adapter_needs_weights_and_a_trained_role(build, teacher, data_dir):
    config = programs.config(teacher, data_dir, variant="lora", **SMALL)
    with config.unlocked():
        config.teacher.adapter = config.generator.adapter
    with pytest.raises(ValueError, match=r"config.teacher.adapter: this role is not trained"):
        resolve(config)
    run = build()
    with run.config.unlocked():
        run.config.generator.weights = "random"
    with pytest.raises(ValueError, match=r"config.generator.weights is 'random'"):
        adapters.resolve(run.config, run.nets, run.frozen, files=True)


def test_the_scale_is_alpha_over_rank():
    assert LoRA(rank=64, alpha=8.0).scale == 0.125
