"""The series of a run, damaged in every way that disks, kills and schedulers do."""

import contextlib
import functools
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import (
    ABSTRACT,
    Net,
    assert_same,
    flip_a_bit,
    in_child,
    new_state,
    save_steps,
    values_file,
)

from dmd_jax.devices.paths import tree_bytes
from dmd_jax.training.checkpoint import CheckpointError, read
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


def test_a_fallback_is_told_in_a_few_lines_not_in_hundreds(tmp_path):
    program = """
        import os, sys
        from pathlib import Path
        import jax
        from dmd_jax.training.checkpoints import Checkpointer
        tree = {str(i): jax.random.normal(jax.random.key(i), (512, 512)) for i in range(40)}
        with Checkpointer(sys.argv[1]) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, tree)
                checkpointer.wait()
        for file in Path(sys.argv[1]).glob("checkpoints/2/state/ocdbt.process_0/d/*"):
            os.truncate(file, file.stat().st_size // 2)
        with Checkpointer(sys.argv[1]) as checkpointer:
            assert checkpointer.restore_latest(tree)[1] == 1
    """
    child = in_child(program, tmp_path)
    assert child.returncode == 0
    lines = child.stderr.splitlines()
    assert sum("2 is damaged: state cannot be read" in line for line in lines) == 1
    assert sum("was moved to" in line for line in lines) == 1
    assert len(lines) < 6  # the compiler may have a word of its own on a busy machine


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


def test_sigkill_in_the_middle_of_a_save_costs_only_that_save(tmp_path):
    program = """
        import os, signal, sys
        import jax.numpy as jnp
        from dmd_jax.training.checkpoints import Checkpointer
        checkpointer = Checkpointer(sys.argv[1])
        for step in (1, 2):
            checkpointer.wait()
            checkpointer.save(step, {str(i): jnp.full((512, 2048), step + i) for i in range(8)})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert in_child(program, tmp_path).returncode == -signal.SIGKILL
    abstract = {str(i): jax.ShapeDtypeStruct((512, 2048), jnp.int32) for i in range(8)}
    with Checkpointer(tmp_path) as checkpointer:
        tree, step, _ = checkpointer.restore_latest(abstract)
    assert step in (1, 2)  # the machine may have been faster than the kill
    assert_same(tree, {str(i): np.full((512, 2048), step + i, np.int32) for i in range(8)})
    assert not list(tmp_path.rglob("*tmp*"))


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


HOST = """
    import itertools, logging, os, signal, sys, time
    from pathlib import Path
    import jax
    host, port, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, host)
    import numpy as np
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import AxisType, NamedSharding
    from dmd_jax.training.checkpoints import Checkpointer
    from dmd_jax.training.preemption import Preemption

    logging.basicConfig(level=logging.WARNING)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, jax.P("fsdp"))

    def draw(seed):
        x = np.random.default_rng(seed).normal(size=(1024, 64)).astype(np.float32)
        return {"x": jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])}

    def assert_same(a, b):
        for mine, other in zip(a["x"].addressable_shards, b["x"].addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, other.data)

    checkpointer = Checkpointer(workdir)
    for step in (1, 2, 3):
        checkpointer.save_best(step, draw(step), 1.0 / step)
        checkpointer.save(step, draw(step), {"at": step})
    state, step, extra = checkpointer.restore_latest(draw(0))
    assert (step, extra) == (3, {"at": 3})
    assert_same(state, draw(3))

    sync_global_devices("about to damage")
    if host == 0:  # the part that only host 1 reads
        files = (workdir / "checkpoints" / "3" / "state" / "ocdbt.process_1" / "d").iterdir()
        os.truncate(max(files, key=lambda p: p.stat().st_size), 100)
    sync_global_devices("damaged")
    state, step, extra = checkpointer.restore_latest(draw(0))
    assert step == 2
    assert_same(state, draw(2))
    checkpointer.save(3, draw(3))
    assert checkpointer.restore_best(draw(0))[1] == 3
    checkpointer.close()

    with Preemption() as preemption:
        for step in itertools.count(1):  # JAX looks for signals once a second, a busy machine later
            time.sleep(0.002 + 0.01 * host)  # the hosts are never at the same step
            if host == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.requested(step):
                print("stopped at", step)
                break
"""


@pytest.mark.slow
def test_two_hosts_save_fall_back_and_stop_together(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        run = functools.partial(in_child, HOST, devices=2)
        hosts = list(pool.map(run, (0, 1), (port, port), (tmp_path, tmp_path)))
    for host in hosts:
        assert host.returncode == 0, host.stderr[-3000:]
    assert "another host cannot read its part" in hosts[0].stderr
    stops = {re.search(r"stopped at \d+", host.stdout)[0] for host in hosts}
    assert len(stops) == 1


LOOP = """
    import os, signal, sys
    import jax, jax.numpy as jnp, optax
    from dmd_jax.training.checkpoints import Checkpointer
    from dmd_jax.training.preemption import Preemption
    from dmd_jax.training.health import Monitor, Window
    from dmd_jax.training.writers import Writer

    workdir, kill_at, signal_name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    tx = optax.adam(1e-2)

    def init():
        weights = jax.random.normal(jax.random.key(0), (64, 64))
        return {"weights": weights, "opt_state": tx.init(weights)}

    @jax.jit
    def train_step(state, step):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (16, 64))
        loss_of = lambda w: jnp.mean(jnp.square(jnp.tanh(x @ w) - x))
        loss, grad = jax.value_and_grad(loss_of)(state["weights"])
        update, opt_state = tx.update(grad, state["opt_state"])
        weights = state["weights"] + update
        return {"weights": weights, "opt_state": opt_state}, {"generator/loss": loss}

    with (
        Checkpointer(workdir) as checkpointer,
        Writer(workdir, tensorboard=False) as writer,
        Preemption() as preemption,
    ):
        restored = checkpointer.restore_latest(jax.eval_shape(init))
        state, step, extra = restored or (init(), 0, {})
        window, monitor = Window(10, extra.get("window")), Monitor(state=extra.get("monitor"))
        writer.rewind(step)

        def log(record):
            writer.scalars(*record)
            monitor.update(*record)

        while step < 60:
            step += 1
            state, metrics = train_step(state, step)
            if record := window.add(step, metrics):
                log(record)
            stop = preemption.requested(step)
            if step % 7 == 0 or step == 60 or stop:
                if record := window.flush():
                    log(record)
                if step % 7 == 0:
                    checkpointer.save_best(step, state, float(metrics["generator/loss"]))
                extra = {"window": window.state, "monitor": monitor.state}
                checkpointer.save(step, state, extra)
            if step == kill_at:
                os.kill(os.getpid(), getattr(signal, signal_name))
            if stop:
                break
"""


@pytest.mark.slow
def test_a_run_stopped_in_every_way_ends_bit_identical_with_one_record(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert in_child(LOOP, straight, 0, "SIGKILL").returncode == 0
    assert in_child(LOOP, stopped, 5, "SIGKILL").returncode == -signal.SIGKILL  # nothing saved yet
    assert in_child(LOOP, stopped, 21, "SIGKILL").returncode == -signal.SIGKILL  # in a save
    assert in_child(LOOP, stopped, 32, "SIGTERM").returncode == 0
    assert in_child(LOOP, stopped, 48, "SIGKILL").returncode == -signal.SIGKILL
    complete = [int(name) for name in os.listdir(stopped / "checkpoints") if name.isdigit()]
    flip_a_bit(values_file(stopped / "checkpoints" / str(max(complete))))
    assert in_child(LOOP, stopped, 0, "SIGKILL").returncode == 0

    weights = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    abstract = {"weights": weights, "opt_state": jax.eval_shape(optax.adam(1e-2).init, weights)}
    ends = [read(workdir / "checkpoints" / "60", abstract) for workdir in (straight, stopped)]
    assert_same(*(state for state, _ in ends))
    assert ends[0][1] == ends[1][1]  # window and monitor
    records = [(workdir / "metrics.jsonl").read_bytes() for workdir in (straight, stopped)]
    assert records[0] == records[1] and records[0].count(b"\n") == 6
    assert os.listdir(straight / "best") == os.listdir(stopped / "best")
