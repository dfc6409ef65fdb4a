"""A config becomes a `Run`: networks, method, optimizer, data and mesh, all checked.

    run = build(config)          resolves and checks everything; nothing is computed
    state, frozen = run.start()  loads or initialises weights and places them on the mesh

`roles` resolves the networks. Imports the rooms below. Only run, roles and loop read configs.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax import data
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import tree_bytes
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.experts import Experts
from dmd_jax.models.layers import Int8
from dmd_jax.quality.evaluator import Evaluator
from dmd_jax.rollouts import samplers
from dmd_jax.training import adapters, memory, optimizer, roles
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import config_role, construct, flatten, unknown
from dmd_jax.training.cost import batch_shape, cost
from dmd_jax.training.health import Thresholds
from dmd_jax.training.step import EMA, init_state, train_step
from dmd_jax.training.writers import Log

KEYS = (
    *("seed", "steps", "batch_size", "accumulate", "generator_every", "reuse_rollout"),
    *("data", "method", "ema", "mesh", "log", "checkpoint", "health", "evaluate"),
)
# Entries that must be 1 or more and that no class checks.
POSITIVE = ("steps", "batch_size", "accumulate", "generator_every")


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved config. Networks are abstract (jax.ShapeDtypeStruct) until `start`.

    Attributes:
        config: the ConfigDict from which the run was built.
        method: a dataclass of `methods/`.
        nets: {role: Denoiser}, trainable, as the method sees them.
        frozen: {role: Denoiser}, not trained, in their compute dtype or int8: the method's, and
            the bases of adapters.
        bind: what is trained and what is frozen become the networks that the method sees.
        others: frozen trees that are no Denoisers, of methods that need them: "vae", "reward".
        tx: the optimizer of all trainable roles.
        ema: the generator's averages.
        source: the training data.
        mesh: the devices.
        log, checkpoint, health: what is logged, when state is saved, when a run counts as diverged.
        evaluator: judges and reports the run.
    """

    config: Any
    method: Any
    nets: dict[str, Denoiser]
    frozen: dict[str, Denoiser]
    bind: adapters.Bind
    others: dict[str, Any]
    tx: Any
    ema: EMA
    source: data.Source
    mesh: jax.sharding.Mesh
    log: Log
    checkpoint: Checkpoints
    health: Thresholds
    evaluator: Evaluator

    def updates_generator(self, step):
        """Whether the generator is updated at this step: weights, moments and averages."""
        return step % self.config.generator_every == 0

    @property
    def step(self):
        """The run's `train_step`: (state, frozen, batch, key, *, update_generator), not jitted."""
        return partial(
            train_step,
            method=self.method,
            tx=self.tx,
            bind=self.bind,
            ema=self.ema,
            reuse_rollout=self.config.reuse_rollout,
            accumulate=self.config.accumulate,
        )

    def state_shape(self):
        """The TrainState, as jax.ShapeDtypeStructs with shardings."""
        trained = self.bind.trainable
        shapes = jax.eval_shape(lambda: init_state(roles.zeros(trained), self.tx, self.ema))
        places = sharding.infer(shapes, self.bind.rules(), self.mesh)
        shapes = roles.with_shardings(shapes, places)
        moments = optimizer.in_host(
            shapes.opt_state, memory.optimizers_in_host(self.config, trained)
        )
        return dataclasses.replace(shapes, opt_state=moments, stream=self._stream_shape())

    def _stream_shape(self):
        stream = jax.eval_shape(self._stream, self.nets["generator"], batch_shape(self)["cond"])
        if stream is None:
            return None

        def place(x, spec):
            place = jax.sharding.NamedSharding(self.mesh, sharding.fit(spec, x.shape, self.mesh))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(place, stream, stream.specs())

    def _stream(self, generator, cond):
        """What the first step goes on from; None for most methods."""
        make = getattr(self.method, "streams", None)
        return None if make is None else make(generator, cond)

    def start(self):
        """(TrainState at step 0, frozen nets), loaded and placed."""
        shape = self.state_shape()
        nets = {role: self.bind.load(self.config, role, x) for role, x in shape.nets.items()}
        shardings = jax.tree.map(lambda x: x.sharding, shape)
        cond = batch_shape(self)["cond"]

        def init(nets):
            stream = self._stream(self.nets["generator"], roles.zeros(cond))
            return init_state(nets, self.tx, self.ema, stream)

        state = jax.jit(init, out_shardings=shardings)(nets)
        return state, self.load_frozen()

    def frozen_shape(self):
        """The frozen nets, as jax.ShapeDtypeStructs with shardings."""
        whole = jax.sharding.NamedSharding(self.mesh, jax.P())
        others = roles.with_shardings(self.others, jax.tree.map(lambda _: whole, self.others))
        return self._frozen_nets() | others

    def _frozen_nets(self):
        """The frozen Denoisers, as jax.ShapeDtypeStructs with shardings."""
        nets = roles.placed(self.frozen, self.frozen, self.mesh)
        return {
            name: memory.in_memory(self.config, config_role(name), net)
            for name, net in nets.items()
        }

    def load_frozen(self):
        """The frozen nets, loaded and placed."""
        loaded = {}
        for name, to in self._frozen_nets().items():
            loaded[name] = roles.load(self.config, config_role(name), to, cast=True)
        if "vae" in self.others:
            loaded["vae"] = roles.load_vae(self.config, self.mesh)
        if "reward" in self.others:
            loaded["reward"] = roles.load_reward(self.config, self.source, self.mesh)
        return loaded

    def merged(self, role, trained, frozen):
        """The Denoiser of a role's trained tree as an export: plain float32 weights.

        An adapter changes the weights of the file of its base; if the base is int8, they are read
        again, because what was rounded away is only there.
        """
        base = self.bind.bases.get(role)
        if base is not None and memory.in_int8(self.config, config_role(base)):
            shape = roles.in_compute_dtype(self.nets[role])
            (to,) = roles.placed({base: shape}, {base: shape}, self.mesh).values()
            frozen = {base: roles.load(self.config, config_role(base), to, cast=True)}
        return self.bind.merged(role, trained, frozen)

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
    """Checks and resolves a config; reads headers of files, loads no weights, computes nothing.

    Args:
        config: a ConfigDict of `configuration.complete`.
        devices: the devices of the mesh; all of them if None.
        files: False for a dry run: the weights of a role whose `model` is stated may be absent, and
            so may prompts and latents.

    Raises:
        ValueError, FileNotFoundError: the path of the offending entry, both values, what to do.
    """
    _check_entries(config)
    mesh = _mesh(config, devices)
    source, kind = _source(config, files), config.method.cls
    # The teacher first: other roles may use its file, and a wrong path is then the teacher's error.
    abstract = partial(roles.abstract, config, source=source, files=files)
    frozen = {role: roles.frozen(config, role, abstract(role)) for role in kind.frozen}
    nets = {role: abstract(role) for role in kind.trainable if role != roles.DISCRIMINATOR}
    _check_fit(frozen | nets, source)
    if roles.DISCRIMINATOR in kind.trainable:
        nets[roles.DISCRIMINATOR] = roles.abstract_discriminator(config, frozen | nets)
    bind, frozen = adapters.resolve(config, nets, frozen, files=files)
    method = construct(config.method, "config.method", sample_shape=source.sample_shape)
    _check_networks(method, frozen | nets)
    run = Run(
        config=config,
        method=method,
        nets=nets,
        frozen=frozen,
        bind=bind,
        others=_others(config, method, source, files),
        tx=_optimizer(config, nets),
        ema=construct(config.ema, "config.ema"),
        source=source,
        mesh=mesh,
        log=construct(config.log, "config.log"),
        checkpoint=construct(config.checkpoint, "config.checkpoint"),
        health=construct(config.health, "config.health"),
        evaluator=_evaluator(config, method, source),
    )
    _check_fallback(run)
    memory.check(run)
    return run


def _check_networks(method, nets):
    """Refuses networks that the method cannot use; experts, unless it says which it can."""
    if hasattr(method, "check_networks"):
        try:
            return method.check_networks(nets)
        except ValueError as error:
            raise ValueError(f"config.method: {error}") from error
    for role, net in nets.items():
        if isinstance(getattr(net, "net", None), Experts):
            raise ValueError(
                f"config.{config_role(role)} has experts, one of which is called for a "
                f"whole batch, and {type(method).__name__} draws a time for each sample: use "
                "PhasedDMD, or one network"
            )


def _others(config, method, source, files):
    """The abstract autoencoder and reward, where the method calls them."""
    others = {}
    if getattr(method, "needs_vae", False):
        others["vae"] = roles.abstract_vae(config, files=files)
    if getattr(method, "needs_reward", False):
        others["reward"] = jax.eval_shape(lambda: roles.reward(config, source))
    return others


def _check_entries(config):
    """Refuses unknown, missing and impossible entries that no class checks."""
    if "cls" not in config.get("method", {}):
        raise ValueError("config.method names no class; write config.method = dict(cls=DMD, ...)")
    kind = config.method.cls
    roles = (*kind.trainable, *kind.frozen)
    known = (*KEYS, *roles, "vae", "reward")
    for name in config:
        if name not in known:
            raise ValueError(unknown(f"config.{name}", name, known))
    needed = [*KEYS, *roles, *(f"{role}.weights" for role in roles)]
    needed += [f"{role}.optimizer" for role in kind.trainable]
    if "cls" not in config.get("data", {}):
        needed.append("data.name")
    missing = [name for name in needed if not _has(config, name)]
    if missing:
        raise ValueError(f"config lacks {missing}; {kind.__name__} needs them")
    values = flatten(config)
    for name in POSITIVE:
        if values[name] < 1:
            raise ValueError(f"config.{name} is {values[name]}; it must be 1 or more")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is {config.seed}; it must be 0 or more and below 2**32")


def _has(config, path):
    """Whether a config has an entry, by its path: "generator.weights"."""
    for name in path.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def _mesh(config, devices):
    for axis in config.mesh:
        if axis not in sharding.AXES:
            raise ValueError(unknown(f"config.mesh.{axis}", axis, sharding.AXES))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide into {parts} parts "
            f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} x "
            f"config.accumulate={config.accumulate})"
        )
    return mesh


def _optimizer(config, roles):
    """One optax transform for all roles; each counts its own updates."""
    transforms, schedules = {}, {}
    for role in roles:
        updates = -(-config.steps // (config.generator_every if role == "generator" else 1))
        spec = construct(config[role].optimizer, f"config.{role}.optimizer")
        transforms[role], schedules[role] = spec.transform(updates), spec.schedule(updates)
    return optimizer.per_role(transforms, schedules)


def _check_fallback(run):
    """Refuses a run in which all checkpoints could come from steps that were not judged yet.

    Health is judged at multiples of log.every. Up to ceil((log.every - 1) / checkpoint.every)
    checkpoints lie between two of them, and one more must be kept.
    """
    every, keep, window = run.checkpoint.every, run.checkpoint.keep, run.log.every
    if (keep - 1) * every < window - 1:
        raise ValueError(
            f"config.checkpoint.keep={keep} checkpoints, one every config.checkpoint.every={every} "
            f"steps, do not reach back over config.log.every={window} steps, after which the "
            "health of a run is judged: if it diverges, none of them may be good. Lower log.every, "
            "or raise checkpoint.every or checkpoint.keep"
        )


def _source(config, files):
    """The training data: a data set by name, or the object of a class of data/."""
    if "cls" in config.data:
        source = construct(config.data, "config.data")
        if files:
            source.open()
            _require_guidance(config, source)
        return source
    try:
        return data.load(
            config.data.name, config.data.get("split", "train"), config.data.get("data_dir")
        )
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error


def _require_guidance(config, source):
    """Refuses pairs whose ends are of another guidance than the method's: of another target."""
    made, wanted = getattr(source, "guidance", None), config.method.get("guidance")
    if None not in (made, wanted) and made != wanted:
        raise ValueError(
            f"config.data: its pairs were made with guidance={made}, but config.method.guidance="
            f"{wanted}: both losses must aim at one teacher. Change the second, or make pairs with "
            f"`python -m dmd_jax.ode_pairs --guidance={wanted} --out=...`"
        )


def _check_fit(nets, source):
    """Refuses networks of other samples or conditions than the data's, and two score schedules."""
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
    try:
        own = [method.sampler(steps, spec.guidance) for steps in spec.steps]
        teachers = [
            _teacher_sampler(method, steps, spec.teacher_guidance) for steps in spec.teacher_steps
        ]
        judged = getattr(source, "images", source)  # of pairs, the images that they are like
        evaluator = Evaluator(spec, judged, own, teachers, config.batch_size)
        evaluator.check()
    except ValueError as error:
        raise ValueError(f"config.evaluate: {error}") from error
    return evaluator


def _teacher_sampler(method, steps, guidance):
    """How the teacher is sampled: as the method says, or all frames at once."""
    if hasattr(method, "teacher_sampler"):
        return method.teacher_sampler(steps, guidance)
    return samplers.ManyStep(steps, guidance, method.shift)


def describe(run):
    """Parameters and bytes by role, then the run's FLOPs: what the devices store and compute."""
    state = run.state_shape()

    def mebibytes(tree):
        return tree_bytes(tree) / 2**20

    lines = [f"{'role':<12}{'parameters':>14}{'dtype':>10}{'weights':>14}"]
    for role, tree in (run.bind.trainable | run.frozen).items():
        count, dtype = _parameters(tree), "float32"
        size = count * 4 / 2**20
        if role in run.frozen:
            int8 = memory.in_int8(run.config, config_role(role))
            dtype, size = "int8" if int8 else tree.net.config.dtype, mebibytes(tree)
        note = f", adapter of {run.bind.bases[role]}" if role in run.bind.bases else ""
        if role in run.frozen and memory.in_host(run.config, config_role(role)):
            note += ", layers in the memory of the host"
        lines.append(f"{role:<12}{count:>14,}{dtype:>10}{size:>10.1f} MiB{note}")
    for name, tree in run.others.items():
        count = sum(x.size for x in jax.tree.leaves(tree))
        lines.append(f"{name:<12}{count:>14,}{'stored':>10}{mebibytes(tree):>10.1f} MiB")
    moved = ", ".join(sorted(memory.optimizers_in_host(run.config, run.nets)))
    note = f", of {moved} in the memory of the host" if moved else ""
    lines += [
        f"{'average':<36}{mebibytes((state.ema, state.more_ema)):>10.1f} MiB",
        f"{'optimizers':<36}{mebibytes(state.opt_state):>10.1f} MiB{note}",
        *_cache_lines(run),
        f"one checkpoint: {mebibytes(state):.1f} MiB; devices: {run.mesh.size} "
        f"({run.mesh.devices.flat[0].device_kind}), {dict(run.mesh.shape)}",
        *(f"{name}: {text}" for name, text in cost(run).lines().items()),
    ]
    return "\n".join(lines)


def _parameters(tree):
    """How many weights a tree has; the scales of an `Int8` are none."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Int8))
    return sum(math.prod((x.values if isinstance(x, Int8) else x).shape) for x in leaves)


def _cache_lines(run):
    """The line about the KV cache of a causal rollout; [] without one."""
    cache = cache_shape(run)
    if cache is None:
        return []
    name = f"cache of {cache.slots} latent frames"
    return [f"{name:<36}{tree_bytes(cache) / 2**20:>10.1f} MiB"]


def cache_shape(run):
    """The KV cache of a rollout of one part of the batch, in shapes; None where there is none."""
    video = getattr(run.method, "video", None)
    if video is None:
        return None
    size = run.config.batch_size // run.config.accumulate
    videos = jax.ShapeDtypeStruct((size, *run.source.sample_shape), jnp.float32)
    return video.cache_shape(run.nets["generator"], videos)
