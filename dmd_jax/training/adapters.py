"""Adapters of a run: which roles train one, on which base, and how they become networks.

A role with `adapter=dict(cls=LoRA, rank=128, alpha=128)` trains the factors of low-rank changes
(Hu et al. 2021). Its own weights, the base, are frozen. Roles with the same weights have one base
in memory: the teacher's, where it is the same. Imports weights and the configuration.
"""

import dataclasses
import re
from typing import Any

import jax

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.layers import is_int8
from dmd_jax.training import memory, roles
from dmd_jax.training.configuration import BASE, construct
from dmd_jax.weights import adapter_files, adapters


@dataclasses.dataclass(frozen=True)
class LoRA:
    """An adapter: kernels W become W + alpha / rank A B, and only A and B, float32, are trained.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the change is multiplied by alpha / rank.
        matrices: regular expression of the paths of the kernels, such as "blocks/qkv/kernel".
        weights: a file to start from, of this library, diffusers or ComfyUI; None starts with A
            random and B zero, so that the first step's network is the base.

    Raises:
        ValueError: the rank is below 1, alpha not above 0, or the expression is none.
    """

    rank: int = 128
    alpha: float = 128.0
    matrices: str = r"blocks/.*kernel$"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank} must be 1 or more, alpha={self.alpha} above 0")
        try:
            re.compile(self.matrices)
        except re.error as error:
            raise ValueError(f"matrices={self.matrices!r} is no expression: {error}") from None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Bind:
    """`bind` of the train step: (trainable trees, frozen nets) -> the nets that a method sees.

    Attributes:
        nets: {role: Denoiser}, abstract, of the trainable roles.
        lora: {role: LoRA} of the roles that train an adapter.
        bases: {role: name of its base among the frozen nets}.
    """

    nets: dict[str, Denoiser]
    lora: dict[str, LoRA]
    bases: dict[str, str]

    def __call__(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        trained = {role: self.network(role, tree, frozen) for role, tree in trainable.items()}
        return {**frozen, **trained}

    def network(self, role: str, trained: Any, frozen: dict[str, Any]) -> Denoiser:
        """The Denoiser of a role's trained tree: the base and the adapter side by side."""
        return self._with(adapters.attach, role, trained, frozen)

    def merged(self, role: str, trained: Any, frozen: dict[str, Any]) -> Denoiser:
        """The Denoiser of a role's trained tree in plain float32 weights: base + adapter.

        Exports are `run.Run.merged`, where the base is never rounded.
        """
        return self._with(adapters.merge, role, trained, frozen)

    def _with(self, combine, role, trained, frozen):
        if role not in self.lora:
            return trained
        # The base's weights in the role's own settings: they may differ in `remat`.
        leaves = jax.tree.leaves(frozen[self.bases[role]], is_leaf=is_int8)
        base = jax.tree.unflatten(jax.tree.structure(self.nets[role]), leaves)
        net = combine(base.net, trained, self.lora[role].scale)
        return dataclasses.replace(base, net=net)

    @property
    def trainable(self) -> dict[str, Any]:
        """The abstract trees that are trained: {role: Denoiser or adapter}."""
        return {role: self.shapes(role) for role in self.nets}

    def shapes(self, role: str) -> Any:
        """The abstract tree that a role trains."""
        if role not in self.lora:
            return self.nets[role]
        spec = self.lora[role]
        return adapters.abstract(self.nets[role].net, spec.matrices, spec.rank)

    def rules(self) -> tuple:
        """The sharding rules of the trained trees: an adapter needs those of its kernels."""
        rules = []
        for role, network in self.nets.items():
            own = weights.sharding_rules(network)
            if role in self.lora:
                own = sharding.relevant(own, adapters.kernels(self.shapes(role)))
            rules += own
        return tuple(dict.fromkeys(rules))

    def load(self, config: Any, role: str, shape: Any) -> Any:
        """A role's trained tree at the first step, with the shardings of `shape`."""
        if role not in self.lora:
            return roles.load(config, role, shape)
        spec = self.lora[role]
        if spec.weights is None:
            seed = roles.seed(config, role)
            places = jax.tree.map(lambda x: x.sharding, shape)
            return jax.jit(lambda: adapters.random(shape, seed), out_shardings=places)()
        return adapter_files.load(spec.weights, shape, spec.scale)


def resolve(config, nets, frozen, *, files):
    """(Bind, frozen nets with the bases) of a run.

    Args:
        config: the config of the run.
        nets: {role: abstract Denoiser}, trainable.
        frozen: {role: abstract Denoiser} in their compute dtypes.
        files: False for a dry run: adapter files are not opened.

    Raises:
        ValueError: an adapter without base weights or of a role that is not trained; its pattern
            matches nothing; its file is of another base, rank or network.
    """
    for role in frozen:
        if "adapter" in config[role]:
            raise ValueError(f"config.{role}.adapter: this role is not trained")
    known = {_base_key(config, role, net): role for role, net in frozen.items()}
    lora, bases = {}, {}
    for role, net in nets.items():
        if "adapter" not in config[role]:
            continue
        lora[role] = construct(config[role].adapter, f"config.{role}.adapter")
        if roles.weights_path(config, role) is None:
            raise ValueError(
                f"config.{role}.adapter changes given weights, but config.{role}.weights is "
                "'random': name the file of the base, or remove the adapter"
            )
        base = roles.frozen(config, role, net)
        bases[role] = known.setdefault(_base_key(config, role, base), f"{role}{BASE}")
        frozen = {bases[role]: base} | frozen  # does not replace the teacher
    bind = Bind(nets, lora, bases)
    _check(config, bind, files)
    return bind, frozen


def _base_key(config, role, net):
    """What two bases that are one agree in: file, experts, memory, names, dtypes, shapes."""
    arrays = [(name, x.shape, x.dtype) for name, x in named_leaves(net).items()]
    source = roles.weights_path(config, role), roles.experts(config, role)
    return *source, memory.in_host(config, role), tuple(arrays)


def _check(config, bind, files):
    """Refuses patterns and files of adapters that do not fit their networks."""
    for role, spec in bind.lora.items():
        try:
            shapes = bind.shapes(role)
            if spec.weights is None or not files:
                continue
            adapter_files.check(spec.weights, shapes)
            about = adapter_files.header(spec.weights)
            if about and about["base"] != roles.fingerprint(config, role):
                raise ValueError(
                    f"{spec.weights} was trained on another base than "
                    f"{roles.weights_path(config, role)}, "
                    f"config.{role}.weights: name that base there"
                )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"config.{role}.adapter: {error}") from error
