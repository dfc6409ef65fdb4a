"""Teacher forcing: all blocks of a video at once, each after the real blocks before it.

One pass over [context | noisy] gives the prediction for every block that a causal network makes
when the frames before it are known. Nothing is generated: this is how a causal network learns from
videos (`methods.causal_pretrain` and the starts of a student), and how its ODE is solved along one.

Imports jax, random draws, the denoiser, `blocks`, and the masks of the networks.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float32, Int, Key, PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Output
from dmd_jax.diffusion.schedule import Samples, Schedule, Times
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.blocks import Layout


class After(NamedTuple):
    """The condition of a teacher-forced call: a prompt, and the video whose blocks come before.

    A pytree, so that `denoiser.guided` pairs the contexts as it pairs the prompts.
    """

    cond: PyTree
    context: Samples  # [B, F, ...], at the context time; clean at 0


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """A causal network as the denoiser of whole videos; its condition is an `After`.

    x_t and the context are [B, F, ...]; t is [B], or [B, F] with one time in each block.

    Attributes:
        denoiser: its `predict` takes `causal`, `context` and `context_time`, as Wan's does.
        causal: blocks, window and sink.
        context_time: the time to which the context is noised, after the shift.
    """

    denoiser: Denoiser
    causal: Causal
    context_time: float = 0.0

    def predict(self, x_t: Samples, t: Times, after: After) -> Output:
        """One pass over [context | noisy]."""
        prediction, schedule = self.denoiser.prediction, self.denoiser.schedule
        time = jnp.full(x_t.shape[0], self.context_time, jnp.float32)
        context, time = prediction.inputs(after.context, time, schedule)
        return self.denoiser.predict(
            x_t, t, after.cond, causal=self.causal, context=context, context_time=time
        )

    def __call__(self, x_t: Samples, t: Times, after: After) -> Float32[Array, " B *data"]:
        """x0 alone; see `predict`."""
        return self.predict(x_t, t, after).x0


def block_of(frames: int, causal: Causal) -> np.ndarray:
    """The block of each frame of a video, int [F], from 0.

    Raises:
        ValueError: the video ends within a block.
    """
    shape = jax.ShapeDtypeStruct((1, frames), jnp.float32)
    layout = Layout.of("sample_shape", shape, causal, lone_first=True)
    sizes = [1] * layout.lone + [layout.size] * layout.count
    return np.repeat(np.arange(layout.total), sizes)


def context_at(
    time: float,
    video: Samples,
    schedule: Schedule,
    key: Key[Array, ""],
    index: Int[ArrayLike, " B"],
) -> Float32[Array, " B *data"]:
    """The context that a video is at a time after the shift: noised, or at 0 as it is.

    Args:
        index: the samples' positions in the global batch, of which the noise is a function.
    """
    if not time:
        return jnp.asarray(video, jnp.float32)
    eps = randomness.normal(key, index, video.shape[1:])
    return schedule.add_noise(video, eps, jnp.full(video.shape[0], time))


def check_video(sample_shape: tuple[int, ...], causal: Causal, context_time: float = 0.0) -> None:
    """Raises ValueError for samples without whole blocks, or a context that is noise alone."""
    if len(sample_shape) != 4:
        raise ValueError(f"sample_shape={sample_shape} is no (F, H, W, C): only videos have blocks")
    if not 0.0 <= context_time < 1.0:
        raise ValueError(f"context_time={context_time} must be in [0, 1); 0 is a clean context")
    block_of(sample_shape[0], causal)
