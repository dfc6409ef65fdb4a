"""A plan says what the run then needs; what cannot be planned is refused."""

import dataclasses
import importlib.util
import json
import types

import jax
import numpy as np
import programs
import pytest

from dmd_jax import plan as command
from dmd_jax.training import gpus, loop, topologies
from dmd_jax.training import plan as plans
from dmd_jax.training.cost import cost
from dmd_jax.training.hlo import Traffic
from dmd_jax.training.plan import GIB, Step, plan, plan_run, prepare, roofline

TPU = topologies.CHIPS["v5e"]


@pytest.fixture(autouse=True, scope="module")
def devices():
    """All devices exist before a topology could choose their number."""
    jax.devices()


@pytest.fixture(scope="module")
def config(teacher, data_dir):
    return programs.config(teacher, data_dir, **{"mesh.data": 1, "mesh.fsdp": 2})


@pytest.fixture(scope="module")
def run(config):
    return prepare(config, jax.devices()[:2])


@pytest.fixture(scope="module")
def planned(run):
    return plan_run(run, None)


def test_a_plan_has_the_memory_of_the_programs_that_a_run_takes(run, planned):
    with jax.set_mesh(run.mesh):
        programs_of_run = loop.compile_steps(run)
        for kind, step in planned.steps.items():
            memory = programs_of_run[kind].result().memory_analysis()
            assert step.temporaries == memory.temp_size_in_bytes > 0
            arguments = memory.argument_size_in_bytes
            assert step.total >= arguments + step.temporaries
    assert planned.steps.keys() == {True, False}


def test_a_plan_has_the_bytes_that_a_started_run_keeps(run, planned):
    with jax.set_mesh(run.mesh):
        state, frozen = run.start()
    kept = {
        **frozen,
        **state.nets,
        "optimizers": state.opt_state,
        "averages": (state.ema, state.more_ema),
    }
    for role, tree in kept.items():
        arrays = jax.tree.leaves(tree)
        assert planned.roles[role] == sum(x.addressable_shards[0].data.nbytes for x in arrays)


def test_the_teacher_is_there_in_steps_that_do_not_read_it(planned):
    """The compiler drops arguments that a step does not use; the device keeps them."""
    step = planned.steps[False]
    assert step.total >= sum(planned.roles.values()) + step.temporaries


def test_a_plan_has_the_flops_of_a_dry_run(run, planned):
    assert {kind: step.flops for kind, step in planned.steps.items()} == cost(run).step
    assert {kind: step.count for kind, step in planned.steps.items()} == cost(run).steps


def test_a_plan_gathers_the_weights(planned):
    assert all(step.traffic.sent["all-gather"] > 0 for step in planned.steps.values())


def test_a_run_that_needs_more_than_the_device_has_does_not_fit(planned):
    assert planned.fits and "\nfits\n" in planned.table()
    need = max(step.total for step in planned.steps.values())
    exact = dataclasses.replace(planned, available=need)
    small = dataclasses.replace(planned, available=need - 1)
    assert exact.fits and not small.fits and "DOES NOT FIT" in small.table()


def test_what_the_host_keeps_is_no_memory_of_the_device(planned):
    shown = dataclasses.replace(planned, host={"teacher": 3 * GIB, "batch": 0})
    kept = next(line for line in planned.table().splitlines() if line.startswith("kept"))
    table = shown.table().splitlines()
    assert table[table.index(kept) + 1].split() == ["teacher,", "by", "the", "host", "3.00"]
    assert len(table) == len(planned.table().splitlines()) + 1


def test_the_roofline_is_bytes_and_flops_over_peaks(run):
    traffic = Traffic(memory=819e9, sent={"all-gather": 150e9, "all-reduce": 90e9})
    seconds = roofline(197e12, traffic, TPU, run)
    # The networks are float32, which takes six products of bfloat16.
    assert seconds == pytest.approx({"FLOPs": 6.0, "memory": 1.0, "links": 1.2})
    apart = roofline(0, dataclasses.replace(traffic, network=31e9), TPU, run)
    assert apart["network"] == pytest.approx(10.0) and apart["links"] < 1.2
    assert roofline(0, Traffic(host=30e9), TPU, run)["host"] == pytest.approx(2.0)


def test_hours_are_those_of_all_steps(planned):
    seconds = {"FLOPs": 2.0, "memory": 1.0}
    steps = {
        kind: dataclasses.replace(step, seconds=seconds) for kind, step in planned.steps.items()
    }
    timed = dataclasses.replace(planned, steps=steps)
    assert (timed.least_seconds, timed.most_seconds) == (2.0 * 12, 3.0 * 12)
    assert "estimate" in timed.table() and "estimate" not in planned.table()


def test_the_command_says_whether_it_fits(call, planned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(programs.ROOT)
    path = tmp_path / "plan.json"
    args = ["--config=configs/dmd.py", "--topology=cpu:2", f"--json={path}"]
    monkeypatch.setattr(command, "plan", lambda config, chip, devices: planned)
    assert call(command, *args) == 0
    assert "with the generator's update" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["fits"] is True and written["hours"]["least"] is None
    assert written["roles"]["teacher"] > 0 and len(written["steps"]) == 2
    small = dataclasses.replace(planned, available=1)
    monkeypatch.setattr(command, "plan", lambda config, chip, devices: small)
    assert call(command, *args) == 1


@pytest.mark.parametrize(
    "topology, slices, words",
    [
        ("v5p-64", 1, "unknown topology 'v5p-64'; write one like v5e"),
        ("b9000:1x8", 1, r"h100:8x8, h200:2x4 \(nodes and the GPUs of each\)"),
        ("h100:8", 1, "the nodes and the GPUs of each, h100:1x8"),
        ("h100:0x8", 1, "the nodes and the GPUs of each"),
        ("h100:1x8", 2, "2 slices of 'h100:1x8'"),
        ("cpu", 1, "unknown topology 'cpu'"),
        ("cpu:2x2", 1, "the number of devices"),
        ("cpu:2", 2, "2 slices of 'cpu:2'"),
        ("cpu:512", 1, "JAX_NUM_CPU_DEVICES=512"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(topology, slices, words):
    with pytest.raises(ValueError, match=words):
        topologies.load(topology, slices)


def test_a_missing_compiler_is_refused_with_its_package(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    with pytest.raises(ImportError, match=r"pip install 'dmd_jax\[plan\]'"):
        topologies.load("v5e:2x2")


def test_the_missing_wheels_for_cuda_are_named(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    with pytest.raises(ImportError, match=r"pip install 'dmd_jax\[cuda\]'"):
        topologies.load("h100:1x8")


@pytest.mark.parametrize("name", gpus.TARGETS)
def test_of_a_gpus_memory_a_plan_has_what_jax_takes(name, planned, monkeypatch):
    card = gpus.TARGETS[name]
    asked = {}
    found = types.SimpleNamespace(devices=["device"])
    monkeypatch.setattr(
        gpus.topologies, "get_topology_desc", lambda **kwargs: asked.update(kwargs) or found
    )
    assert topologies.load(f"{name}:2x4")[0].memory == 0.75 * card.memory
    with monkeypatch.context() as earlier:
        earlier.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
        assert topologies.load(f"{name}:2x4")[0].memory == 0.8 * card.memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    chip, devices = topologies.load(f"{name}:2x4")
    assert chip.memory == 0.9 * card.memory and devices == ["device"]
    assert asked["topology"] == "1x2x4" and str(card.memory) in asked["target_config"]
    table = dataclasses.replace(planned, caveat=chip.caveat).table()
    assert "JAX takes 90%" in table and "without cuDNN's workspace" in table


@pytest.mark.parametrize("kind, islands", [("gpu", [0, 0, 1, 1]), ("tpu", [5, 6, 7, 8])])
def test_networks_join_the_nodes_of_gpus_and_the_slices_of_tpus(kind, islands):
    devices = np.array(
        [
            types.SimpleNamespace(platform=kind, process_index=i // 2, slice_index=5 + i)
            for i in range(4)
        ]
    )
    assert plans.islands(types.SimpleNamespace(devices=devices.reshape(2, 2))) == islands


@pytest.mark.parametrize(
    ("refusal", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (504.25G) exceeds available HBM (31.25G).",
            504.25,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 512.00M of 15.48G hbm.", 0.5),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_a_refused_step_needs_is_what_the_compiler_names(refusal, gib):
    assert Step(1, 0, refusal).needed == gib * GIB


def test_the_command_refuses_with_one_sentence(call, capsys, monkeypatch):
    monkeypatch.chdir(programs.ROOT)
    assert call(command, "--config=configs/dmd.py", "--topology=cpu") == 2
    assert capsys.readouterr().err.startswith("error: unknown topology 'cpu'")
    assert call(command, "--config=configs/dmd.py", "--topology=cpu:2", "--search=3") == 2
    assert "name a TPU or GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "available, code, text", [(GIB, 0, "the fastest that fits:"), (1, 1, "nothing fits; the last:")]
)
def test_the_command_plans_what_a_search_found(
    available, code, text, call, planned, capsys, monkeypatch
):
    monkeypatch.chdir(programs.ROOT)
    monkeypatch.setattr(topologies, "load", lambda *_: (TPU, jax.devices()[:4]))
    best = types.SimpleNamespace(flags="--config.mesh.fsdp=4")

    def search(config, chip, devices, limit, say):
        assert (chip, len(devices), limit) == (TPU, 4, 3)
        return best, dataclasses.replace(planned, available=available)

    monkeypatch.setattr(command, "search", search)
    args = "--config=configs/dmd.py", "--topology=v5e:2x2", "--search=3"
    assert call(command, *args) == code
    printed = capsys.readouterr().out
    assert f"{text}\n  {best.flags}\n" in printed and "a program may use" in printed


libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU's compiler: pip install libtpu",
)


@libtpu
@pytest.mark.slow
def test_the_tpus_compiler_takes_a_run_and_refuses_one_that_is_too_large(config):
    chip, devices = topologies.load("v5e:2x2")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"mesh.fsdp": 4, "generator_every": 1})
    result = plan(config, chip, devices)
    assert result.fits and result.kind == "TPU v5 lite" and result.steps.keys() == {True}
    step = result.steps[True]
    assert 0 < step.total < GIB and step.traffic.sent["all-gather"] > 0
    assert not step.traffic.unknown_loops and 0 < step.least_seconds < step.most_seconds
    config.update_from_flattened_dict({"batch_size": 2**24})
    refused = plan(config, chip, devices)
    assert not refused.fits and "RESOURCE_EXHAUSTED" in refused.steps[True].refusal
    assert "the compiler refuses" in refused.table()


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the compiler for GPUs: pip install 'dmd_jax[cuda]'",
)
@pytest.mark.slow
def test_the_compiler_of_gpus_takes_a_run_on_several_nodes(config):
    chip, devices = topologies.load("h100:2x2")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"mesh.fsdp": 4, "generator_every": 1})
    result = plan(config, chip, devices)
    assert result.fits and result.kind == gpus.TARGETS["h100"].name
    step = result.steps[True]
    assert 0 < step.total < GIB and step.traffic.sent["all-gather"] > 0
    # Of every ring of four, half of what is sent goes over the network, from one of two cards.
    gathered = step.traffic.sent["all-gather"] + step.traffic.sent["all-reduce"]
    assert gathered / 2 <= step.traffic.network < sum(step.traffic.sent.values())
    assert not step.traffic.unknown_loops and 0 < step.least_seconds < step.most_seconds
