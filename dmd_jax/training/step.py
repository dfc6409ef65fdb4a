"""TrainState and the pure train step: every method, every network, one compiled call.

Imports jax, optax and the rooms below. Nothing here reads a clock, a file or a config.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmd_jax.devices import sharding

# Tags that separate a step's random streams.
GENERATOR, CRITIC, CRITIC_ROLLOUT = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. Checkpoints hold this and nothing else.

    Attributes:
        step: int32 [], steps taken, skipped ones included.
        nets: {role: Denoiser}, trainable roles only ("generator", "fake_score"), float32 weights.
        ema: the generator's moving average, float32, of the generator's tree.
        opt_state: state of the optimizer of all roles.
    """

    step: jax.Array
    nets: dict[str, Any]
    ema: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class EMA:
    """Moving average of the generator: ema <- decay ema + (1 - decay) generator, once an update.

    Before step `start` the average is the generator itself.

    Raises:
        ValueError: the decay is not in [0, 1), or the start is negative.
    """

    decay: float = 0.99
    start: int = 0

    def __post_init__(self):
        if not 0.0 <= self.decay < 1.0 or self.start < 0:
            raise ValueError(f"decay={self.decay} must be in [0, 1), start={self.start} 0 or more")

    def __call__(self, ema, generator, step):
        decay = jnp.where(step >= self.start, self.decay, 0.0)
        return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, generator)


def init_state(nets, tx):
    """A TrainState at step 0, of fresh float32 buffers: donation never eats a caller's weights."""
    nets = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), nets)
    ema = jax.tree.map(jnp.copy, nets["generator"])
    return TrainState(jnp.zeros((), jnp.int32), nets, ema, tx.init(nets))


def merge(trainable, frozen):
    """`bind` for full fine-tuning: the nets of a method are the trainable and the frozen ones."""
    return {**frozen, **trainable}


def train_step(
    state,
    frozen,
    batch,
    key,
    *,
    method,
    tx,
    update_generator,
    bind=merge,
    ema=EMA(),
    reuse_rollout=True,
    accumulate=1,
):
    """One step: gradients of all roles at the same weights, then one optimizer update.

    Jit it with everything after `key` static, and donate the state. Compiled twice in a run: with
    and without the generator's update.

    Args:
        state: TrainState.
        frozen: {role: Denoiser} that nothing changes ("teacher").
        batch: {"cond", "uncond"} and what the method wants ("data"), leading axis B.
        key: the run's root key; the step's own is folded from it and `state.step`.
        method: a dataclass of `methods/`.
        tx: from `optimizer.per_role`.
        update_generator: whether this is one of the generator's steps. The host derives it from the
            step, so that weights, moments and average follow one clock.
        bind: (trainable nets, frozen nets) -> the nets that the method sees.
        ema: the generator's average.
        reuse_rollout: on the generator's steps, train the critic on the generator's own rollout,
            under stop_gradient; otherwise on a fresh one.
        accumulate: parts into which the batch is split; equal results, less memory.

    Returns:
        (TrainState, metrics): metrics are float32 scalars by name. An update whose loss or gradient
        is not finite is skipped whole, weights, moments and average, and counted as
        "<role>/skipped".

    Raises:
        ValueError: `accumulate` does not divide the batch.
    """
    key = jax.random.fold_in(key, state.step)
    size = jax.tree.leaves(batch)[0].shape[0]
    # All draws follow the index. Unpinned, every device would draw, and compute, the whole batch
    # where neither the networks nor their conditions say otherwise.
    batch = sharding.shard_batch({**batch, "index": jnp.arange(size)})
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
    grads, losses, observed = (
        one(batch) if accumulate == 1 else _accumulate(one, batch, size, accumulate)
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
    updates, opt_state = tx.update(grads, state.opt_state, state.nets, update=update)
    nets = optax.apply_updates(state.nets, updates)
    average = state.ema
    if update_generator:
        moved = ema(state.ema, nets["generator"], state.step)
        average = jax.tree.map(partial(jnp.where, update["generator"]), moved, state.ema)
    return TrainState(state.step + 1, nets, average, opt_state), metrics


def _gradients(trainable, frozen, batch, *, key, method, bind, update_generator, reuse_rollout):
    """Gradients and losses by role, and per-sample values, of a batch or of one of its parts."""
    keys = [jax.random.fold_in(key, tag) for tag in (GENERATOR, CRITIC, CRITIC_ROLLOUT)]
    nets = bind(trainable, frozen)
    grads, losses, observed, made = {}, {}, {}, None

    if update_generator:

        def generator_loss(generator):
            bound = bind({**trainable, "generator": generator}, frozen)
            return method.generator_loss(bound["generator"], bound, batch, keys[GENERATOR])

        (loss, (observed, made)), grad = jax.value_and_grad(generator_loss, has_aux=True)(
            trainable["generator"]
        )
        grads["generator"], losses["generator"] = grad, loss

    critics = {role: net for role, net in trainable.items() if role != "generator"}
    if critics:
        if made is None or not reuse_rollout:
            made = method.rollout(nets["generator"], nets, batch, keys[CRITIC_ROLLOUT])

        def critic_loss(critics):
            bound = bind({**trainable, **critics}, frozen)
            seen = {role: bound[role] for role in critics}
            return method.critic_loss(seen, bound, made, batch, keys[CRITIC])

        (loss, critic_observed), grad = jax.value_and_grad(critic_loss, has_aux=True)(critics)
        observed = observed | critic_observed
        grads |= grad
        losses |= dict.fromkeys(critics, loss)
    return grads, losses, observed


def _accumulate(one, batch, size, parts):
    """Mean gradients and losses over the parts of a batch, and the per-sample values of all parts.

    Metrics are computed from the latter, once: a standard deviation over the batch is not the mean
    of those over its parts.
    """
    if size % parts:
        raise ValueError(f"accumulate={parts} does not divide the batch of {size}")

    def split(x):
        # Strided parts: each device keeps its own samples, where contiguous ones would have to
        # move.
        return jnp.moveaxis(x.reshape(size // parts, parts, *x.shape[1:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[2:])

    def add(total, part):
        grads, losses, observed = one(part)
        return jax.tree.map(jnp.add, total, (grads, losses)), observed

    batches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, observed = jax.lax.scan(add, zeros, batches)
    grads, losses = jax.tree.map(lambda x: x / parts, total)
    return grads, losses, jax.tree.map(join, observed)
