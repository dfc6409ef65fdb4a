"""Optimizers: one optax transform for all roles; each role has its own settings and schedule.

    tx = per_role({"generator": AdamW(2e-4).transform(500), "fake_score": Muon().transform(1000)})

Imports jax, optax and the names of paths. docs/training.md shows how to add an optimizer.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dmd_jax.devices import host_memory
from dmd_jax.devices.paths import path_name

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Base of all optimizers: gradient clipping, decoupled weight decay, learning rate schedule.

    A subclass adds its numbers as fields and defines `direction`.

    Attributes:
        learning_rate: peak learning rate.
        clip: largest global norm of this role's gradient; None disables clipping.
        warmup: updates of this role over which the rate rises linearly from zero.
        decay: "constant", "linear" or "cosine": how the rate falls to `end_value` after the warmup.
        end_value: learning rate at the end of the decay, absolute, as in optax's schedules.
        weight_decay: decoupled weight decay, of the parameters whose path matches `decayed`.
        decayed: regular expression, searched in paths such as "net/blocks/qkv/kernel".
        memory: "host" keeps the optimizer's state in the memory of the host between its updates;
            None in that of the devices.

    Raises:
        ValueError: an unknown `decay` or `memory`, a bad regular expression, or a number out of its
            range.
    """

    learning_rate: float = 1e-4
    clip: float | None = 10.0
    warmup: int = 0
    decay: str = "constant"
    end_value: float = 0.0
    weight_decay: float = 0.0
    decayed: str = r"(kernel|embedding)$"
    memory: str | None = None

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r}: use 'constant', 'linear' or 'cosine'")
        for name in ("learning_rate", "weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0.0 <= self.end_value <= self.learning_rate:
            raise ValueError(
                f"end_value={self.end_value} must be in [0, learning_rate={self.learning_rate}]"
            )
        if self.end_value and self.decay == "constant":
            raise ValueError(
                f"end_value={self.end_value} has no effect with decay='constant': "
                "use 'linear' or 'cosine', or end_value=0"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be above 0; None disables clipping")
        _require_pattern("decayed", self.decayed)
        host_memory.check("memory", self.memory)

    def direction(self) -> optax.GradientTransformation:
        """The optax transform between clipping and weight decay, without the learning rate."""
        raise NotImplementedError(f"{type(self).__name__} defines no direction()")

    def schedule(self, updates: int) -> Schedule:
        """The learning rate as a function of this role's update count, of `updates` in total."""
        rest = max(updates - self.warmup, 1)
        peak, end = self.learning_rate, self.end_value
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, end, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest, end / peak if end else 0.0),
        }[self.decay]
        if not self.warmup:
            return after
        rise = optax.linear_schedule(0.0, peak, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def transform(self, updates: int) -> optax.GradientTransformation:
        """The whole optax transform; `updates` is the number of updates of this role."""
        # Nested as optax.adamw nests: the state's paths are the names in stored checkpoints.
        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            optax.chain(
                self.direction(),
                optax.add_decayed_weights(self.weight_decay, self._decayed),
                optax.scale_by_learning_rate(self.schedule(updates)),
            ),
        )

    def _decayed(self, params: PyTree) -> PyTree[bool]:
        """A tree of booleans: which parameters weight decay applies to."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: re.search(self.decayed, path_name(path)) is not None, params
        )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2).

    Attributes:
        b1, b2: decay rates of the first and second moments.
        eps: added to the root of the second moment.

    Raises:
        ValueError: as `Optimizer`, or a decay rate that is not in [0, 1).
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.b1 < 1.0 and 0.0 <= self.b2 < 1.0):
            raise ValueError(f"b1={self.b1} and b2={self.b2} must be in [0, 1)")

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class Muon(AdamW):
    """Muon (Jordan 2024) for the matrices of the blocks, AdamW for all other parameters.

    The momentum of each matrix is orthogonalised by a Newton-Schulz iteration. Blocks are stacked:
    a kernel [L, in, out] is L matrices, each orthogonalised by itself. Embeddings, patch and output
    layers stay with AdamW. Updates are scaled by `rms` sqrt(max(in, out)) (Liu et al. 2025, section
    2.2), so that learning rates and weight decay of AdamW carry over.

    Attributes:
        beta: decay rate of the momentum of matrices, Nesterov's.
        rms: root mean square of an update of a matrix, before the learning rate.
        matrices: regular expression of the paths of the matrices; the last two axes are in and out.

    Raises:
        ValueError: as `AdamW`; `beta` is not in [0, 1), or `rms` is not above 0. From `init`:
            `matrices` matches no parameter, or one with less than two axes.
    """

    beta: float = 0.95
    rms: float = 0.2
    matrices: str = r"blocks/.*kernel$"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.beta < 1.0 and self.rms > 0.0):
            raise ValueError(f"beta={self.beta} must be in [0, 1), rms={self.rms} above 0")
        _require_pattern("matrices", self.matrices)

    def direction(self) -> optax.GradientTransformation:
        def axes(params):
            return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=self.beta, weight_dimension_numbers=axes),
            optax.stateless_with_tree_map(
                lambda update, _: self.rms * max(update.shape[-2:]) ** 0.5 * update
            ),
        )
        return optax.partition({"muon": muon, "adam": super().direction()}, self._labels)

    def _labels(self, params: PyTree) -> PyTree[str]:
        """A tree of names: which of the two transforms updates each parameter."""

        def label(path, x):
            if not re.search(self.matrices, path_name(path)):
                return "adam"
            if x.ndim < 2:
                raise ValueError(
                    f"matrices={self.matrices!r} matches {path_name(path)} {x.shape}; a matrix has "
                    "two axes or more"
                )
            return "muon"

        labels = jax.tree_util.tree_map_with_path(label, params)
        if "muon" not in jax.tree.leaves(labels):
            raise ValueError(f"matrices={self.matrices!r} matches no parameter; use AdamW instead")
        return labels


def _require_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from None


class RoleTransform(NamedTuple):
    """An optax transform of {role: parameters}, and the current learning rate of each role.

    Attributes:
        init: as in optax.
        update: as in optax, with `update={role: bool}` as an additional argument.
        learning_rates: state -> {role: learning rate of its next update, float32 []}.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    learning_rates: Callable[[Any], dict[str, Float[Array, ""]]]


def per_role(
    transforms: Mapping[str, optax.GradientTransformation],
    schedules: Mapping[str, Schedule] | None = None,
) -> RoleTransform:
    """Joins {role: transform} into one transform, whose updates are gated by role.

    `tx.update(grads, state, params, update={role: bool})` skips each role whose flag is False: its
    update is zero, and moments and counts stay (a zero gradient would still change Adam's). State
    in the memory of the host (`in_host`) is on the devices during its update only.

    Args:
        transforms: {role: transform}.
        schedules: {role: schedule}, as given to optax.scale_by_learning_rate in `transforms`; roles
            without one have no entry in `learning_rates`.
    """

    def gated(role, transform):
        return optax.conditionally_mask(
            _fetched(transform),
            lambda _, *, update, **__: update[role],
            forward_extra_args=True,
        )

    tx = optax.multi_transform(
        {role: gated(role, transform) for role, transform in transforms.items()},
        {role: role for role in transforms},
    )

    def learning_rates(state):
        counts = {role: _update_count(state.inner_states[role]) for role in schedules or {}}
        return {
            role: jnp.asarray(schedules[role](count), jnp.float32)
            for role, count in counts.items()
            if count is not None
        }

    return RoleTransform(tx.init, tx.update, learning_rates)


def _fetched(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform, which fetches its state from host memory and brings it back."""
    inner = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **more):
        updates, new = inner.update(updates, host_memory.to_device(state), params, **more)
        return updates, host_memory.back(new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def in_host(state: Any, roles: Collection[str]) -> Any:
    """An abstract state of `per_role`, with shardings: that of `roles` in the host's memory."""
    inner = {
        role: host_memory.placed(tree) if role in roles else tree
        for role, tree in state.inner_states.items()
    }
    return state._replace(inner_states=inner)


def _update_count(state: PyTree) -> Any:
    """The update count that the schedule in a role's optimizer state reads; None without one."""
    kind = optax.ScaleByScheduleState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return next((x.count for x in leaves if isinstance(x, kind)), None)
