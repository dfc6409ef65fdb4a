"""The series of a run, damaged in every way that disks and schedulers do."""

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import (
    ABSTRACT,
    Net,
    assert_same,
    flip_a_bit,
    new_state,
    save_steps,
    values_file,
)

from dmd_jax.devices.paths import tree_bytes
from dmd_jax.training.checkpoint import CheckpointError
from dmd_jax.training.checkpoints import Checkpointer


def test_state_and_extra_come_back_bit_for_bit(tmp_path):
    save_steps(tmp_path, (1, 2))
    with Checkpointer(tmp_path) as checkpointer:
        state, step, extra = checkpointer.restore_latest(ABSTRACT)
    assert (step, extra) == (2, {"note": "at 2"})
    assert_same(state, new_state(2))
    assert isinstance(state.nets["generator"], Net)


def test_nothing_saved_is_none_not_an_error(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(ABSTRACT) is None
        assert checkpointer.restore_best(ABSTRACT) is None


def test_only_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    save_steps(tmp_path, (1, 2, 3, 3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]


def test_save_is_safe_when_its_arrays_are_donated_at_once(tmp_path):
    @jax.jit
    def draw(key):
        return {f"{i}": jax.random.normal(key, (512, 1024)) + i for i in range(8)}

    def advance(tree):
        return jax.tree.map(lambda x: x * 2 + 1, tree)

    advance = jax.jit(advance, donate_argnums=0)
    tree = draw(jax.random.key(0))
    expected = jax.tree.map(lambda x: np.array(x, copy=True), tree)
    jax.block_until_ready(advance(draw(jax.random.key(1))))  # compiled before the race begins
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        for _ in range(10):
            tree = advance(tree)
        jax.block_until_ready(tree)
        checkpointer.wait()
        assert_same(checkpointer.restore_latest(tree)[0], expected)


def flip_every_digit(path: Path) -> None:
    path.write_text(path.read_text().translate(str.maketrans("0123456789", "1234567890")))


DAMAGE = {
    "values cut in half": lambda c: os.truncate(values_file(c), 100),
    "values emptied": lambda c: os.truncate(values_file(c), 0),
    "values gone": lambda c: values_file(c).unlink(),
    "one bit of a weight flipped": lambda c: flip_a_bit(values_file(c)),
    "index cut": lambda c: os.truncate(c / "state" / "manifest.ocdbt", 20),
    "metadata emptied": lambda c: os.truncate(c / "state" / "_METADATA", 0),
    "state gone": lambda c: shutil.rmtree(c / "state"),
    "manifest gone": lambda c: shutil.rmtree(c / "manifest"),
    "manifest cut": lambda c: os.truncate(c / "manifest" / "metadata", 50),
    "manifest changed": lambda c: flip_every_digit(c / "manifest" / "metadata"),
    "everything gone": lambda c: [shutil.rmtree(p) for p in c.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_falls_back_says_so_and_is_not_deleted(tmp_path, caplog, damage):
    save_steps(tmp_path, (1, 2))
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    with Checkpointer(tmp_path) as checkpointer:
        with caplog.at_level(logging.WARNING):
            state, step, extra = checkpointer.restore_latest(ABSTRACT)
        assert (step, extra) == (1, {"note": "at 1"})
        assert_same(state, new_state(1))
        assert f"{tmp_path}/checkpoints/2 is damaged" in caplog.text
        assert (tmp_path / "damaged" / "checkpoints_2").is_dir()
        checkpointer.save(2, new_state(20))  # the same step again
        checkpointer.wait()
        assert_same(checkpointer.restore_latest(ABSTRACT)[0], new_state(20))


def test_all_damaged_is_an_error_naming_each_and_touching_none(tmp_path):
    save_steps(tmp_path, (1, 2))
    for step in ("1", "2"):
        flip_a_bit(values_file(tmp_path / "checkpoints" / step))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(
            CheckpointError, match=r"(?s)checkpoints/2 is .*checkpoints/1 is .*values of"
        ),
    ):
        checkpointer.restore_latest(ABSTRACT)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_half_written_directory_is_ignored_and_cleaned_up(tmp_path):
    save_steps(tmp_path, (1,))
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    os.truncate(values_file(half), 10)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(ABSTRACT)[1] == 1
        checkpointer.save(2, new_state(2))
        checkpointer.wait()
        assert checkpointer.restore_latest(ABSTRACT)[1] == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_best_keeps_the_lowest_metric_and_never_costs_the_newest(tmp_path):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.0, 6: 4.0}
    with Checkpointer(tmp_path) as checkpointer:
        chosen = {}
        for step, metric in metrics.items():
            chosen[step] = checkpointer.save_best(step, new_state(step).nets, metric)
            checkpointer.save(step, new_state(step))
    assert [step for step, best in chosen.items() if best] == [1, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5", "6"]
    assert os.listdir(tmp_path / "best") == ["2"]
    with Checkpointer(tmp_path) as checkpointer:  # another process knows the record to beat
        assert not checkpointer.save_best(7, new_state(7).nets, 1.5)
        nets, step, extra = checkpointer.restore_best(ABSTRACT.nets)
        assert (step, extra["metric"]) == (2, 1.0)
        assert_same(nets, new_state(2).nets)


def test_best_of_an_earlier_step_than_the_last_best_still_wins(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:  # as after falling back past it
        assert checkpointer.save_best(9, {"x": jnp.ones(2)}, 2.0)
        assert checkpointer.save_best(5, {"x": jnp.zeros(2)}, 1.0)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_best({"x": jnp.ones(2)})[1] == 5


def test_metrics_of_another_judge_are_not_compared(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save_best(2, {"x": jnp.ones(2)}, 1.0, judge="a")
        assert checkpointer.save_best(4, {"x": jnp.zeros(2)}, 30.0, judge="b")
        assert not checkpointer.save_best(6, {"x": jnp.ones(2)}, 40.0, judge="b")
        _, step, extra = checkpointer.restore_best({"x": jnp.ones(2)})
    assert (step, extra["metric"], extra["judge"]) == (4, 30.0, "b")


def test_a_save_waits_for_the_best_before_it(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(1, new_state(1), 1.0)
        checkpointer.save(1, new_state(1))
        assert (tmp_path / "best" / "1" / "manifest").exists()


def test_damaged_best_is_beaten_by_any_number_even_at_its_own_step(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(1, {"x": jnp.ones(2)}, 1.0)
    os.truncate(tmp_path / "best" / "1" / "manifest" / "metadata", 5)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="best/1 is damaged"):
            checkpointer.restore_best({"x": jnp.ones(2)})
        assert checkpointer.save_best(1, {"x": jnp.zeros(2)}, 5.0)
        assert checkpointer.restore_best({"x": jnp.ones(2)})[2]["metric"] == 5.0
    assert "best/1 is damaged" in caplog.text


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_surfaces_and_keeps_what_was_there(tmp_path):
    tree = {str(i): jax.random.normal(jax.random.key(i), (64, 1024)) for i in range(4)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tree)
    checkpointer.wait()
    message = r"checkpoints/2 could not be written(?s:.*): step 1\. Make room"
    with files_of_at_most(4096), pytest.raises(CheckpointError, match=message):
        checkpointer.save(2, tree)
        checkpointer.wait()
    assert checkpointer.restore_latest(tree)[1] == 1
    checkpointer.save(2, tree)  # after room was freed
    checkpointer.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_check_reports_a_failed_write_without_waiting_for_one(tmp_path):
    tree = {"x": jax.random.normal(jax.random.key(0), (64, 1024))}
    checkpointer = Checkpointer(tmp_path)
    with files_of_at_most(4096):
        checkpointer.check()
        checkpointer.save(1, tree)
        with pytest.raises(CheckpointError, match="starts from step 0"):
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                checkpointer.check()
                time.sleep(0.01)
    checkpointer.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system takes root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_is_named_as_such_and_keeps_what_was_there(small_disk):
    tree = {str(i): jax.random.normal(jax.random.key(i), (64, 1024)) for i in range(4)}
    checkpointer = Checkpointer(small_disk)
    checkpointer.save(1, tree)
    checkpointer.wait()
    with pytest.raises(CheckpointError, match="no space left on device"):
        checkpointer.save(2, tree)
        checkpointer.wait()
    checkpointer.close()
    with Checkpointer(small_disk) as checkpointer:
        assert checkpointer.restore_latest(tree)[1] == 1


def test_space_is_counted_before_the_run(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        state = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
        best = {"x": jax.ShapeDtypeStruct((1024,), jnp.bfloat16)}
        assert tree_bytes(state) == 4 * 2**20 and tree_bytes(best) == 2048
        usage = shutil.disk_usage(tmp_path)
        needed = 4 * tree_bytes(state) + 2 * tree_bytes(best)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        checkpointer.check_space(state, best)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(ValueError, match="GiB"):
            checkpointer.check_space(state, best)
        # What a resumed run has already written counts as room: it will be replaced.
        (tmp_path / "checkpoints" / "old").write_bytes(b"0")
        checkpointer.check_space(state, best)
        # A name whose file is gone, as of those that Orbax is removing.
        (tmp_path / "checkpoints" / "gone").symlink_to(tmp_path / "nothing")
        checkpointer.check_space(state, best)


def test_one_checkpoint_is_no_safety():
    with pytest.raises(ValueError, match="keep=1 2 or more"):
        Checkpointer("anywhere", keep=1)
