"""A config, resolved: networks, method, optimizer, data and mesh, checked before any compute.

    run = build(config)          resolve and check everything; nothing is computed
    state, frozen = run.start()  load, initialise, place

Imports the rooms below. Configs stop here and in `train`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax import data, weights
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import tree_bytes
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.quality.evaluator import Evaluator
from dmd_jax.rollouts import samplers
from dmd_jax.training import optimizer
from dmd_jax.training.configuration import construct, flatten, unknown
from dmd_jax.training.cost import cost
from dmd_jax.training.step import EMA, init_state, train_step

KEYS = (
    *("seed", "steps", "batch_size", "accumulate", "generator_every", "reuse_rollout"),
    *("data", "method", "ema", "mesh", "log", "checkpoint", "health", "evaluate"),
)
# The least value of numbers that no class checks.
LEAST = {"seed": 0, "checkpoint.keep": 2} | dict.fromkeys(
    (
        *("steps", "batch_size", "accumulate", "generator_every"),
        *("log.every", "checkpoint.every"),
    ),
    1,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, resolved. Networks are abstract (jax.ShapeDtypeStruct) until `start`.

    Attributes:
        config: the ConfigDict that all this was made from.
        method: a dataclass of `methods/`.
        nets: {role: Denoiser}, trainable.
        frozen: {role: Denoiser}, which nothing changes, in the dtype that they compute in.
        tx: the optimizer of all trainable roles.
        ema: the generator's average.
        source: the training data.
        mesh: the devices.
        evaluator: judges and reports the run.
    """

    config: Any
    method: Any
    nets: dict[str, Denoiser]
    frozen: dict[str, Denoiser]
    tx: Any
    ema: EMA
    source: data.Source
    mesh: jax.sharding.Mesh
    evaluator: Evaluator

    def updates_generator(self, step):
        """Whether the generator learns at this step: the one clock of everything."""
        return step % self.config.generator_every == 0

    @property
    def step(self):
        """The run's `train_step`: (state, frozen, batch, key, *, update_generator), not jitted."""
        return partial(
            train_step,
            method=self.method,
            tx=self.tx,
            ema=self.ema,
            reuse_rollout=self.config.reuse_rollout,
            accumulate=self.config.accumulate,
        )

    def state_shape(self):
        """The TrainState, as jax.ShapeDtypeStructs with shardings."""
        shapes = jax.eval_shape(lambda: init_state(_zeros(self.nets), self.tx))
        return _placed(shapes, self.nets, self.mesh)

    def start(self):
        """(TrainState at step 0, frozen nets), loaded and placed."""
        shape = self.state_shape()
        nets = {role: _load(self.config, role, net) for role, net in shape.nets.items()}
        shardings = jax.tree.map(lambda x: x.sharding, shape)
        state = jax.jit(partial(init_state, tx=self.tx), out_shardings=shardings)(nets)
        return state, self.load_frozen()

    def frozen_shape(self):
        """The frozen nets, as jax.ShapeDtypeStructs with shardings."""
        return _placed(self.frozen, self.frozen, self.mesh)

    def load_frozen(self):
        """The frozen nets, loaded and placed."""
        shape = self.frozen_shape()
        loaded = {role: _load(self.config, role, net) for role, net in shape.items()}
        return jax.tree.map(lambda x, to: x.astype(to.dtype), loaded, shape)

    def batches(self, step):
        """This host's part of the batches from `step` on, as global arrays."""
        size = self.config.batch_size
        index, count = sharding.batch_part(self.mesh, size)
        local = data.Batches(
            self.source,
            size,
            self.config.seed,
            with_data=self.method.uses_data,
            process_index=index,
            process_count=count,
        )
        return map(sharding.global_batch, local.iterate(step))


def build(config, devices=None, *, files=True):
    """Checks a config and resolves it; reads headers, loads no weights, computes nothing.

    Args:
        files: False for a dry run: a role whose `model` the config states need not have its
            weights here, nor prompts and latents theirs.

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
    source = _source(config, files)
    # The teacher first: others may start from its file, and a wrong path is the teacher's.
    abstract = partial(_abstract, config, source=source, files=files)
    frozen = {role: _in_compute_dtype(abstract(role)) for role in kind.frozen}
    nets = {role: abstract(role) for role in kind.trainable}
    _check_fit(nets | frozen, source)
    method = construct(config.method, "config.method", sample_shape=source.sample_shape)
    transforms = {}
    for role in nets:
        every = config.generator_every if role == "generator" else 1
        adamw = construct(config[role].optimizer, f"config.{role}.optimizer")
        transforms[role] = adamw.transform(-(-config.steps // every))
    tx, ema = optimizer.per_role(transforms), construct(config.ema, "config.ema")
    construct(config.health, "config.health")
    evaluator = _evaluator(config, method, source)
    return Run(config, method, nets, frozen, tx, ema, source, mesh, evaluator)


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


def _source(config, files):
    """What the run learns from: a data set by name, or what a class of the data room reads."""
    if "cls" in config.data:
        source = construct(config.data, "config.data")
        if files:
            source.open()
        return source
    try:
        return data.load(config.data.name, config.data.split, config.data.data_dir)
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error


def _check_fit(nets, source):
    """All networks speak of the source's samples and conditions; the scores share a schedule."""
    for role, denoiser in nets.items():
        source.require_fit(f"config.{role}", denoiser.net.config)
    schedules = {role: nets[role].schedule for role in ("teacher", "fake_score") if role in nets}
    if len(set(schedules.values())) > 1:
        raise ValueError(f"teacher and fake_score must share one schedule, but have {schedules}")


def _evaluator(config, method, source):
    """What judges and reports the run; what it could not judge is refused here."""
    spec = construct(config.evaluate, "config.evaluate")
    if not method.frozen and spec.teacher_steps:
        raise ValueError(
            f"config.evaluate.teacher_steps is {spec.teacher_steps}, but this run has no teacher"
        )
    if method.frozen and not spec.teacher_steps:
        raise ValueError(
            "config.evaluate.teacher_steps is (): name one number of steps of the teacher or more"
        )
    if hasattr(method, "times"):
        if spec.guidance != 1:
            raise ValueError(
                f"config.evaluate.guidance is {spec.guidance}, but guidance is in the weights of a "
                "student: leave it at 1"
            )
        own = [
            samplers.FewStep(samplers.fewer(method.times, steps), method.shift)
            for steps in spec.steps
        ]
    else:
        own = [samplers.ManyStep(steps, spec.guidance, method.shift) for steps in spec.steps]
    teachers = [
        samplers.ManyStep(steps, spec.teacher_guidance, method.shift)
        for steps in spec.teacher_steps
    ]
    evaluator = Evaluator(spec, source, own, teachers, config.batch_size)
    try:
        evaluator.check()
    except ValueError as error:
        raise ValueError(f"config.evaluate: {error}") from error
    return evaluator


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


def _abstract(config, role, *, source, files):
    """A role's Denoiser, abstract; a `model` that its file does not hold is refused."""
    spec, path = config[role], _path(config, role)
    compute = dict(spec.get("compute", {}))
    if "model" in spec and not files:
        path = None
    if path is not None:
        try:
            held = weights.abstract(path, **compute)
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise ValueError(f"config.{role}: {error}") from error
        if "model" not in spec:
            return held
    model = construct(spec.model, f"config.{role}.model", **source.model_fields, **compute)
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


def _in_compute_dtype(denoiser):
    """What nothing trains need not be float32."""
    dtype = jnp.dtype(denoiser.net.config.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), denoiser)


def _load(config, role, abstract):
    path, kind = _path(config, role), config.method.cls
    if path is None:
        # Every role has its own seed: two fresh networks are two.
        seed = config.seed + kind.trainable.index(role)
        return dataclasses.replace(abstract, net=weights.build(abstract.net.config, seed=seed))
    compute = dict(config[role].get("compute", {}))
    places = jax.tree.map(lambda x: x.sharding, abstract)
    return weights.denoiser(path, shardings=places, **compute)


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
    """Parameters and bytes by role, then the run's FLOPs: what the devices hold and compute."""
    state = run.state_shape()

    def mebibytes(tree):
        return tree_bytes(tree) / 2**20

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
        *(f"{name}: {text}" for name, text in cost(run).lines().items()),
    ]
    return "\n".join(lines)
