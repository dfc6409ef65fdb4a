"""What a run costs: passes of its step, in FLOPs."""

import jax
import numpy as np
import programs
import pytest

from dmd_jax.data import trajectories
from dmd_jax.training.cost import Cost, batch_shape, cost, si
from dmd_jax.training.description import describe
from dmd_jax.training.run import build


@pytest.fixture(scope="module")
def run(teacher, data_dir):
    return build(programs.config(teacher, data_dir), jax.devices()[:1])


def test_a_step_costs_its_forward_and_backward_passes(run):
    """Rollout, guided teacher, fake score, and a forward and backward pass of three each.

    No gradient reaches a network's input: the backward pass takes one product less in the layers
    that read the pixels and the time.
    """
    worked_out, c = cost(run), run.nets["generator"].net.config
    tokens = (c.image_size // c.patch) ** 2
    saved = 2 * run.config.batch_size * c.dim * (tokens * c.patch**2 * c.channels + 256)
    rollout = run.method.expected_exit_step + 1
    with_update, without = rollout + 2 + 2 + 1 + 3, rollout + 3
    assert worked_out.step[True] == round(with_update * worked_out.forward - 2 * saved)
    assert worked_out.step[False] == round(without * worked_out.forward - saved)


def test_a_run_costs_its_steps_of_both_kinds(run):
    worked_out, config = cost(run), run.config
    learns = -(-config.steps // config.generator_every)
    assert worked_out.steps == {True: learns, False: config.steps - learns}
    total = learns * worked_out.step[True] + (config.steps - learns) * worked_out.step[False]
    assert worked_out.run == total


def test_the_batch_of_a_cost_is_the_batch_of_training(run):
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), next(run.batches(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch_shape(run)) == wanted


def test_pairs_that_are_not_made_yet_count_as_those_that_will_be(teacher, data_dir, tmp_path):
    def dry_run(pairs):
        values = {"evaluate.steps": (1,), "data.pairs": str(tmp_path / pairs)}
        config = programs.config(teacher, data_dir, variant="dmd1", **values)
        return build(config, jax.devices()[:1], files=False)

    shape, pair = (28, 28, 1), np.zeros((2, 28, 28, 1))
    trajectories.write(tmp_path / "made", [(0, 0)], lambda _: pair, shape, levels=[1.0], source={})
    assert batch_shape(dry_run("no such folder")) == batch_shape(dry_run("made"))


def test_pairs_of_another_guidance_than_the_methods_are_refused(teacher, data_dir, tmp_path):
    def run(guidance):
        made, pair = tmp_path / str(guidance), np.zeros((2, 28, 28, 1))
        how = dict(levels=[1.0], source={"guidance": guidance})
        trajectories.write(made, [(0, 0)], lambda _: pair, (28, 28, 1), **how)
        values = {"evaluate.steps": (1,), "data.pairs": str(made), "method.guidance": 1.5}
        config = programs.config(teacher, data_dir, variant="dmd1", **values)
        return build(config, jax.devices()[:1])

    assert run(1.5).source.guidance == 1.5
    with pytest.raises(ValueError, match=r"made with guidance=1.0, but config.method.guidance=1.5"):
        run(1.0)


def test_the_description_of_a_run_says_its_work(run):
    assert describe(run).splitlines()[-3:] == [
        f"{name}: {text}" for name, text in cost(run).lines().items()
    ]
    lines = Cost({True: 12_638_000_000}, 1_282_670_000, {True: 800}, 32).lines()
    assert lines["FLOPs of a step"] == "12.6 G with the generator's update"
    assert lines["FLOPs of the run"] == "10.1 T in 800 steps"


@pytest.mark.parametrize(
    "value, wanted", [(0, "0 "), (999, "999 "), (1_234, "1.23 k"), (5.49e20, "549 E")]
)
def test_numbers_have_three_digits_and_a_prefix(value, wanted):
    assert si(value) == wanted
