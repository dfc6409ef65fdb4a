"""The training program: the loop over the steps of a run, its exports and its report.

    run = build(config)         see run.py
    train(run, workdir)         start or resume, loop, save, export, report

`_loop` takes the steps; what one step computes is in `step`. docs/resume.md lists the files that a
run writes. Imports every room below.
"""

import contextlib
import json
import logging
import threading
from concurrent.futures import Future
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.disk import check_writable, exclusive, first_line, write_text
from dmd_jax.devices.processes import from_first, together
from dmd_jax.quality.evaluator import REPORT
from dmd_jax.training import health, roles
from dmd_jax.training.alarms import Alarms
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.configuration import config_role, defaults, differences, flatten
from dmd_jax.training.cost import cost
from dmd_jax.training.preemption import Preemption, Stopped
from dmd_jax.training.profiling import Profiler, warn_of_taken
from dmd_jax.training.writers import Progress, Writer
from dmd_jax.weights import adapter_files

log = logging.getLogger(__name__)

CONFIG, EXPORT, BEST = "config.json", "generator.safetensors", "best.safetensors"
ADAPTER = "adapter.safetensors"
DISTANCE = "quality/fd"  # the judged number in the log that says which average is best
COMPILATION = "compilation of the steps"  # name of the thread


def compile_steps(run):
    """Starts to compile both variants of the train step in the background, from shapes alone.

    Returns:
        {update_generator: a Future of the compiled step}; the one that step 0 needs comes first.
        The dict has one entry if the generator is updated at every step.
    """
    batch, key = next(run.batches(0)), root_key(run.config)
    variants = map(run.updates_generator, range(run.config.generator_every))
    return in_background(lambda variant: lower(run, batch, key, variant).compile(), variants)


def lower(run, batch, key, update_generator):
    """The train step, lowered: state and frozen networks from shapes alone, the state donated.

    Args:
        run: from `run.build`.
        batch, key: arguments of `step.train_step`, or their jax.ShapeDtypeStructs.
        update_generator: which of the two variants.
    """
    state = run.state_shape()
    jitted = jax.jit(
        run.step,
        static_argnames="update_generator",
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    with jax.set_mesh(run.mesh):  # a mesh is set for one thread only
        return jitted.lower(
            state, run.frozen_shape(), batch, key, update_generator=update_generator
        )


def in_background(call, arguments):
    """{argument: a Future of call(argument)}, computed one after the other in a daemon thread.

    At its exit, Python waits for the threads of an executor, but not for a daemon thread: a run
    that is stopped does not wait for compilations that it no longer needs.
    """
    futures = {argument: Future() for argument in arguments}

    def work():
        for argument, future in futures.items():
            try:
                future.set_result(call(argument))
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=work, name=COMPILATION, daemon=True).start()
    return futures


def compiling():
    """Whether a compilation is running in the background."""
    return any(thread.name == COMPILATION for thread in threading.enumerate())


def root_key(config):
    """The key from which all random numbers of a run are derived."""
    return jax.random.key(config.seed, impl="threefry2x32")


def train(run, workdir, profile=range(0)):
    """Starts or resumes the run in `workdir`, trains to its last step and writes its report.

    Args:
        run: from `build`; its mesh is set (`jax.set_mesh`).
        workdir: a Path, created if it does not exist; docs/resume.md lists what is written to it.
        profile: the steps to trace into <workdir>/profile, counted from 1.

    Returns:
        The path of the report; None if the report failed.

    Raises:
        Stopped: a signal stopped the run before its last step; it is saved.
        ValueError: the directory belongs to another run, is in use, cannot be written or is too
            small.
        health.Diverged: the run diverged; its last good checkpoint is kept.
    """
    check_writable(workdir)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(exclusive(workdir))
        return _train(run, workdir, profile)


def _train(run, workdir, profile):
    identity = _identity(run)
    _require_own(identity, run.config, workdir)
    shape = run.state_shape()
    with Checkpointer(workdir, keep=run.checkpoint.keep) as checkpoints:
        checkpoints.check_space(shape, shape.ema)
        restored = checkpoints.restore_latest(shape)
        first = 0 if restored is None else restored[1]
        if first > run.config.steps:
            raise ValueError(
                f"config.steps={run.config.steps}, but the run in {workdir} has taken {first}: ask "
                "for as many or more, or choose another --workdir"
            )
        warn_of_taken(profile, first)
        if first == run.config.steps and (finished := _reported(run, workdir)):
            return finished
        steps = compile_steps(run) if first < run.config.steps else {}
        if restored is None:
            (state, frozen), extra = run.start(), {}
            log.info("a new run in %s; its step is compiled first", workdir)
        else:
            (state, _, extra), frozen = restored, run.load_frozen()
            log.info("going on from step %d in %s", first, workdir)
        # The run is accepted. Nothing in the directory has been changed before this line.
        with _writer(run, workdir) as writer, Profiler(workdir, profile) as profiler:
            if jax.process_index() == 0:
                text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
                write_text(workdir / CONFIG, text)
            writer.rewind(first)
            if _lacks_judgement(run, first, writer):
                _judge(run, state.ema, frozen, first, checkpoints, writer)
            (workdir / REPORT).unlink(missing_ok=True)  # not the report of this run's last step
            try:
                with Preemption() as preemption:
                    state = _loop(
                        run, steps, state, frozen, extra, checkpoints, writer, profiler, preemption
                    )
            except health.Diverged:
                _export_best(run, shape.ema, frozen, checkpoints, workdir)
                raise
            if (step := int(state.step)) < run.config.steps:
                where = f"and saved at step {step}" if step else "before its first step"
                raise Stopped(f"stopped {where}; the same command goes on")
            return _finish(run, identity, state, frozen, checkpoints, writer, workdir)


def _reported(run, workdir):
    """Prints the report of a run that has taken all its steps, and returns its path.

    None where it has no report, or one of other settings.
    """
    path = workdir / REPORT
    # One process's answer for all: they must agree.
    if not from_first(lambda: "yes" if path.exists() else ""):
        return None
    if not from_first(lambda: "yes" if run.evaluator.is_reported(workdir) else ""):
        log.info("this run is finished; config.evaluate has changed: judging it again")
        return None
    log.info("this run is finished; its report again, from %s", path)
    if jax.process_index() == 0:
        print(path.read_text())
    return path


def _writer(run, workdir):
    return Writer(
        workdir,
        tensorboard=run.log.tensorboard,
        wandb=run.log.wandb,
        config=flatten(run.config),
    )


def _finish(run, identity, state, frozen, checkpoints, writer, workdir):
    """Exports the averages of the last state and writes the report; returns its path, or None."""
    trained = _export(run, state.ema, frozen, workdir / EXPORT, run.config.steps)
    for decay, average in state.more_ema.items():
        path = (workdir / EXPORT).with_stem(f"generator.ema-{decay}")
        _export(run, average, frozen, path, run.config.steps)
    _export_best(run, state.ema, frozen, checkpoints, workdir)
    if "generator" in run.bind.lora:
        base = identity[_digest_key(run.bind.bases["generator"])]
        _export_adapter(run, state.ema, base, workdir / ADAPTER)
    text = _report(run, trained, frozen, workdir)
    if text is None:
        return None
    writer.texts(run.config.steps, "report", text)
    return workdir / REPORT


def _identity(run):
    """The content of config.json: the flat config, and checksums of the frozen weights."""
    # The file at a path may be replaced later.
    digests = {n: partial(roles.fingerprint, run.config, config_role(n)) for n in run.frozen}
    if "vae" in run.others:
        digests["vae"] = partial(weights.fingerprint, run.config.vae.weights, ("vae",))
    if "reward" in run.others:
        digests["reward"] = partial(roles.reward_digest, run.config, run.source)
    found = {_digest_key(name): from_first(digest) for name, digest in digests.items()}
    return flatten(run.config) | found


def _digest_key(name):
    """The entry of config.json for the checksum of a frozen network's file."""
    return f"{config_role(name)}.sha256"


def _require_own(identity, config, workdir):
    """Refuses a directory with the checkpoints of a run with another config.

    Without a checkpoint there is nothing to protect: the run that wrote config.json saved nothing.
    """
    path = workdir / CONFIG
    saved = [*workdir.glob("checkpoints/[0-9]*"), *workdir.glob("best/[0-9]*")]
    if not (path.exists() and saved):
        return
    try:
        stored = defaults(config) | dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, so that nothing says which run this is ({error}): restore it from "
            "a copy, or choose another --workdir"
        ) from error
    if lines := differences(stored, identity):
        raise ValueError(
            f"{workdir} holds a run with another config; choose another --workdir, or "
            f"take back the difference:\n{lines}"
        )


def _loop(run, steps, state, frozen, extra, checkpoints, writer, profiler, preemption):
    """Takes steps from `state.step` to the last, or to a signal; returns the last state, saved.

    Metrics of a step are read one step late (`health.Window`), so a record belongs to the window
    that ended with the step before; `flush` reads the step that is still outstanding.
    """
    config, first = run.config, int(state.step)
    if first == config.steps:
        return state
    _stop_if_worse(run, checkpoints, writer)  # its last step may have been judged after a signal
    root = root_key(config)
    window = health.Window(run.log.every, extra.get("window"))
    monitor = health.Monitor(run.health, extra.get("monitor"))
    alarms = Alarms(run.health, extra.get("alarms"))
    progress = Progress(config.steps, config.batch_size, frames_per_sample=_frames(run.source))

    def write(record):
        checkpoints.check()
        if record is not None:
            writer.scalars(record[0], record[1] | progress.report(*record))
            for warning in alarms.update(*record):
                log.warning(warning)
            monitor.update(*record)

    def save(done):
        extra = {"window": window.state, "monitor": monitor.state, "alarms": alarms.state}
        checkpoints.save(done, state, extra)

    for done, batch in enumerate(run.batches(first), first + 1):
        step = preemption.wait(steps[run.updates_generator(done - 1)])
        if step is None:  # asked to stop during the compilation
            write(window.flush())
            if done - 1 > first:
                save(done - 1)
            break
        state, metrics = profiler.call(done, step, state, frozen, batch, root)
        if done == first + 1:  # the only step that is waited for, so that a user sees it at once
            progress.report(done, {name: float(value) for name, value in metrics.items()})
        write(window.add(done, metrics))
        end = done == config.steps
        last = end or preemption.requested(done)
        if done % run.checkpoint.every == 0 or last:
            write(window.flush(end=end))
            if last or not monitor.suspicious:
                save(done)
        stopped = last and not end  # a signal leaves little time: the next start judges this step
        if done % config.evaluate.every == 0 and not stopped:  # saved: a failure loses no step
            _judge(run, state.ema, frozen, done, checkpoints, writer)
            if not end:
                _stop_if_worse(run, checkpoints, writer)
        if last:
            break
    checkpoints.wait()
    return state


def _frames(source):
    """F of samples [F, H, W, C]; None for others."""
    return source.sample_shape[0] if len(source.sample_shape) == 4 else None


def _lacks_judgement(run, step, writer):
    """Whether a run was stopped between the save and the judgement of a step."""
    spec = run.evaluator.settings
    if not spec.features or step == 0 or step % spec.every:
        return False
    return not from_first(lambda: "yes" if step in writer.history(DISTANCE) else "")


def _stop_if_worse(run, checkpoints, writer):
    """Raises Diverged where the samples have got worse for good (`health.worsening`)."""
    # Distances before the last best may be another judge's: config.evaluate may change in a run.
    best = next(iter(checkpoints.bests()), 0)

    def verdict():
        judged = {step: fd for step, fd in writer.history(DISTANCE).items() if step >= best}
        return json.dumps(health.worsening(judged, run.health))

    message, well_until = json.loads(from_first(verdict))
    if message:
        raise health.Diverged(message, well_until)


def _judge(run, average, frozen, step, checkpoints, writer):
    """Shows and judges samples of the average, and saves the best. A failure is only a warning.

    All processes take part; a failure on one ends the judgement on all.
    """
    generator = run.bind.network("generator", average, frozen)
    try:
        picture, score = together(run.evaluator.preview, generator)
    except Exception as error:  # from the feature network, the data set or the device
        log.debug("judging failed", exc_info=error)
        log.warning("step %d could not be judged, the run goes on: %s", step, first_line(error))
        return
    writer.images(step, run.evaluator.samplers[0].name, picture)
    if score is None:
        return
    # The number of process 0, because all processes must agree on whether this is the best.
    fd = float(multihost_utils.broadcast_one_to_all(np.float32(score.numbers["fd"])))
    checkpoints.save_best(step, average, fd, judge=score.judge)
    # The best is on disk before the record is: a resumed run does not judge a recorded step again.
    checkpoints.wait()
    writer.scalars(step, {f"quality/{key}": value for key, value in score.numbers.items()})


def _export_best(run, shape, frozen, checkpoints, workdir):
    """Writes the average with the best score, if one was judged."""
    if (best := checkpoints.restore_best(shape)) is not None:
        average, step, _ = best
        _export(run, average, frozen, workdir / BEST, step)


def _export(run, average, frozen, path, step):
    """Writes an averaged generator as a safetensors file; returns it, on the mesh."""
    generator = run.merged("generator", average, frozen)
    whole = sharding.fetch(generator)
    if jax.process_index() == 0:
        weights.save(path, whole, **_notes(run, step))
    return generator


def _notes(run, step):
    notes = {"step": step, "method": type(run.method).__name__.lower()}
    return notes | run.source.notes | run.method.notes()


def _export_adapter(run, average, base, path):
    """Writes an averaged adapter of the generator, on the base of that checksum, as safetensors."""
    adapter = sharding.fetch(average)
    if jax.process_index() == 0:
        adapter_files.save(
            path,
            adapter,
            run.nets["generator"].net,
            alpha=run.bind.lora["generator"].alpha,
            base=base,
            **_notes(run, run.config.steps),
        )


def _report(run, trained, frozen, workdir):
    """The text of the report, which `quality` writes; None if that failed.

    A failed report is a warning, because the run itself is complete. Every process takes part.
    """
    try:
        text = together(
            run.evaluator.report,
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
        log.info("this report and %s are in %s", EXPORT, workdir)
    return text
