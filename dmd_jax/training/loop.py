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

from dmd_jax import data, weights
from dmd_jax.devices import sharding
from dmd_jax.devices.disk import check_writable, write_text
from dmd_jax.devices.processes import from_first
from dmd_jax.quality import evaluation, report
from dmd_jax.rollouts import samplers
from dmd_jax.training import health
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.configuration import construct, differences, flatten
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
            generator.safetensors, report.md and report.png.

    Returns:
        The path of the report; None where a signal stopped the run before its end.

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
        finished = workdir / evaluation.REPORT
        if restored is not None and restored[1] > run.config.steps:
            raise ValueError(
                f"config.steps={run.config.steps}, but the run in {workdir} has taken "
                f"{restored[1]}: ask for as many or more, or choose another --workdir"
            )
        if restored is not None and restored[1] == run.config.steps and finished.exists():
            log.info("this run is finished; its report again, from %s", finished)
            print(finished.read_text())
            return finished
        first = 0 if restored is None else restored[1]
        steps = compile_steps(run) if first < run.config.steps else {}
        if restored is None:
            (state, frozen), extra = run.start(), {}
        else:
            (state, _, extra), frozen = restored, run.load_frozen()
            log.info("going on from step %d in %s", int(state.step), workdir)
        writer.rewind(int(state.step))
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
        writer.texts(run.config.steps, "report", text)
        return finished


def _claim(config, workdir):
    """Writes the resolved config, or refuses a directory that holds another run."""
    path, now = workdir / "config.json", flatten(config)
    if "teacher" in config:  # its weights: other ones may later lie at the same path
        now["teacher.sha256"] = from_first(lambda: weights.fingerprint(config.teacher.weights))
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
        if done % config.evaluate.every == 0:
            _judge(run, state, done, checkpoints, writer)
        if done % config.checkpoint.every == 0 or last:
            heed(window.flush())
            if last or not monitor.suspicious:
                extra = {"window": window.state, "monitor": monitor.state}
                checkpoints.save(done, state, extra)
        if last:
            break
    checkpoints.wait()
    return state


def _judge(run, state, step, checkpoints, writer):
    """Shows some samples of the average, judges more of them, and keeps the best."""
    sampler, *_ = run.samplers()
    shown = report.grid(run.show(state.ema, sampler), run.source.columns)
    writer.images(step, sampler.name, shown)
    judge = run.judge()
    if judge is None:
        return
    labels = samplers.balanced(run.config.evaluate.samples, run.source.num_classes)
    images = samplers.draw_images(state.ema, sampler, labels)
    numbers = {f"quality/{key}": value for key, value in judge(images, labels).items()}
    writer.scalars(step, numbers)
    # One process's number for all: they must agree on whether this is the best.
    fd = float(multihost_utils.broadcast_one_to_all(np.float32(numbers["quality/fd"])))
    checkpoints.save_best(step, state.ema, fd)


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
    """Writes and returns the report: samples beside those of the teacher, judged where possible.

    Every process computes all of it, with whole weights of its own; the first one writes.
    """
    title = f"{type(run.method).__name__} on {run.source.name}, {run.config.steps:,} steps"
    if run.judge() is None:
        text = _shown_report(run, trained, frozen, workdir, title)
    else:
        text = _judged_report(run, trained, workdir, title)
    if jax.process_index() == 0:
        print(text)
    return text


def _shown_report(run, trained, frozen, workdir, title):
    """The report of a run without a feature network: samples, and numbers if the source has any."""
    ways = [(trained, sampler) for sampler in run.samplers()]
    if "teacher" in frozen:
        ways = [(frozen["teacher"], sampler) for sampler in run.teachers()] + ways
    pictures = {sampler.title: run.show(net, sampler, evaluation.SEED) for net, sampler in ways}
    body = "From the same noise. Not judged: config.evaluate.features names no feature network.\n"
    if measures := run.source.measures:
        table = [{"name": "real", **run.source.floor(run.config.evaluate.num)}]
        table += [run.measure(net, sampler, evaluation.SEED) for net, sampler in ways]
        body = report.measured(table, measures)
    text = evaluation.report_text(title, body)
    if jax.process_index() == 0:
        report.gallery(workdir / "report.png", pictures, run.source.columns, title=title)
        write_text(workdir / evaluation.REPORT, text)
    return text


def _judged_report(run, trained, workdir, title):
    """The report of a run on images: judged beside real ones and the teacher."""
    spec, name, data_dir = run.config.evaluate, run.config.data.name, run.config.data.data_dir
    num_classes, seed, judge = run.source.num_classes, evaluation.SEED, run.judge()
    labels = np.sort(samplers.balanced(2 * num_classes, num_classes))
    test, test_labels = data.arrays(data.load(name, "test", data_dir))
    rows = np.concatenate([np.flatnonzero(test_labels == k)[:2] for k in range(num_classes)])
    table, pictures = [evaluation.real_row(judge, spec.num)], {"real": test[rows]}
    if "teacher" in run.frozen:
        path, teachers = run.config.teacher.weights, run.teachers()
        kept = workdir / "teacher.rows.json"
        table += evaluation.teacher_rows(
            path, teachers, judge, spec.num, recompute=spec.recompute, store=kept
        )
        teacher = weights.denoiser(path)
        for sampler in (teachers[0], teachers[-1]):
            pictures[sampler.title] = samplers.draw_images(teacher, sampler, labels, seed)
    table += evaluation.rows(trained, run.samplers(), judge, spec.num)
    for sampler in run.samplers():
        pictures[sampler.title] = samplers.draw_images(trained, sampler, labels, seed)
    if jax.process_index() == 0:
        evaluation.write_report(workdir, title, table, pictures, labels, judge.name)
    return evaluation.report_text(title, report.markdown(table, judge.name))
