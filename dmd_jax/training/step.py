"""TrainState and the pure train step: one compiled call for every method and network.

Imports jax, optax and the rooms below. Nothing here reads a clock, a file or a config.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from dmd_jax.devices import sharding

# Tags of the random streams of a step.
GENERATOR, CRITIC, CRITIC_ROLLOUT = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. Checkpoints store exactly this.

    Attributes:
        step: int32 [], the number of steps taken, skipped ones included.
        nets: {role: Denoiser}, trainable roles only ("generator", "fake_score"), float32 weights.
        ema: moving average of the generator, float32, with the generator's tree structure: the
            average that is evaluated and exported.
        opt_state: state of the optimizer of all roles.
        more_ema: {decay as text: average}, of `EMA.more_decays`; empty by default, so that such a
            state has the paths of one without this field.
        stream: what a method's rollouts go on from (`methods.long_tuning.Streams`); None for most.
            Its `batch_axes()` are the batch axis of each array, -1 where all samples share it.
    """

    step: Any
    nets: dict[str, Any]
    ema: Any
    opt_state: Any
    more_ema: dict[str, Any] = dataclasses.field(default_factory=dict)
    stream: Any = None


@dataclasses.dataclass(frozen=True)
class EMA:
    """Moving average of the generator: ema <- decay ema + (1 - decay) generator, at each update.

    Attributes:
        decay: of the average that is evaluated and exported by default.
        start: before this step the averages equal the generator.
        warmup: limits each decay to (1 + n) / (10 + n), n steps after `start`: early weights leave
            the average sooner.
        more_decays: decays of further averages, which are exported too, each to a file.

    Raises:
        ValueError: a decay is not in [0, 1) or appears twice, or the start is negative.
    """

    decay: float = 0.99
    start: int = 0
    warmup: bool = False
    more_decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        decays = (self.decay, *self.more_decays)
        if not all(0.0 <= decay < 1.0 for decay in decays) or self.start < 0:
            raise ValueError(
                f"decay={self.decay} and more_decays={self.more_decays} must be in [0, 1), "
                f"start={self.start} 0 or more"
            )
        if len(set(decays)) < len(decays):
            raise ValueError(f"more_decays={self.more_decays} repeats a decay: {decays}")

    @property
    def more(self) -> dict[str, float]:
        """{decay as text: decay} of the further averages."""
        return {str(decay): decay for decay in self.more_decays}

    def __call__(
        self,
        ema: PyTree[Float[Array, "..."]],
        generator: PyTree[Float[Array, "..."]],
        step: Int[Array, ""] | int,
        decay: float | None = None,
    ) -> PyTree[Float[Array, "..."]]:
        """The average after an update of the generator at `step`; `decay` is the first if None."""
        limit = self.decay if decay is None else decay
        if self.warmup:
            n = jnp.float32(step - self.start)
            limit = jnp.minimum(limit, (1.0 + n) / (10.0 + n))
        decay = jnp.where(step >= self.start, limit, 0.0)
        return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, generator)


def init_state(
    nets: Mapping[str, PyTree], tx: Any, ema: EMA = EMA(), stream: Any = None
) -> TrainState:
    """A TrainState at step 0, in new float32 buffers: donation never deletes a caller's weights.

    Args:
        nets: {role: Denoiser}, trainable roles only.
        tx: from `optimizer.per_role`.
        ema: which averages the state contains.
        stream: what the first step's rollouts go on from; None for most methods.
    """
    nets = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), nets)

    def average():
        return jax.tree.map(jnp.copy, nets["generator"])

    more = {name: average() for name in ema.more}
    return TrainState(jnp.zeros((), jnp.int32), nets, average(), tx.init(nets), more, stream)


def merge(trainable: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """`bind` for full fine-tuning: a method's networks are the trainable and the frozen ones."""
    return {**frozen, **trainable}


def train_step(
    state: TrainState,
    frozen: Mapping[str, PyTree],
    batch: Mapping[str, PyTree[Shaped[Array, "B ..."]]],
    key: Key[Array, ""],
    *,
    method: Any,
    tx: Any,
    update_generator: bool,
    bind: Callable[[Any, Any], dict[str, Any]] = merge,
    ema: EMA = EMA(),
    reuse_rollout: bool = True,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step: gradients of all roles at the same weights, then one optimizer update.

    Jit it with everything after `key` static, and donate the state. A run compiles it twice: with
    and without the generator's update.

    Args:
        state: TrainState.
        frozen: {role: Denoiser} of the roles that are not trained ("teacher").
        batch: {"cond", "uncond"} and what else the method needs ("data"), leading axis B.
        key: the root key of the run; the key of the step is folded from it and `state.step`.
        method: a dataclass of `methods/`.
        tx: from `optimizer.per_role`.
        update_generator: whether the generator is updated in this step. The host derives it from
            the step, so that weights, moments and averages are updated at the same steps.
        bind: (trainable nets, frozen nets) -> the nets that the method sees.
        ema: the averages of the generator, those that `state` was initialised for.
        reuse_rollout: in steps that update the generator, train the critic on the generator's
            rollout, under stop_gradient; otherwise on a new one.
        accumulate: number of parts into which the batch is split; equal results, less memory.

    Returns:
        (TrainState, metrics): metrics are float32 scalars by name. For each role with a gradient:
        "<role>/loss", "/grad_norm" (before clipping), "/update_norm", "/weight_norm" (after the
        update), "/skipped", and "/learning_rate" if `tx` has a schedule for the role. Norms are
        global L2 norms. If a role's loss or gradient is not finite, its weights, moments and
        averages stay as they were, and "/skipped" is 1.

    Raises:
        ValueError: `accumulate` does not divide the batch.
    """
    key = jax.random.fold_in(key, state.step)
    size = jax.tree.leaves(batch)[0].shape[0]
    # Random draws are sharded as the index is. Without this constraint every device would draw
    # and compute the whole batch, unless the networks or their conditioning are sharded.
    step = jnp.full(size, state.step)  # for each sample, as all of a batch
    batch = sharding.shard_batch({**batch, "index": jnp.arange(size), "step": step})
    axes = jax.tree.map(lambda _: 0, batch)
    if state.stream is not None:
        batch["stream"], axes["stream"] = state.stream, state.stream.batch_axes()
    one = partial(
        _gradients,
        state.nets,
        frozen,
        key=key,
        method=method,
        bind=bind,
        update_generator=update_generator,
        reuse_rollout=reuse_rollout,
    )
    grads, losses, observed, stream = (
        one(batch) if accumulate == 1 else _accumulate(one, batch, axes, size, accumulate)
    )
    metrics = method.metrics(observed) if observed else {}

    norms = {role: optax.tree.norm(grad) for role, grad in grads.items()}
    update = {role: jnp.isfinite(losses[role]) & jnp.isfinite(norms[role]) for role in grads}
    for role in grads:
        metrics |= {
            f"{role}/loss": losses[role],
            f"{role}/grad_norm": norms[role],
            f"{role}/skipped": 1.0 - update[role],
        }
    if not update_generator:
        grads["generator"] = jax.tree.map(jnp.zeros_like, state.nets["generator"])
        update["generator"] = False
    rates = tx.learning_rates(state.opt_state)
    updates, opt_state = tx.update(grads, state.opt_state, state.nets, update=update)
    nets = optax.apply_updates(state.nets, updates)
    for role in losses:
        metrics |= {
            f"{role}/update_norm": optax.tree.norm(updates[role]),
            f"{role}/weight_norm": optax.tree.norm(nets[role]),
        }
        if role in rates:
            metrics[f"{role}/learning_rate"] = rates[role]
    average, more = state.ema, state.more_ema
    if update_generator:

        def averaged(old, decay):
            new = ema(old, nets["generator"], state.step, decay)
            return jax.tree.map(partial(jnp.where, update["generator"]), new, old)

        average = averaged(state.ema, ema.decay)
        more = {name: averaged(state.more_ema[name], decay) for name, decay in ema.more.items()}
    return TrainState(state.step + 1, nets, average, opt_state, more, stream), metrics


def _gradients(trainable, frozen, batch, *, key, method, bind, update_generator, reuse_rollout):
    """Of a batch or a part of one: gradients, losses by role, per-sample values, and the stream."""
    keys = [jax.random.fold_in(key, tag) for tag in (GENERATOR, CRITIC, CRITIC_ROLLOUT)]
    nets = bind(trainable, frozen)
    grads, losses, observed, rollout = {}, {}, {}, None

    if update_generator:

        def generator_loss(generator):
            bound = bind({**trainable, "generator": generator}, frozen)
            return method.generator_loss(bound["generator"], bound, batch, keys[GENERATOR])

        (loss, (observed, rollout)), grad = jax.value_and_grad(generator_loss, has_aux=True)(
            trainable["generator"]
        )
        grads["generator"], losses["generator"] = grad, loss

    critics = {role: net for role, net in trainable.items() if role != "generator"}
    if critics:
        if rollout is None or not reuse_rollout:
            if rollout is not None and rollout.stream is not None:
                batch = {**batch, "stream": rollout.stream}
            rollout = method.rollout(nets["generator"], nets, batch, keys[CRITIC_ROLLOUT])

        def critic_loss(critics):
            bound = bind({**trainable, **critics}, frozen)
            trained = {role: bound[role] for role in critics}
            loss, seen = method.critic_loss(trained, bound, rollout, batch, keys[CRITIC])
            if not isinstance(loss, Mapping):
                return loss, (dict.fromkeys(critics, loss), seen)
            return sum(loss.values()), (loss, seen)

        (_, (loss, critic_observed)), grad = jax.value_and_grad(critic_loss, has_aux=True)(critics)
        observed = observed | critic_observed
        grads |= grad
        losses |= loss
    return grads, losses, observed, getattr(rollout, "stream", None)


def _accumulate(one, batch, axes, size, parts):
    """Mean gradients and losses over the parts of a batch; per-sample values and stream of all.

    Metrics are computed from the latter, once: a standard deviation over the batch is not the mean
    of those over its parts.
    """
    if size % parts:
        raise ValueError(f"accumulate={parts} does not divide the batch of {size}")

    def split(x, axis):
        if axis < 0:
            return jnp.broadcast_to(x, (parts, *x.shape))
        # Strided parts: contiguous ones would move samples between devices.
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        return jnp.moveaxis(x.reshape(*before, size // parts, parts, *after), axis + 1, 0)

    def join(x, axis):
        if axis < 0:  # one value, except where samples of some parts are not finite
            return x.max(0)
        before, after = x.shape[1 : axis + 1], x.shape[axis + 2 :]
        return jnp.moveaxis(x, 0, axis + 1).reshape(*before, size, *after)

    def add(total, part):
        grads, losses, observed, stream = one(part)
        return jax.tree.map(jnp.add, total, (grads, losses)), (observed, stream)

    batches = jax.tree.map(split, batch, axes)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, (observed, stream) = jax.lax.scan(add, zeros, batches)
    grads, losses = jax.tree.map(lambda x: x / parts, total)
    if stream is not None:
        stream = jax.tree.map(join, stream, axes["stream"])
    return grads, losses, jax.tree.map(lambda x: join(x, 0), observed), stream
