"""A config becomes a `Run`: networks, method, optimizer, data and mesh, all checked.

    run = build(config)          resolves and checks everything; nothing is computed
    state, frozen = run.start()  loads or initialises weights and places them on the mesh

`roles` resolves the networks, `checks` refuses what does not go together, `description` says what a
run stores and computes. Imports the rooms below.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax import data
from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.quality.evaluator import Evaluator
from dmd_jax.rollouts import samplers
from dmd_jax.training import adapters, checks, memory, optimizer, roles
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import config_role, construct, unknown
from dmd_jax.training.cost import batch_shape
from dmd_jax.training.health import Thresholds
from dmd_jax.training.step import EMA, init_state, train_step
from dmd_jax.training.writers import Log


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

    def cache_shape(self):
        """The KV cache of a rollout of one part of the batch; None where there is none."""
        video = getattr(self.method, "video", None)
        if video is None:
            return None
        size = self.config.batch_size // self.config.accumulate
        videos = jax.ShapeDtypeStruct((size, *self.source.sample_shape), jnp.float32)
        return video.cache_shape(self.nets["generator"], videos)

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
            frozen = {base: roles.load(self.config, role, to, cast=True)}
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
    checks.entries(config)
    mesh = _mesh(config, devices)
    source, kind = _source(config, files), config.method.cls
    # The teacher first: other roles may use its file, and a wrong path is then the teacher's error.
    abstract = partial(roles.abstract, config, source=source, files=files)
    frozen = {role: roles.frozen(config, role, abstract(role)) for role in kind.frozen}
    nets = {role: abstract(role) for role in kind.trainable if role != roles.DISCRIMINATOR}
    checks.fit(frozen | nets, source)
    if roles.DISCRIMINATOR in kind.trainable:
        nets[roles.DISCRIMINATOR] = roles.abstract_discriminator(config, frozen | nets)
    bind, frozen = adapters.resolve(config, nets, frozen, files=files)
    method = construct(config.method, "config.method", sample_shape=source.sample_shape)
    checks.networks(method, frozen | nets)
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
    checks.fallback(run.log, run.checkpoint)
    memory.check(run)
    return run


def _others(config, method, source, files):
    """The abstract autoencoder and reward, where the method calls them."""
    others = {}
    if getattr(method, "needs_vae", False):
        others["vae"] = roles.abstract_vae(config, files=files)
    if getattr(method, "needs_reward", False):
        others["reward"] = jax.eval_shape(lambda: roles.reward(config, source))
    return others


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


def _source(config, files):
    """The training data: a data set by name, or the object of a class of data/."""
    if "cls" in config.data:
        source = construct(config.data, "config.data")
        if files:
            source.open()
            checks.guidance(config, source)
        return source
    try:
        return data.load(
            config.data.name, config.data.get("split", "train"), config.data.get("data_dir")
        )
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error


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
