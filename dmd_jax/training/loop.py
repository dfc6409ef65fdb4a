"""The training program: the loop over the steps of a run, and what is left when it ends.

    run = build(config)         see run.py
    train(run, workdir)         start or resume, loop, save, export, report

Imports every room below.
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.disk import check_writable, first_line, write_text
from dmd_jax.quality.evaluator import REPORT
from dmd_jax.training import health
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.configuration import construct, differences, flatten
from dmd_jax.training.cost import cost
from dmd_jax.training.preemption import Preemption
from dmd_jax.training.writers import Progress, Writer

log = logging.getLogger(__name__)

EXPORT, BEST = "generator.safetensors", "best.safetensors"


def compile_steps(run):
    """Starts to compile the steps of a run, in the background and from shapes alone.

    Returns:
        {update_generator: a Future of the compiled step}; the kind of step 0 is ready first.
    """
    config = run.config
    state, frozen = run.state_shape(), run.frozen_shape()
    jitted = jax.jit(
        run.step,
        static_argnames="update_generator",
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    batch, key = next(run.batches(0)), root_key(config)

    def compiled(kind):
        with jax.set_mesh(run.mesh):  # it is in force on the thread that set it alone
            return jitted.lower(state, frozen, batch, key, update_generator=kind).compile()

    # One after the other: the first step can be seen before the second kind is ready.
    pool = ThreadPoolExecutor(1)
    kinds = dict.fromkeys(map(run.updates_generator, range(config.generator_every)))
    return {kind: pool.submit(compiled, kind) for kind in kinds}


def root_key(config):
    """The key from which all of a run's random numbers are folded."""
    return jax.random.key(config.seed, impl="threefry2x32")


def train(run, workdir):
    """Starts or resumes the run in `workdir`, sees it to its end and writes its report.

    Args:
        run: from `build`; the mesh is in force.
        workdir: a Path, made if need be: config.json, metrics.jsonl, checkpoints/, best/, images/,
            generator.safetensors, evaluation.json, report.md and report.png.

    Returns:
        The path of the report; None where a signal stopped the run before its end, or the report
        failed.

    Raises:
        ValueError: the directory holds another run, cannot be written or is too small.
        health.Diverged: the run went bad; its last good checkpoint stays.
    """
    check_writable(workdir)
    _claim(run.config, workdir)
    shape = run.state_shape()
    with (
        Checkpointer(workdir, keep=run.config.checkpoint.keep) as checkpoints,
        Writer(workdir, tensorboard=run.config.log.tensorboard) as writer,
    ):
        checkpoints.check_space(shape, shape.ema)
        restored = checkpoints.restore_latest(shape)
        finished = workdir / REPORT
        if restored is not None and restored[1] > run.config.steps:
            raise ValueError(
                f"config.steps={run.config.steps}, but the run in {workdir} has taken "
                f"{restored[1]}: ask for as many or more, or choose another --workdir"
            )
        if restored is not None and restored[1] == run.config.steps and finished.exists():
            if run.evaluator.is_reported(workdir):
                log.info("this run is finished; its report again, from %s", finished)
                print(finished.read_text())
                return finished
            log.info("this run is finished; config.evaluate has changed: judging it again")
        first = 0 if restored is None else restored[1]
        steps = compile_steps(run) if first < run.config.steps else {}
        if restored is None:
            (state, frozen), extra = run.start(), {}
        else:
            (state, _, extra), frozen = restored, run.load_frozen()
            log.info("going on from step %d in %s", int(state.step), workdir)
        writer.rewind(int(state.step))
        if _lacks_judgement(run, int(state.step), workdir):
            _judge(run, state.ema, int(state.step), checkpoints, writer)
        finished.unlink(missing_ok=True)  # whatever it reports, it is not the end of this run
        try:
            with Preemption() as preemption:
                state = _loop(run, steps, state, frozen, extra, checkpoints, writer, preemption)
        except health.Diverged:
            _export_best(run, shape.ema, checkpoints, workdir)
            raise
        if int(state.step) < run.config.steps:
            log.info("stopped and saved at step %d; the same command goes on", int(state.step))
            return None
        trained = sharding.replicate(state.ema)
        _export(run, trained, workdir / EXPORT, run.config.steps)
        _export_best(run, shape.ema, checkpoints, workdir)
        text = _report(run, trained, frozen, workdir)
        if text is None:
            return None
        writer.texts(run.config.steps, "report", text)
        return finished


def _claim(config, workdir):
    """Writes the resolved config, or refuses a directory that holds another run."""
    path, now = workdir / "config.json", flatten(config)
    if "teacher" in config:  # the file itself: another one may come to lie at the same path
        now["teacher.sha256"] = weights.fingerprint(config.teacher.weights)
    if path.exists():
        stored = json.loads(path.read_text())
        if lines := differences(stored, now):
            raise ValueError(
                f"{workdir} holds a run with another config; choose another --workdir, or "
                f"take back the difference:\n{lines}"
            )
    if jax.process_index() == 0:
        write_text(path, json.dumps(now, indent=2, sort_keys=True) + "\n")


def _loop(run, steps, state, frozen, extra, checkpoints, writer, preemption):
    """Steps from `state.step` to the end, or to a signal; returns the last state, saved."""
    config, first = run.config, int(state.step)
    if first == config.steps:
        return state
    root = root_key(config)
    window = health.Window(config.log.every, extra.get("window"))
    monitor = health.Monitor(construct(config.health, "config.health"), extra.get("monitor"))
    progress = Progress(config.steps, config.batch_size)

    def heed(record):
        checkpoints.check()
        if record is not None:
            writer.scalars(record[0], record[1] | progress.report(*record))
            monitor.update(*record)

    for done, batch in enumerate(run.batches(first), first + 1):
        step = steps[run.updates_generator(done - 1)].result()
        state, metrics = step(state, frozen, batch, root)
        if done == first + 1:  # the one step that is waited for, so that a user sees it at once
            progress.report(done, {name: float(value) for name, value in metrics.items()})
        heed(window.add(done, metrics))
        last = done == config.steps or preemption.requested(done)
        if done % config.checkpoint.every == 0 or last:
            heed(window.flush())
            if last or not monitor.suspicious:
                extra = {"window": window.state, "monitor": monitor.state}
                checkpoints.save(done, state, extra)
        if done % config.evaluate.every == 0:  # what fails there costs no step that is saved
            _judge(run, state.ema, done, checkpoints, writer)
        if last:
            break
    checkpoints.wait()
    return state


def _lacks_judgement(run, step, workdir):
    """Whether a run was stopped after it saved a step that is to be judged, and before it was."""
    spec, lines = run.evaluator.settings, workdir / "metrics.jsonl"
    if not spec.features or step == 0 or step % spec.every:
        return False
    records = map(json.loads, lines.read_text().splitlines() if lines.exists() else ())
    found = any(record["step"] == step and "quality/fd" in record for record in records)
    # One process's answer for all: they must agree.
    return not multihost_utils.broadcast_one_to_all(np.int32(found))


def _judge(run, average, step, checkpoints, writer):
    """Shows and judges samples of the average, and keeps the best. A failure costs only that."""
    try:
        picture, score = run.evaluator.preview(average)
    except Exception as error:  # of a feature network, a data set, a device
        log.debug("judging failed", exc_info=error)
        log.warning("step %d could not be judged, the run goes on: %s", step, first_line(error))
        return
    writer.images(step, run.evaluator.samplers[0].name, picture)
    if score is None:
        return
    # One process's number for all: they must agree on whether this is the best.
    fd = float(multihost_utils.broadcast_one_to_all(np.float32(score.numbers["fd"])))
    checkpoints.save_best(step, average, fd, judge=score.judge)
    checkpoints.wait()  # what is recorded as judged is not judged again by a resumed run
    writer.scalars(step, {f"quality/{key}": value for key, value in score.numbers.items()})


def _export_best(run, shape, checkpoints, workdir):
    """Writes the average that judged best, where one was judged."""
    if (best := checkpoints.restore_best(shape)) is not None:
        average, step, _ = best
        _export(run, sharding.replicate(average), workdir / BEST, step)


def _export(run, trained, path, step):
    """Writes the averaged network for everybody's use."""
    notes = {"step": step, "method": type(run.method).__name__.lower()}
    notes |= run.source.notes
    if hasattr(run.method, "times"):
        notes |= {"times": run.method.times, "shift": run.method.shift}
    if jax.process_index() == 0:
        weights.save(path, trained, **notes)


def _report(run, trained, frozen, workdir):
    """The text of the report, which `quality` writes; None if that failed: the run is complete.

    Every process computes all of it, with whole weights of its own.
    """
    try:
        text = run.evaluator.report(
            workdir,
            f"{type(run.method).__name__} on {run.source.name}, {run.config.steps:,} steps",
            trained,
            teacher=frozen.get("teacher"),
            teacher_path=run.config.teacher.weights if "teacher" in frozen else None,
            cost=cost(run).lines(),
        )
    except Exception as error:
        log.debug("the report failed", exc_info=error)
        log.warning(
            "%s is trained, but its report failed: %s. The same command tries the report again",
            workdir,
            first_line(error),
        )
        return None
    if jax.process_index() == 0:
        print(text)
    return text
