"""Runs with frozen layers and optimizer states in the memory of the host: the same numbers."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import toys

from dmd_jax import weights
from dmd_jax.devices import host_memory
from dmd_jax.rollouts import samplers
from dmd_jax.training import checkpoint, configuration, loop, topologies
from dmd_jax.training.description import describe
from dmd_jax.training.hlo import Program
from dmd_jax.training.plan import Step as PlannedStep
from dmd_jax.training.plan import _inputs, _measured, kept
from dmd_jax.training.run import build

HOST = {
    "teacher.compute.memory": "host",
    "generator.optimizer.memory": "host",
    "fake_score.optimizer.memory": "host",
}
# One call of the generator, without a critic's step of its own: the program is compiled sooner.
ONE_STEP = {"method.times": (1.0,), "method.strides": (1,), "method.last_step_share": 0.0}


@pytest.fixture(scope="module")
def resolve(data_dir, tmp_path_factory):
    """A tiny run on two devices, whose teacher has several layers."""
    path = programs.save_tiny(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", depth=3)

    def call(devices=None, **overrides):
        settings = {"mesh.data": 1, "mesh.fsdp": 2, "teacher.compute.unroll": 1} | ONE_STEP
        config = programs.config(path, data_dir, **settings | overrides)
        return build(config, devices or jax.devices()[:2])

    return call


def take(run, steps=2):
    """(compiled step, frozen networks, TrainState, metrics) after some steps from the start."""
    with jax.set_mesh(run.mesh):
        step = loop.lower(run, *_inputs(run), True).compile()
        (state, frozen), metrics = run.start(), {}
        for _, batch in zip(range(steps), run.batches(0), strict=False):
            state, metrics = step(state, frozen, batch, loop.root_key(run.config))
    return types.SimpleNamespace(step=step, frozen=frozen, state=state, metrics=metrics, run=run)


@pytest.fixture(scope="module")
def plain(resolve):
    return take(resolve())


@pytest.fixture(scope="module")
def hosted(resolve):
    return take(resolve(**HOST))


def kinds(tree):
    """The kinds of memory of the arrays of a tree."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def assert_same(a, b):
    """The same bits, wherever they are."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_steps_compute_the_same_bits(plain, hosted):
    assert_same(plain.state, hosted.state)
    assert_same(plain.metrics, hosted.metrics)
    assert float(hosted.metrics["generator/update_norm"]) > 0


def test_arrays_are_where_the_config_says_before_and_after_a_step(plain, hosted):
    assert kinds((plain.state, plain.frozen)) == {"device"}
    assert kinds((hosted.state.nets, hosted.state.ema)) == {"device"}
    moments = jax.tree.leaves(hosted.state.opt_state)
    assert {x.sharding.memory_kind for x in moments if x.ndim} == {host_memory.KIND}
    assert kinds([x for x in moments if not x.ndim]) == {"device"}
    blocks = hosted.frozen["teacher"].net.blocks
    assert kinds((blocks.qkv.kernel, blocks.down.kernel)) == {host_memory.KIND}
    assert kinds(hosted.frozen["teacher"].net.head) == {"device"}


def test_what_is_planned_is_what_the_host_keeps(plain, hosted):
    def held(tree, kind):
        arrays = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind == kind]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    for by_host, kind in ((False, "device"), (True, host_memory.KIND)):
        found = kept(hosted.run, by_host=by_host)
        assert found["teacher"] == held(hosted.frozen["teacher"], kind) > 0
        assert found["optimizers"] == held(hosted.state.opt_state, kind) > 0
    assert not any(kept(plain.run, by_host=True).values())
    here, there = kept(hosted.run), kept(hosted.run, by_host=True)
    assert {name: here[name] + there[name] for name in here} == kept(plain.run)


def test_a_compiler_that_knows_no_host_memory_leaves_it_to_arithmetic(plain, hosted):
    """The CPU's, and the GPU's without a card: moments count as if they were on the devices."""

    def total(taken):
        keeps = kept(taken.run), kept(taken.run, by_host=True)
        return _measured(PlannedStep(1, 1), taken.step, taken.run, None, *keeps)

    saved = kept(hosted.run, by_host=True)["teacher"]
    a, b = total(plain), total(hosted)
    assert a.total - a.temporaries - (b.total - b.temporaries) == saved


def test_such_a_teacher_is_sampled_for_the_report(plain, hosted):
    sampler = hosted.run.evaluator.teacher_samplers[0]
    labels = np.arange(4)
    samples = [
        list(samplers.draw(x.frozen["teacher"], sampler, labels, labels, (28, 28, 1), batch=4))
        for x in (plain, hosted)
    ]
    assert_same(*samples)


def test_a_teacher_in_eight_bits_is_the_same_there(resolve):
    int8 = {"teacher.compute.weights_dtype": "int8"}
    runs = [resolve(**int8, **more) for more in ({}, {"teacher.compute.memory": "host"})]
    here, there = (run.load_frozen()["teacher"] for run in runs)
    assert kinds(there.net.blocks.qkv.kernel) == {host_memory.KIND}
    x, t, label = toys.normal(0, 2, 28, 28, 1), jnp.array([0.3, 0.8]), jnp.array([1, 9])
    with jax.set_mesh(runs[0].mesh):
        assert_same(*(jax.jit(lambda net: net(x, t, label))(net) for net in (here, there)))


def test_a_dry_run_says_what_is_in_the_memory_of_the_host(plain, hosted):
    lines = describe(hosted.run).splitlines()
    (teacher,) = [line for line in lines if line.startswith("teacher")]
    assert teacher.endswith("layers in the memory of the host")
    (moments,) = [line for line in lines if line.startswith("optimizers")]
    assert moments.endswith("of fake_score, generator in the memory of the host")
    assert "memory of the host" not in describe(plain.run)


@pytest.mark.parametrize("there", ["plain", "hosted"])
def test_a_checkpoint_is_read_with_the_other_setting(there, request, tmp_path):
    saved = request.getfixturevalue(there)
    other = request.getfixturevalue({"plain": "hosted", "hosted": "plain"}[there])
    checkpoints = loop.Checkpointer(tmp_path)
    checkpoints.save(2, saved.state)
    checkpoints.close()
    state, _ = checkpoint.read(tmp_path / "checkpoints" / "2", other.run.state_shape())
    assert_same(state, saved.state)
    assert kinds(state.opt_state) == kinds(other.state.opt_state)


def test_a_resumed_run_may_change_where_arrays_are(plain, hosted):
    configs = [configuration.flatten(taken.run.config) for taken in (plain, hosted)]
    assert configs[0] != configs[1]
    assert not configuration.differences(*configs)


def test_what_cannot_be_in_the_memory_of_the_host_is_refused(resolve, monkeypatch):
    with pytest.raises(ValueError, match=r"config.generator.compute.memory='host', but the gen"):
        resolve(**{"generator.compute.memory": "host"})
    with pytest.raises(ValueError, match=r"config.teacher.compute.memory='disk': use 'host', or"):
        resolve(**{"teacher.compute.memory": "disk"})
    with pytest.raises(ValueError, match=r"config.generator.optimizer: memory='disk': use 'host'"):
        resolve(**{"generator.optimizer.memory": "disk"})
    monkeypatch.setattr(host_memory, "KIND", "of_no_device")
    remat = {f"{role}.compute.remat": "offload" for role in ("generator", "teacher")}
    for setting, value in (HOST | remat).items():
        with pytest.raises(ValueError, match=rf"config.{setting}='{value}': .* is needed. Remove"):
            resolve(**{setting: value})


def test_a_discriminator_reads_no_features_from_the_memory_of_the_host(teacher, data_dir):
    settings = {"method.features": "teacher", "discriminator.model.blocks": (0,)}
    settings |= {"teacher.compute.memory": "host"}
    config = programs.config(teacher, data_dir, variant="dmd2", **settings)
    with pytest.raises(ValueError, match=r"features='teacher' reads this network in pieces"):
        build(config, jax.devices()[:1])


def test_an_adapter_works_on_a_base_in_the_memory_of_the_host(hosted, teacher, data_dir):
    settings = {"teacher.compute.memory": "host", "mesh.data": 1, "mesh.fsdp": 2}
    settings |= {f"{role}.compute.memory": "host" for role in ("generator", "fake_score")}
    config = programs.config(teacher, data_dir, variant="lora", **settings)
    run = build(config, jax.devices()[:2])
    assert set(run.frozen) == {"teacher"}  # the base of all
    frozen, base = run.load_frozen(), weights.denoiser(teacher)
    adapter = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), run.bind.shapes("generator"))
    x, t, label = toys.normal(0, 2, 28, 28, 1), jnp.array([0.3, 0.8]), jnp.array([1, 9])

    def total(adapter, frozen):
        return run.bind.network("generator", adapter, frozen)(x, t, label).sum()

    with jax.set_mesh(run.mesh):
        toys.assert_same(
            *(
                jax.jit(jax.grad(total))(adapter, {"teacher": it})
                for it in (frozen["teacher"], base)
            )
        )
        merged = run.bind.merged("generator", adapter, frozen)
    toys.assert_same(merged, run.bind.merged("generator", adapter, {"teacher": base}))
    assert kinds(merged) == {"device"}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU's compiler: pip install libtpu",
)
@pytest.mark.slow
def test_a_tpu_fetches_a_part_of_one_layer_after_the_other(resolve):
    _, devices = topologies.load("v5e:2x2")
    taken, runs = {}, {"plain": {}, "hosted": HOST}
    for name, settings in runs.items():
        runs[name] = run = resolve(devices[:2], **settings)
        taken[name] = loop.lower(run, *_inputs(run), True).compile()
    wanted = sum(kept(runs["hosted"], by_host=True).values())
    plain, hosted = (program.memory_analysis() for program in taken.values())
    assert plain.argument_size_in_bytes - hosted.argument_size_in_bytes >= wanted
    assert hosted.host_argument_size_in_bytes >= wanted  # small arrays are padded
    assert hosted.host_temp_size_in_bytes == 0  # nothing is computed there
    assert "HostExecute" not in taken["hosted"].as_text()
    traffic = {name: Program(taken[name].as_text()).traffic().host for name in taken}
    assert traffic["plain"] == 0 and traffic["hosted"] >= wanted
