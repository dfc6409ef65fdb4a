"""Draws samples from a checkpoint: few steps of a student, or many guided steps of a teacher.

    python -m dmd_jax.sample --checkpoint=runs/dmd/generator.safetensors --out=samples.png
    python -m dmd_jax.sample --checkpoint=mnist_teacher --steps=50 --guidance=1.25 --out=samples.npz

Imports the rooms below, and report for its picture.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dmd_jax import checkpoint, randomness, report, rollout, sharding, weights
from dmd_jax.data import to_uint8
from dmd_jax.denoiser import guided
from dmd_jax.schedule import step_times

BATCH = 250  # samples per call of the compiled sampler


class Sampler:
    """How samples are made: a static value, whose `steps` and `name` name it in tables."""

    @property
    def title(self):
        """As "student, 4 steps"."""
        return f"{self.name}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class FewStep(Sampler):
    """A student's sampler: a call, fresh noise, the next call (`rollout.backward_simulation`).

    Attributes:
        times: times of the calls before the shift, descending from 1.
        shift: time shift.
    """

    name: ClassVar = "student"

    times: tuple[float, ...]
    shift: float = 1.0

    @property
    def steps(self):
        return len(self.times)

    @property
    def calls(self):
        """Network calls for one sample."""
        return self.steps

    def __call__(self, denoiser, noise, cond, key, index):
        return rollout.backward_simulation(
            denoiser,
            noise,
            cond,
            key,
            times=self.times,
            shift=self.shift,
            schedule=denoiser.schedule,
            index=index,
            exit_step=len(self.times) - 1,
        ).x0


@dataclasses.dataclass(frozen=True)
class ManyStep(Sampler):
    """A teacher's sampler: Euler steps along the guided ODE (`rollout.ode`).

    Attributes:
        steps: Euler steps, evenly spaced before the shift.
        guidance: weight of classifier-free guidance; 1 is none.
        shift: time shift.
    """

    name: ClassVar = "teacher"

    steps: int
    guidance: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more")

    @property
    def calls(self):
        """Network calls for one sample; guidance takes two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def __call__(self, denoiser, noise, cond, key, index):
        uncond = jnp.full_like(cond, denoiser.net.config.uncond)

        def guided_denoiser(x_t, t, cond):
            return guided(denoiser, x_t, t, cond, uncond, self.guidance)

        return rollout.ode(
            guided_denoiser,
            noise,
            cond,
            times=step_times(self.steps),
            shift=self.shift,
            schedule=denoiser.schedule,
        )


def fewer(times, steps):
    """The times of a student in `steps` calls: its own, evenly thinned, or evenly spaced anew."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")
    if len(times) % steps:
        return step_times(steps)
    return tuple(times)[:: len(times) // steps]


@partial(jax.jit, static_argnames="sampler")
def _batch(denoiser, cond, root, index, sampler):
    noise_key, step_key = jax.random.split(root)
    noise = randomness.normal(noise_key, index, denoiser.net.config.sample_shape)
    return sampler(denoiser, noise, cond, step_key, index)


def draw(denoiser, sampler, labels, seed=0, *, batch=BATCH):
    """Samples images for labels. Sample i has the same noise under every sampler and batch size.

    Args:
        denoiser: a Denoiser of images.
        sampler: FewStep or ManyStep.
        labels: int32 [N].
        seed: of the noise.

    Returns:
        uint8 [N, H, W, C].
    """
    labels = np.asarray(labels, np.int32)
    root, images = jax.random.key(seed), []
    for start in range(0, len(labels), batch):
        index = np.arange(start, start + batch) % len(labels)  # one shape, one compilation
        x0 = _batch(denoiser, labels[index], root, index, sampler)
        images.append(to_uint8(np.asarray(sharding.replicate(x0))))
    return np.concatenate(images)[: len(labels)]


def sampler_for(path, *, steps=None, guidance=None, shift=None):
    """The sampler that fits the file at `path`, from its notes and what the caller asks for.

    Raises:
        ValueError: a student is asked for guidance, which is in its weights already.
    """
    notes = weights.notes(path)
    if "times" not in notes:
        return ManyStep(
            50 if steps is None else steps, 1.0 if guidance is None else guidance, shift or 1.0
        )
    if guidance is not None:
        raise ValueError(
            f"{path} is a distilled student: guidance is in its weights already; drop --guidance"
        )
    times = tuple(notes["times"])
    return FewStep(fewer(times, len(times) if steps is None else steps), shift or notes["shift"])


def balanced(num, num_classes):
    """int32 [num] labels, every class in turn."""
    return np.arange(num, dtype=np.int32) % num_classes


FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("checkpoint", None, "A safetensors file, or the name of a shipped one.")
    flags.DEFINE_integer("num", 100, "How many samples.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", None, "Network steps; a checkpoint's own if not given.", lower_bound=1
    )
    flags.DEFINE_float("guidance", None, "Weight of a teacher's guidance; 1 is none.")
    flags.DEFINE_float("shift", None, "Time shift; a checkpoint's own if not given.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_string("out", "samples.png", "Where to: .png (a grid) or .npz (images, labels).")
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    del argv
    out = Path(FLAGS.out)
    try:
        if out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out={out}: the ending says the format, .png or .npz")
        checkpoint.check_writable(out.parent)
        sampler = sampler_for(
            FLAGS.checkpoint, steps=FLAGS.steps, guidance=FLAGS.guidance, shift=FLAGS.shift
        )
        denoiser = weights.load(FLAGS.checkpoint)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    labels = balanced(FLAGS.num, denoiser.net.config.num_classes)
    start = time.time()
    images = draw(denoiser, sampler, labels, FLAGS.seed)
    if out.suffix == ".npz":
        np.savez_compressed(out, images=images, labels=labels)
    else:
        report.save_grid(out, images, denoiser.net.config.num_classes)
    print(f"{len(images)} samples, {sampler}, {time.time() - start:.1f} s: {out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
