"""The training program: a config becomes networks, a method and a step; the loop runs and reports.

    run = build(config)         resolve and check everything; nothing is computed
    train(run, workdir)         start or resume, loop, save, export, report

Imports every room below. Configs stop here.
"""

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax import checkpoint, data, evaluate, health, optimizer, report, sample, sharding, weights
from dmd_jax.configuration import construct, differences, flatten, unknown
from dmd_jax.denoiser import Denoiser
from dmd_jax.step import EMA, init_state, train_step
from dmd_jax.writers import Progress, Writer

KEYS = (
    *("seed", "steps", "batch_size", "accumulate", "generator_every", "reuse_rollout"),
    *("data", "method", "ema", "mesh", "log", "checkpoint", "evaluate"),
)
# The least value of numbers that no class checks.
LEAST = {"seed": 0, "checkpoint.keep": 2} | dict.fromkeys(
    (
        *("steps", "batch_size", "accumulate", "generator_every"),
        *("log.every", "checkpoint.every", "evaluate.every"),
    ),
    1,
)
log = logging.getLogger(__name__)

EXPORT, BEST = "generator.safetensors", "best.safetensors"


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, resolved. Networks are abstract (jax.ShapeDtypeStruct) until `start`.

    Attributes:
        config: the ConfigDict that all this was made from.
        method: a dataclass of `methods/`.
        nets: {role: Denoiser}, trainable.
        frozen: {role: Denoiser}, which nothing changes.
        tx: the optimizer of all trainable roles.
        source: the training data.
        mesh: the devices.
    """

    config: Any
    method: Any
    nets: dict[str, Denoiser]
    frozen: dict[str, Denoiser]
    tx: Any
    source: data.Source
    mesh: jax.sharding.Mesh

    def updates_generator(self, step):
        """Whether the generator learns at this step: the one clock of everything."""
        return step % self.config.generator_every == 0

    def state_shape(self):
        """The TrainState, as jax.ShapeDtypeStructs with shardings."""
        shapes = jax.eval_shape(lambda: init_state(_zeros(self.nets), self.tx))
        return _placed(shapes, self.nets, self.mesh)

    def start(self):
        """(TrainState at step 0, frozen nets), loaded and placed."""
        nets = {role: _load(self.config, role, net) for role, net in self.nets.items()}
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shape())
        state = jax.jit(partial(init_state, tx=self.tx), out_shardings=shardings)(nets)
        return state, self.load_frozen()

    def load_frozen(self):
        """The frozen nets, in the dtype that they compute in."""
        placed = _placed(self.frozen, self.frozen, self.mesh)
        loaded = {role: _load(self.config, role, net) for role, net in self.frozen.items()}
        return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), loaded, placed)

    def samplers(self):
        """What the trained network is judged under, the run's own first."""
        spec = self.config.evaluate
        if hasattr(self.method, "times"):
            times, shift = self.method.times, self.method.shift
            return [sample.FewStep(sample.fewer(times, n), shift) for n in spec.steps]
        return [sample.ManyStep(n, spec.guidance) for n in spec.steps]

    def judge(self):
        """The Judge of the run's data; None where the config names no feature network."""
        spec = self.config
        return evaluate.data_judge(spec.data.name, spec.data.data_dir, spec.evaluate.features)

    def batches(self, step):
        """This host's batches from `step` on: {"cond", "uncond"} and what the method wants."""
        local = data.Batches(
            self.source,
            self.config.batch_size,
            self.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        null = self.nets["generator"].net.config.uncond
        for batch in local.iterate(step):
            made = {"cond": batch["label"], "uncond": np.full_like(batch["label"], null)}
            if self.method.uses_data:
                made["data"] = batch["image"]
            yield sharding.global_batch(made)


def build(config, devices=None):
    """Checks a config and resolves it; reads headers, loads no weights, computes nothing.

    Raises:
        ValueError, FileNotFoundError: the offending path, both values and what to do.
    """
    kind = config.method.cls
    _check_numbers(config, (*KEYS, *kind.trainable, *kind.frozen))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide into {parts} parts "
            f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} x "
            f"config.accumulate={config.accumulate})"
        )
    source = data.load(config.data.name, "train", config.data.data_dir)
    # The teacher first: others may start from its file, and a wrong path is the teacher's.
    frozen = {role: _abstract(config, role, source) for role in kind.frozen}
    nets = {role: _abstract(config, role, source) for role in kind.trainable}
    _check_fit(nets | frozen, source)
    shape = nets["generator"].net.config.sample_shape
    method = construct(config.method, "config.method", sample_shape=shape)
    transforms = {}
    for role in nets:
        every = config.generator_every if role == "generator" else 1
        adamw = construct(config[role].optimizer, f"config.{role}.optimizer")
        transforms[role] = adamw.transform(-(-config.steps // every))
    return Run(config, method, nets, frozen, optimizer.per_role(transforms), source, mesh)


def _check_numbers(config, known):
    for name in config:
        if name not in known:
            raise ValueError(unknown(f"config.{name}", name, known))
    if missing := [name for name in known if name not in config]:
        raise ValueError(f"config lacks {missing}; {config.method.cls.__name__} needs them")
    values = flatten(config)
    for name, least in LEAST.items():
        if values[name] < least:
            raise ValueError(f"config.{name} is {values[name]}; it must be {least} or more")


def _check_fit(nets, source):
    """All networks speak of the data's images and classes; the two scores share a schedule."""
    for role, denoiser in nets.items():
        evaluate.require_fit(f"config.{role}", denoiser, source)
    schedules = {role: nets[role].schedule for role in ("teacher", "fake_score") if role in nets}
    if len(set(schedules.values())) > 1:
        raise ValueError(f"teacher and fake_score must share one schedule, but have {schedules}")


def _path(config, role):
    """The file that a role starts from; None for a fresh network."""
    path = config[role].weights
    if path == "random":
        return None
    if path != "teacher":
        return path
    if "teacher" not in config:
        raise ValueError(f"config.{role}.weights='teacher', but this run has no teacher")
    return config.teacher.weights


def _abstract(config, role, source):
    """A role's Denoiser, abstract; a `model` that its file does not hold is refused."""
    spec, path = config[role], _path(config, role)
    compute = dict(spec.get("compute", {}))
    if path is not None:
        try:
            held = weights.abstract(path, **compute)
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise ValueError(f"config.{role}: {error}") from error
        if "model" not in spec:
            return held
    size, _, channels = source.image_shape
    given = dict(image_size=size, channels=channels, num_classes=source.num_classes, **compute)
    model = construct(spec.model, f"config.{role}.model", **given)
    net = jax.eval_shape(lambda: weights.build(model))
    if path is None:
        schedule = construct(spec.schedule, f"config.{role}.schedule")
        return Denoiser(net, schedule, construct(spec.prediction, f"config.{role}.prediction"))
    if lines := weights.differing(weights.shapes(net), weights.shapes(held.net)):
        raise ValueError(
            f"config.{role}.model is not the network in {path}; change the model, or start from "
            f"config.{role}.weights='random':\n{lines}"
        )
    return held


def _load(config, role, abstract):
    path = _path(config, role)
    if path is None:
        net = weights.build(abstract.net.config, seed=config.seed)
        return dataclasses.replace(abstract, net=net)
    loaded = weights.load(path, **dict(config[role].get("compute", {})))
    if role == "teacher":
        return jax.tree.map(lambda x: x.astype(abstract.net.config.dtype), loaded)
    return loaded


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _placed(shapes, nets, mesh):
    """`shapes` with shardings, by the rules of the families of `nets`."""
    rules = tuple(
        dict.fromkeys(r for net in nets.values() for r in weights.sharding_rules(net.net))
    )
    shardings = sharding.infer(shapes, rules, mesh) if nets else shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def describe(run):
    """Parameters and bytes by role, as a table in text: what the devices have to hold."""
    state = run.state_shape()

    def mebibytes(tree):
        return checkpoint.tree_bytes(tree) / 2**20

    lines = [f"{'role':<12}{'parameters':>14}{'dtype':>10}{'weights':>14}"]
    for role, denoiser in (run.nets | run.frozen).items():
        count = sum(x.size for x in jax.tree.leaves(denoiser))
        dtype = denoiser.net.config.dtype if role in run.frozen else "float32"
        size = count * jnp.dtype(dtype).itemsize / 2**20
        lines.append(f"{role:<12}{count:>14,}{dtype:>10}{size:>10.1f} MiB")
    lines += [
        f"{'average':<36}{mebibytes(state.ema):>10.1f} MiB",
        f"{'optimizers':<36}{mebibytes(state.opt_state):>10.1f} MiB",
        f"one checkpoint: {mebibytes(state):.1f} MiB; devices: {run.mesh.size} "
        f"({run.mesh.devices.flat[0].device_kind}), {dict(run.mesh.shape)}",
    ]
    return "\n".join(lines)


def compile_steps(run, state, frozen, batch, key):
    """{update_generator: the compiled step}; both compile at once, each on a thread of its own."""
    config = run.config
    jitted = jax.jit(
        partial(
            train_step,
            method=run.method,
            tx=run.tx,
            ema=EMA(**config.ema),
            reuse_rollout=config.reuse_rollout,
            accumulate=config.accumulate,
        ),
        static_argnames="update_generator",
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    kinds = sorted({run.updates_generator(step) for step in range(config.generator_every)})
    lowered = [jitted.lower(state, frozen, batch, key, update_generator=kind) for kind in kinds]
    with ThreadPoolExecutor(len(kinds)) as pool:
        return dict(zip(kinds, pool.map(lambda low: low.compile(), lowered), strict=True))


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
    checkpoint.check_writable(workdir)
    _claim(run.config, workdir)
    shape = run.state_shape()
    with (
        checkpoint.Checkpointer(workdir, keep=run.config.checkpoint.keep) as checkpoints,
        Writer(workdir, tensorboard=run.config.log.tensorboard) as writer,
    ):
        checkpoints.check_space(shape, shape.ema)
        restored = checkpoints.restore_latest(shape)
        finished = workdir / evaluate.REPORT
        if restored is not None and restored[1] > run.config.steps:
            raise ValueError(
                f"config.steps={run.config.steps}, but the run in {workdir} has taken "
                f"{restored[1]}: ask for as many or more, or choose another --workdir"
            )
        if restored is not None and restored[1] == run.config.steps and finished.exists():
            log.info("this run is finished; its report again, from %s", finished)
            print(finished.read_text())
            return finished
        if restored is None:
            (state, frozen), extra = run.start(), {}
        else:
            (state, _, extra), frozen = restored, run.load_frozen()
            log.info("going on from step %d in %s", int(state.step), workdir)
        writer.rewind(int(state.step))
        finished.unlink(missing_ok=True)  # whatever it reports, it is not the end of this run
        try:
            with checkpoint.Preemption() as preemption:
                state = _loop(run, state, frozen, extra, checkpoints, writer, preemption)
        except health.Diverged:
            _export_best(run, shape.ema, checkpoints, workdir)
            raise
        if int(state.step) < run.config.steps:
            log.info("stopped and saved at step %d; the same command goes on", int(state.step))
            return None
        trained = sharding.replicate(state.ema)
        _export(run, trained, workdir / EXPORT, run.config.steps)
        _export_best(run, shape.ema, checkpoints, workdir)
        text = _report(run, trained, workdir)
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
        evaluate.write_text(path, json.dumps(now, indent=2, sort_keys=True) + "\n")


def _loop(run, state, frozen, extra, checkpoints, writer, preemption):
    """Steps from `state.step` to the end, or to a signal; returns the last state, saved."""
    config, first = run.config, int(state.step)
    if first == config.steps:
        return state
    root = jax.random.key(config.seed, impl="threefry2x32")
    window = health.Window(config.log.every, extra.get("window"))
    monitor = health.Monitor(state=extra.get("monitor"))
    progress = Progress(config.steps, config.batch_size)

    def heed(record):
        checkpoints.check()
        if record is not None:
            writer.scalars(record[0], record[1] | progress.report(*record))
            monitor.update(*record)

    batches, compiled = run.batches(first), None
    for done, batch in enumerate(batches, first + 1):
        if compiled is None:
            compiled = compile_steps(run, state, frozen, batch, root)
        state, metrics = compiled[run.updates_generator(done - 1)](state, frozen, batch, root)
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
    num_classes = run.source.num_classes
    labels = sample.balanced(run.config.evaluate.samples, num_classes)
    images = sample.draw(state.ema, sampler, labels)
    writer.images(step, sampler.name, report.grid(images[: 8 * num_classes], num_classes))
    judge = run.judge()
    if judge is None:
        return
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
    if hasattr(run.method, "times"):
        notes |= {"times": run.method.times, "shift": run.method.shift}
    if jax.process_index() == 0:
        weights.save(path, trained, **notes)


def _report(run, trained, workdir):
    """Judges the trained network beside real images and its teacher; writes and returns the report.

    Every process computes all of it, with whole weights of its own; the first one writes.
    """
    spec, name, data_dir = run.config.evaluate, run.config.data.name, run.config.data.data_dir
    num_classes, seed = run.source.num_classes, evaluate.SEED
    judge = run.judge()
    title = f"{type(run.method).__name__} on {name}, {run.config.steps:,} steps"
    if judge is None:
        text = f"# {title}\n\nNot judged: config.evaluate.features names no feature network.\n"
        if jax.process_index() == 0:
            evaluate.write_text(workdir / evaluate.REPORT, text)
        return text
    labels = np.sort(sample.balanced(2 * num_classes, num_classes))
    test, test_labels = data.arrays(data.load(name, "test", data_dir))
    rows = np.concatenate([np.flatnonzero(test_labels == k)[:2] for k in range(num_classes)])
    table, pictures = [evaluate.real_row(judge, spec.num)], {"real": test[rows]}
    if "teacher" in run.frozen:
        path = run.config.teacher.weights
        teachers = [sample.ManyStep(n, spec.teacher_guidance) for n in spec.teacher_steps]
        kept = workdir / "teacher.rows.json"
        table += evaluate.teacher_rows(path, teachers, judge, spec.num, store=kept)
        many = teachers[0]
        pictures[many.title] = sample.draw(weights.load(path), many, labels, seed)
    table += evaluate.rows(trained, run.samplers(), judge, spec.num)
    for sampler in run.samplers():
        pictures[sampler.title] = sample.draw(trained, sampler, labels, seed)
    text = evaluate.report_text(title, table, judge.name)
    if jax.process_index() == 0:
        evaluate.write_report(workdir, title, table, pictures, labels, judge.name)
        print(text)
    return text
