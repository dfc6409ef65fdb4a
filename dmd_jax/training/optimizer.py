"""One optax transform for all roles: each role has its own AdamW, clipping, decay and schedule.

Imports jax and optax; knows roles only as names.
"""

import dataclasses
import re

import jax
import optax

from dmd_jax.devices.paths import path_name


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) behind a clip of the global gradient norm.

    Attributes:
        learning_rate: the highest rate.
        b1, b2, eps: moments' decays and Adam's epsilon.
        weight_decay: decoupled decay, on the weights whose path `decayed` matches.
        decayed: regular expression, searched in paths such as "net/blocks/qkv/kernel".
        clip: largest global norm of this role's gradient; None for no clipping.
        warmup: updates of this role over which the rate rises from zero.
        decay: "constant", "linear" or "cosine": how the rate falls to zero over this role's
            updates.

    Raises:
        ValueError: an unknown `decay`, or a number out of its range.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: str = r"(kernel|embedding)$"
    clip: float | None = 10.0
    warmup: int = 0
    decay: str = "constant"

    def __post_init__(self):
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r}: use 'constant', 'linear' or 'cosine'")
        for name in ("learning_rate", "weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not (0.0 <= self.b1 < 1.0 and 0.0 <= self.b2 < 1.0):
            raise ValueError(f"b1={self.b1} and b2={self.b2} must be in [0, 1)")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be above 0; None clips nothing")

    def schedule(self, updates):
        """The learning rate as a function of this role's own update count, of `updates` in all."""
        rest = max(updates - self.warmup, 1)
        after = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
        }[self.decay]
        if not self.warmup:
            return after
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def transform(self, updates):
        """The optax transform; `updates` is how many updates this role will make."""

        def decayed(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: re.search(self.decayed, path_name(path)) is not None, params
            )

        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.schedule(updates),
                self.b1,
                self.b2,
                self.eps,
                weight_decay=self.weight_decay,
                mask=decayed,
            ),
        )


def per_role(transforms):
    """Joins {role: transform} into one, whose updates are gated role by role.

    `tx.update(grads, state, params, update={role: bool})` holds a role whose flag is False
    entirely: no update, and moments and counts stay (a zero gradient would still move Adam's).
    """

    def gated(role, transform):
        return optax.conditionally_mask(
            transform, lambda _, *, update, **__: update[role], forward_extra_args=True
        )

    return optax.multi_transform(
        {role: gated(role, transform) for role, transform in transforms.items()},
        {role: role for role in transforms},
    )
