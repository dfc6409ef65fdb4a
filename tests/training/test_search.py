"""The search compiles few candidates and returns the fastest that fits."""

import dataclasses
import types

import jax
import programs
import pytest

from dmd_jax.training import plan, search, topologies
from dmd_jax.training.configuration import flatten

CHIP = topologies.CHIPS["v5e"]


@pytest.fixture(scope="module")
def config(teacher, data_dir):
    return programs.config(teacher, data_dir)


@pytest.fixture(scope="module")
def found(config):
    return search.candidates(config, CHIP, jax.devices()[:4], {})


@pytest.fixture
def quick(monkeypatch):
    """One mesh, and FLOPs of zero in place of those of a traced program."""
    monkeypatch.setattr(search, "_meshes", lambda _: [dict(data=1, fsdp=4, context=1, tensor=1)])
    monkeypatch.setattr(plan, "flops", lambda _: types.SimpleNamespace(run=0.0))


@pytest.fixture
def compiled(config, found, monkeypatch):
    """Searches with a compiler that only compares shares; (its answer, what it compiled)."""

    def call(largest_share, limit=100, say=lambda _: None, slower=lambda _: 1, needed=0):
        seen = []

        def planned(changed, chip, devices):
            mesh, parts = dict(changed.mesh), changed.accumulate
            remat = changed.generator.compute.remat
            [at] = [c for c in found if (c.mesh, c.parts, c.remat) == (mesh, parts, remat)]
            seen.append(at)
            refusal = f"RESOURCE_EXHAUSTED. Used {needed / plan.GIB:.2f}G of hbm."
            step = plan.Step(1, 0, "" if at.share <= largest_share else refusal)
            step = dataclasses.replace(step, seconds={"memory": slower(at) * at.seconds})
            return plan.Plan("chip", 4, mesh, 8, parts, 1, {}, 0, {True: step})

        monkeypatch.setattr(search, "candidates", lambda *_: found)
        monkeypatch.setattr(search, "savings", lambda *_: [{}])
        monkeypatch.setattr(plan, "plan", planned)
        best, result = search.search(config, CHIP, jax.devices()[:4], limit, say)
        return best, result, seen

    return call


def test_candidates_are_all_meshes_in_all_parts(found):
    """Of four devices there are ten meshes; their batch of eight has 8, 4 or 2 samples a device."""
    meshes = {tuple(c.mesh.values()) for c in found}
    assert len(meshes) == 10 and all(a * b * c * d == 4 for a, b, c, d in meshes)
    parts = {c.parts for c in found if c.mesh["data"] * c.mesh["fsdp"] == 4}
    assert parts == {1, 2}
    assert {c.parts for c in found if c.mesh["context"] == 4} == {1, 2, 4, 8}


def test_the_first_candidate_has_the_fewest_flops_and_the_most_sharded_weights(found):
    first = found[0]
    assert first.remat == "none" and first.parts == 1 and first.mesh["fsdp"] == 4
    assert first.seconds == min(c.seconds for c in found)
    assert first.seconds < max(c.seconds for c in found)  # rematerialisation


def test_all_networks_that_have_the_setting_change_their_rematerialisation_together(found):
    """Gradients pass through the teacher too, in SiD and DMD2."""
    for candidate in found:
        roles = {n.split(".")[0] for n in candidate.overrides if n.endswith("compute.remat")}
        assert roles == {"teacher", "generator", "fake_score"}


def test_where_everything_fits_and_flops_decide_one_compilation_is_enough(compiled, found):
    best, result, seen = compiled(largest_share=100)
    assert result.fits and seen == [best] == [found[0]]


def test_the_fastest_is_returned_whenever_it_was_compiled(compiled, found):
    best, result, seen = compiled(largest_share=100, slower=lambda c: 3 - (c == found[1]))
    assert best == found[1] and seen[:3] == found[:3] and result.least_seconds == 2 * best.seconds


def test_what_needs_more_than_a_refused_candidate_is_not_compiled(compiled):
    best, result, seen = compiled(largest_share=1)
    assert result.fits and best.share <= 1
    refused = [c for c in seen if c.share > 1]
    assert refused and not any(
        b.is_hopeless(a, 0, 1) for i, a in enumerate(refused) for b in refused[i + 1 :]
    )


def test_the_bytes_of_a_refusal_spare_candidates_that_are_too_large_even_in_proportion(found):
    """Twice the memory is needed: half of the samples may fit, and more than half cannot."""
    other = next(c for c in found if c.share == 2 and c.remat == "none")
    alike = [c for c in found if c.remat == "none" and c.kept >= other.kept]
    shares = {c.share for c in alike}
    spared = {c.share for c in alike if c.is_hopeless(other, needed=20, available=10)}
    assert spared == {share for share in shares if share > 1} and {0.5, 1} <= shares
    assert not any(c.is_hopeless(other, 20, 10) for c in found if c.kept < other.kept)
    assert not any(c.is_hopeless(other, 20, 10) for c in found if c.remat != "none")


def test_the_search_reads_these_bytes(compiled, found):
    """The first needs 100 times too much: nothing else is compiled without rematerialisation."""
    *_, seen = compiled(largest_share=0.1, needed=100 * CHIP.memory)
    assert sum(c.remat == "none" for c in seen) == 1 < len(seen)


def test_the_search_ends_at_its_limit(compiled):
    said = []
    best, result, seen = compiled(largest_share=0, limit=3, say=said.append)
    assert len(seen) == 3 and not result.fits and best == seen[-1]
    assert said[-1] == "the limit is reached: other settings may fit"
    best, result, seen = compiled(largest_share=100, limit=2, say=said.append, slower=lambda _: 10)
    assert len(seen) == 2 and result.fits and best == seen[0]
    assert said[-1] == "the limit is reached: other candidates may be faster"


def test_offloaded_inputs_come_after_recomputed_layers_and_need_no_more(found):
    """So that they are compiled where recomputed layers do not fit."""
    order = [search.REMATS.index(c.remat) for c in found]
    assert order == sorted(order)
    full, offload = (next(c for c in found if c.remat == r) for r in ("full", "offload"))
    assert full.is_hopeless(offload, 0, 1) and not offload.is_hopeless(full, 0, 1)


@pytest.mark.parametrize("cheap", ["generator.optimizer.memory", "teacher.compute.memory"])
def test_memory_is_saved_at_a_price_where_nothing_fits_and_no_more_than_needed(
    config, monkeypatch, quick, cheap
):
    """What a plan would say is given: that it fits once an entry of the config is set."""
    tried = []

    def planned(changed, chip, devices):
        values = flatten(changed)
        tried.append({name for name in prices if values[name] is not None})
        step = plan.Step(1, 0, "" if cheap in tried[-1] else "RESOURCE_EXHAUSTED")
        step = dataclasses.replace(step, seconds={"FLOPs": 0.0})
        return plan.Plan("chip", 4, dict(changed.mesh), 8, 1, 1, {}, 0, {True: step})

    first, *savings = search.savings(config, jax.devices()[:4])
    prices = {name for saving in savings for name in saving}
    monkeypatch.setattr(plan, "plan", planned)
    best, result = search.search(config, CHIP, jax.devices()[:4], 100, lambda _: None)
    assert first == {} and tried[0] == set() and result.fits
    fitting = next(saving for saving in savings if cheap in saving)
    assert fitting.items() <= best.overrides.items() and tried[-1] == set(fitting)


def test_what_is_kept_on_the_devices_is_less_with_each_saving(config, quick):
    devices = jax.devices()[:4]
    kept = [
        min(c.kept for c in search.candidates(config, CHIP, devices, saving))
        for saving in search.savings(config, devices)
    ]
    none, moments, moved, rounded = kept
    assert none > moments > rounded > moved


def test_what_keeps_more_than_the_chip_has_is_not_compiled(config, found, monkeypatch):
    monkeypatch.setattr(search, "candidates", lambda *_: found)
    monkeypatch.setattr(plan, "plan", None)
    small = dataclasses.replace(CHIP, memory=1000)
    with pytest.raises(ValueError, match="take more devices or larger chips"):
        search.search(config, small, jax.devices()[:4], 3, lambda _: None)


def named(savings):
    """The entries that each of them changes."""
    return [set(saving) for saving in savings]


def test_the_state_of_optimizers_stays_on_gpus_whose_plans_count_it_there(config):
    device = types.SimpleNamespace(platform="gpu")
    wanted = [set(), {"teacher.compute.memory"}, {"teacher.compute.weights_dtype"}]
    assert named(search.savings(config, [device])) == wanted


def test_what_a_config_has_already_or_has_no_entry_for_is_no_saving(teacher, data_dir):
    saved = {f"{role}.optimizer.memory": "host" for role in ("generator", "fake_score")}
    config = programs.config(teacher, data_dir, **saved, **{"teacher.compute.memory": "host"})
    int8 = {"teacher.compute.weights_dtype"}
    assert named(search.savings(config, jax.devices()[:4])) == [set(), int8]
    with config.unlocked():
        del config.teacher["compute"]
    assert named(search.savings(config, jax.devices()[:4])) == [set()]


def test_a_config_that_lacks_a_network_is_refused_by_its_path(teacher, data_dir):
    config = programs.config(teacher, data_dir)
    with config.unlocked():
        del config["teacher"]
    with pytest.raises(ValueError, match=r"config lacks .*'teacher'"):
        search.search(config, CHIP, jax.devices()[:4], 3, lambda _: None)


def test_a_rematerialisation_that_a_network_does_not_have_is_left_out(config, monkeypatch, quick):
    prepare = plan.prepare

    def refuse(changed, devices):
        if changed.generator.compute.remat == "offload":
            raise ValueError("config.generator: remat='offload'")
        return prepare(changed, devices)

    monkeypatch.setattr(plan, "prepare", refuse)
    found = search.candidates(config, CHIP, jax.devices()[:4], {})
    assert {candidate.remat for candidate in found} == {"none", "full"}
