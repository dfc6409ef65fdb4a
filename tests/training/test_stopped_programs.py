"""The series of a run in programs of their own: killed, stopped, fallen back, on two hosts."""

import functools
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import assert_same, flip_a_bit, in_child, values_file

from dmd_jax.training.checkpoint import read
from dmd_jax.training.checkpoints import Checkpointer


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
