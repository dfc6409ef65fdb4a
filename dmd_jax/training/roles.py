"""The networks of a run by role ("generator", "fake_score", "teacher"): resolved, loaded, placed.

A role is a section of the config: `weights` (a file, a name, "teacher" or "random"), `compute`
(dtype, remat, weights_dtype, memory), if the file does not state them, `model`, `schedule` and
`prediction`, and `experts` where it is several networks. A network is abstract, with
jax.ShapeDtypeStruct in place of arrays, until `load`. Imports weights, models, diffusion and the
configuration.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching
from dmd_jax.models.experts import Experts, combine
from dmd_jax.models.layers import is_int8
from dmd_jax.models.wan_vae import SHARDING_RULES as VAE_RULES
from dmd_jax.models.wan_vae import WanVAE
from dmd_jax.training import memory
from dmd_jax.training.configuration import STORAGE, construct, unknown

# The role that is no Denoiser: heads on the features of another role's network.
DISCRIMINATOR = "discriminator"


@dataclasses.dataclass(frozen=True)
class ByNoise:
    """The `experts` of a role: several networks, each for an interval of noise levels.

    Attributes:
        boundaries: the times in [0, 1] that divide them, descending.
        parts: the part of the checkpoint at `weights` that each starts from, from high noise to
            low; () starts all of them from the same network.

    Raises:
        ValueError: there is not one part more than boundaries.
    """

    boundaries: tuple[float, ...] = (0.875,)
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.parts and len(self.parts) != len(self.boundaries) + 1:
            raise ValueError(
                f"parts={self.parts} must be one more than boundaries={self.boundaries}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The part of the checkpoint of each expert."""
        return self.parts or ("transformer",) * (len(self.boundaries) + 1)


def stated(model, weights, **more):
    """The section of a role whose network is stated, so that a dry run needs no weights.

    Args:
        model: the config of a network of velocities, such as `models.wan.T2V_1_3B`. It computes in
            bfloat16, with rematerialisation.
        weights: its file, folder or name.
        **more: other entries of the section, such as its `optimizer`.
    """
    fields = dataclasses.asdict(model)
    compute = {name: fields.pop(name) for name in ("dtype", "remat", "unroll")}
    return dict(
        weights=weights,
        model=dict(cls=type(model), **fields),
        schedule=dict(cls=FlowMatching),
        prediction=dict(cls=Velocity),
        compute=compute | dict(dtype="bfloat16", remat="full"),
        **more,
    )


def experts(config, role):
    """The `ByNoise` of a role; None for one network."""
    spec = config[role].get("experts")
    return None if spec is None else construct(spec, f"config.{role}.experts")


def weights_path(config, role):
    """The file of a role's initial weights; None for random initialisation.

    Raises:
        ValueError: the role starts from the teacher, and the run has none.
    """
    path = config[role].weights
    if path == "random":
        return None
    if path != "teacher":
        return path
    if "teacher" not in config:
        raise ValueError(f"config.{role}.weights='teacher', but this run has no teacher")
    return config.teacher.weights


def fingerprint(config, role):
    """The `weights.fingerprint` of what a role starts from, all of its experts included."""
    path, several = weights_path(config, role), experts(config, role)
    return weights.fingerprint(path, several.sources) if several else weights.fingerprint(path)


def abstract(config, role, *, source, files):
    """A role's abstract Denoiser: that of its file, or of its `model` where there is no file.

    Args:
        config: the config of the run.
        role: name of the role.
        source: the training data, which fill in the fields of `model` that follow from them.
        files: False for a dry run: if `model` is stated, the file is not opened.

    Raises:
        ValueError: the file cannot be used, its network is not `model`, entries are missing, or
            the role is trained and its weights are to be int8 or in the memory of the host.
    """
    memory.require_frozen(config, role)
    several = experts(config, role)
    if several is None:
        return _one(config, role, "transformer", source=source, files=files)
    if config[role].weights == "random":
        raise ValueError(
            f"config.{role}.experts start from weights, and config.{role}.weights is 'random'"
        )
    found = [_one(config, role, part, source=source, files=files) for part in several.sources]
    if isinstance(found[0].net, Experts):
        raise ValueError(
            f"config.{role}.weights={config[role].weights!r} holds experts already: remove "
            f"config.{role}.experts"
        )
    try:
        return combine(found, several.boundaries)
    except ValueError as error:
        raise ValueError(f"config.{role}.experts: {error}") from error


def _one(config, role, part, *, source, files):
    """The abstract Denoiser of one part of a role's checkpoint; see `abstract`."""
    spec, path = config[role], weights_path(config, role)
    if "model" in spec and not files:
        path = None
    if path is None:
        return _stated(config, role, source)
    try:
        stored = weights.abstract(path, part=part, **_compute(config, role))
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.{role}: {error}") from error
    if "model" in spec:
        _require_same(role, path, stored.net, _model(config, role, source))
    return stored


def abstract_vae(config, *, files):
    """The abstract autoencoder of `config.vae`: that of its checkpoint, or of its `model`.

    Args:
        config: the config of the run.
        files: False for a dry run: if `model` is stated, the checkpoint is not opened.

    Raises:
        ValueError: there is no such section, or the checkpoint cannot be used.
    """
    if "vae" not in config or "weights" not in config.vae:
        raise ValueError(
            "config.method.video.image_latent needs an autoencoder: set config.vae = "
            "dict(weights='Wan-AI/Wan2.1-T2V-1.3B-Diffusers'), or image_latent=False"
        )
    if "model" in config.vae and not files:
        return weights.abstract_net(WanVAE, construct(config.vae.model, "config.vae.model"))
    try:
        return weights.abstract_part(config.vae.weights, part="vae")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.vae: {error}") from error


def load_vae(config, mesh):
    """The autoencoder of `config.vae`, whole on every device."""
    abstract = weights.abstract_part(config.vae.weights, part="vae")
    places = sharding.infer(abstract, VAE_RULES, mesh)
    return weights.load(config.vae.weights, part="vae", shardings=places)


def reward(config, source):
    """The callable of `config.reward`, a class with `load(source)` such as `LabelProbability`.

    Raises:
        ValueError: there is no such section, or the reward does not fit the data.
    """
    if "reward" not in config:
        raise ValueError(
            f"{config.method.cls.__name__} needs a reward: set config.reward = "
            "dict(cls=LabelProbability), or a class of your own (docs/methods.md)"
        )
    spec = construct(config.reward, "config.reward")
    try:
        return spec.load(source)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.reward: {error}") from error


def reward_digest(config, source):
    """The `weights.digest` of a reward's arrays."""
    return weights.digest(named_leaves(reward(config, source)).items())


def load_reward(config, source, mesh):
    """`reward`, whole on every device."""
    return jax.device_put(reward(config, source), jax.sharding.NamedSharding(mesh, jax.P()))


def abstract_discriminator(config, scores):
    """The abstract heads of `config.discriminator`, for the features that the method names.

    Args:
        config: the config of the run.
        scores: {role: abstract Denoiser} of the networks that features may come from.

    Raises:
        ValueError: `model` is missing or does not fit that network, the network has no features,
            `weights` is a file, or there is a `compute`.
    """
    spec, role = config.discriminator, config.method.features
    if spec.weights != "random" or "model" not in spec:
        raise ValueError(
            "config.discriminator needs weights='random' and a model, such as "
            "dict(cls=DiscriminatorConfig, blocks=(2,)): its heads are always new"
        )
    if "compute" in spec:
        raise ValueError(
            "config.discriminator.compute: its heads have no such settings. Remove it; "
            f"config.{role}.compute is that of the network whose features they read"
        )
    if role not in scores:
        raise ValueError(unknown(f"role config.method.features={role!r}", role, scores))
    read = scores[role].net.config
    if not (hasattr(read, "dim") and hasattr(read, "depth")):
        raise ValueError(
            f"config.method.features={role!r}: a discriminator reads the tokens after some layers, "
            f"and {type(read).__name__} states neither their width, `dim`, nor the number of "
            "layers, `depth` (docs/teachers.md)"
        )
    model = construct(spec.model, "config.discriminator.model", dim=read.dim)
    if model.blocks[-1] >= read.depth:
        raise ValueError(
            f"config.discriminator.model.blocks={model.blocks} must be below the depth "
            f"{read.depth} of config.{role}"
        )
    return jax.eval_shape(lambda: weights.build(model))


def _stated(config, role, source):
    """The abstract Denoiser of `model`, `schedule` and `prediction`."""
    spec = config[role]
    if missing := [name for name in ("model", "schedule", "prediction") if name not in spec]:
        raise ValueError(
            f"config.{role}.weights='random' needs config.{role}.{missing[0]}, which a file of "
            "weights would state; configs/pretrain.py has an example"
        )
    return Denoiser(
        _model(config, role, source),
        construct(spec.schedule, f"config.{role}.schedule"),
        construct(spec.prediction, f"config.{role}.prediction"),
    )


def _model(config, role, source):
    """The abstract network of `model`."""
    fields = {**source.model_fields, **_compute(config, role)}
    model = construct(config[role].model, f"config.{role}.model", **fields)
    return jax.eval_shape(lambda: weights.build(model))


def _compute(config, role):
    """Fields of the network's config: how it computes, and what the method needs of a generator."""
    needed = getattr(config.method.cls, "network_fields", {}) if role == "generator" else {}
    stated = {k: v for k, v in config[role].get("compute", {}).items() if k not in STORAGE}
    return stated | needed


def _require_same(role, path, stored, stated):
    """Refuses a `model` that is not the network in the role's file."""
    found, wanted = type(stored).__name__, type(stated).__name__
    if found != wanted:
        raise ValueError(
            f"config.{role}.weights={path!r} holds a {found} network, but config.{role}.model "
            f"describes a {wanted}; change one of them"
        )
    if lines := weights.differing(weights.shapes(stated), weights.shapes(stored)):
        raise ValueError(
            f"config.{role}.model is not the network in {path}; change the model, or start from "
            f"config.{role}.weights='random':\n{lines}"
        )


def in_compute_dtype(denoiser):
    """An abstract frozen network in its compute dtype: only trained weights need float32."""
    dtype = jnp.dtype(denoiser.net.config.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), denoiser)


def frozen(config, role, denoiser):
    """An abstract network that is not trained, in the dtypes in which the devices keep it.

    Args:
        config: the config of the run.
        role: name of the role.
        denoiser: from `abstract`.

    Raises:
        ValueError: it is to be int8, and has no layers for which that is possible.
    """
    return memory.in_dtype(config, role, in_compute_dtype(denoiser))


def load(config, role, abstract, *, cast=False):
    """A role's Denoiser with arrays, placed as `abstract` says.

    Args:
        config: the config of the run.
        role: name of the role.
        abstract: its abstract Denoiser, from `placed`.
        cast: whether arrays of a file get the dtypes of `abstract` while they are read; if not,
            they have those of the file.
    """
    path = weights_path(config, role)
    if path is None:
        if role == DISCRIMINATOR:
            return weights.build(abstract.config, seed=seed(config, role))
        net = weights.build(abstract.net.config, seed=seed(config, role))
        return dataclasses.replace(abstract, net=net)
    places = abstract if cast else jax.tree.map(lambda x: x.sharding, abstract)
    in_int8 = any(map(is_int8, jax.tree.leaves(abstract, is_leaf=is_int8)))
    how = _compute(config, role) | {"int8": in_int8}
    several = experts(config, role)
    if several is None:
        return weights.denoiser(path, shardings=places, **how)
    nets = [
        weights.denoiser(
            path,
            part=part,
            shardings=dataclasses.replace(places, net=net),
            **how,
        )
        for part, net in zip(several.sources, places.net.nets, strict=True)
    ]
    return combine(nets, several.boundaries)


def seed(config, role):
    """The seed of a role's random weights; every role has its own, so that two differ."""
    return config.seed + config.method.cls.trainable.index(role)


def zeros(tree):
    """Arrays of zeros for an abstract tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def placed(shapes, nets, mesh):
    """`shapes` with shardings, by the rules of the families of `nets`.

    Args:
        shapes: an abstract tree, such as the frozen networks.
        nets: {role: Denoiser} whose arrays are in it.
        mesh: the devices.
    """
    shardings = weights.shardings(shapes, nets.values(), mesh) if nets else shapes
    return with_shardings(shapes, shardings)


def with_shardings(shapes, shardings):
    """An abstract tree with the shardings of another."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
