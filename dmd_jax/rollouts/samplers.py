"""Samplers: few steps of a student, or many guided steps of a teacher.

    denoiser = weights.denoiser("mnist_teacher")
    images = draw_images(denoiser, ManyStep(50, guidance=1.25), labels=balanced(100, 10))

Imports the rollouts, the solvers and the rooms below.
"""

import dataclasses
import math
from functools import partial

import jax
import numpy as np

from dmd_jax import weights
from dmd_jax.data import to_uint8
from dmd_jax.devices import randomness, sharding
from dmd_jax.diffusion import solvers
from dmd_jax.diffusion.denoiser import guided
from dmd_jax.diffusion.schedule import check_step_times, check_steps, step_times
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.backward_simulation import backward_simulation
from dmd_jax.rollouts.block_ode import block_ode
from dmd_jax.rollouts.blocks import Layout
from dmd_jax.rollouts.ode import ode
from dmd_jax.rollouts.phased import check_phases, phased
from dmd_jax.rollouts.self_forcing import self_forcing

BATCH = 250  # images per call of the compiled sampler
SOLVERS = {"euler": ode, "unipc": solvers.unipc}


class Sampler:
    """How samples are drawn: a static, hashable value.

    Attributes:
        steps: number of steps.
        shift: time shift.
        name: of the network that is sampled, for tables and titles. It changes neither samples nor
            compiled programs, and is no part of the value.

    Raises:
        ValueError: the time shift is not above 0.
    """

    steps: int
    shift: float
    name: str

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift} must be above 0; 1 shifts nothing")

    def notes(self):
        """Entries for the header of a network's file, from which `sampler_for` makes the sampler.

        Of a network that is sampled in many steps, only what its training decides.
        """
        return {} if self.shift == 1 else {"shift": self.shift}

    @property
    def title(self):
        """As "student, 4 steps"."""
        return f"{self.name}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class FewStep(Sampler):
    """The sampler of a student: a call, fresh noise, the next call (`backward_simulation`).

    Attributes:
        times: times of the calls before the shift, descending from 1.
        shift, name: see `Sampler`.
        phases: of a student in phases, the number of calls of each: Euler steps without fresh
            noise, by the expert of the phase (`phased`).

    Raises:
        ValueError: the phases are not the calls at `times`.
    """

    times: tuple[float, ...]
    shift: float = 1.0
    phases: tuple[int, ...] | None = None
    name: str = dataclasses.field(default="student", repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.phases is not None:
            check_phases(self.times, self.phases)

    @property
    def steps(self):
        return len(self.times)

    @property
    def calls(self):
        """Network calls per sample."""
        return self.steps

    def notes(self):
        notes = {"times": self.times, "shift": self.shift}
        return notes if self.phases is None else notes | {"phases": self.phases}

    def __call__(self, denoiser, noise, cond, uncond, key, index):
        how = dict(times=self.times, shift=self.shift, schedule=denoiser.schedule)
        if self.phases is not None:
            return phased(denoiser, noise, cond, self.steps - 1, phases=self.phases, **how).x0
        return backward_simulation(
            denoiser,
            noise,
            cond,
            key,
            index=index,
            exit_step=self.steps - 1,
            **how,
        ).x0


@dataclasses.dataclass(frozen=True)
class CausalFewStep(Sampler):
    """The sampler of a causal student: block by block, a few calls each (`self_forcing`).

    Attributes:
        times: times of the calls before the shift, descending from 1.
        shift, name: see `Sampler`.
        causal, first_times, context_time: see `self_forcing`.

    Raises:
        ValueError: times do not descend, or a number is out of range.
    """

    times: tuple[float, ...]
    shift: float = 1.0
    causal: Causal = dataclasses.field(default=Causal())
    first_times: tuple[float, ...] | None = None
    context_time: float | None = 0.0
    name: str = dataclasses.field(default="student", repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        for times in (self.times, self.first_times or self.times):
            check_step_times(times)
        if self.context_time is not None and not 0.0 <= self.context_time < 1.0:
            raise ValueError(f"context_time={self.context_time} must be in [0, 1), or None")

    @property
    def steps(self):
        return len(self.times)

    @property
    def calls(self):
        """Network calls per block, the one that writes its context included."""
        return self.steps + (self.context_time is not None)

    def notes(self):
        notes = {"times": self.times, "shift": self.shift, "first_times": self.first_times}
        return notes | _context_notes(self)

    def __call__(self, denoiser, noise, cond, uncond, key, index):
        return self_forcing(
            denoiser,
            noise,
            cond,
            key,
            times=self.times,
            shift=self.shift,
            schedule=denoiser.schedule,
            causal=self.causal,
            first_times=self.first_times,
            context_time=self.context_time,
            last_step_share=1.0,
            graded=0,
            index=index,
        ).x0


@dataclasses.dataclass(frozen=True)
class ManyStep(Sampler):
    """The sampler of a teacher, or of any diffusion model: steps along the guided ODE.

    Attributes:
        steps: number of steps, evenly spaced before the shift.
        guidance: weight of classifier-free guidance; 1 disables it.
        shift, name: see `Sampler`.
        solver: "euler" (`ode.ode`) or "unipc" (`solvers.unipc`).

    Raises:
        ValueError: no steps, guidance that is not finite, an unknown solver, or a shift that is not
            above 0.
    """

    steps: int
    guidance: float = 1.0
    shift: float = 1.0
    solver: str = "euler"
    name: str = dataclasses.field(default="teacher", repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        _check_ode(self)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} must be one of {sorted(SOLVERS)}")

    @property
    def calls(self):
        """Network calls per sample; with guidance two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def __call__(self, denoiser, noise, cond, uncond, key, index):
        def guided_denoiser(x_t, t, cond):
            return guided(denoiser, x_t, t, cond, uncond, self.guidance)

        return SOLVERS[self.solver](
            guided_denoiser,
            noise,
            cond,
            times=step_times(self.steps),
            shift=self.shift,
            schedule=denoiser.schedule,
        )


@dataclasses.dataclass(frozen=True)
class CausalManyStep(Sampler):
    """The sampler of a causal network that is no student: the guided ODE, block by block.

    Attributes:
        steps: number of steps of a block, evenly spaced before the shift.
        guidance: weight of classifier-free guidance; 1 disables it.
        shift, name: see `Sampler`.
        causal, context_time: see `block_ode`.

    Raises:
        ValueError: no steps, guidance that is not finite, or a shift that is not above 0.
    """

    steps: int
    guidance: float = 1.0
    shift: float = 1.0
    causal: Causal = dataclasses.field(default=Causal())
    context_time: float = 0.0
    name: str = dataclasses.field(default="teacher", repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        _check_ode(self)

    @property
    def calls(self):
        """Network calls per block, the one that writes its context included."""
        return (self.steps + 1) * (1 if self.guidance == 1 else 2)

    def notes(self):
        return super().notes() | _context_notes(self)

    def __call__(self, denoiser, noise, cond, uncond, key, index):
        return block_ode(
            denoiser,
            noise,
            cond,
            uncond,
            key,
            times=step_times(self.steps),
            causal=self.causal,
            guidance=self.guidance,
            shift=self.shift,
            context_time=self.context_time,
            index=index,
        )


CAUSAL = CausalFewStep | CausalManyStep  # samplers that make a video block by block


def _check_ode(sampler):
    """Raises ValueError for steps or guidance with which no ODE can be solved."""
    check_steps(sampler.steps)
    if not math.isfinite(sampler.guidance):
        raise ValueError(f"guidance={sampler.guidance} must be finite; 1 disables it")


def _context_notes(sampler):
    """The notes of a causal sampler about what a block attends to."""
    return {"causal": dataclasses.asdict(sampler.causal), "context_time": sampler.context_time}


def few_step(
    times,
    steps,
    guidance,
    shift,
    causal=None,
    *,
    context_time=0.0,
    first_times=None,
    phases=None,
    name="student",
):
    """The sampler of a student in `steps` calls.

    Args:
        times, shift: the student's own.
        steps: calls per sample, or per block; see `fewer`.
        guidance: 1; it is in the weights of a student.
        causal: of a causal student; None for others.
        context_time, first_times: of a causal student, see `self_forcing`.
        phases: of a student in phases, see `FewStep`.
        name: of the network.

    Returns:
        FewStep or CausalFewStep.

    Raises:
        ValueError: guidance, no steps, or fewer steps of a student in phases.
    """
    if guidance != 1:
        raise ValueError(
            f"guidance is {guidance}, but guidance is in the weights of a student: leave it at 1"
        )
    if phases is not None and steps != len(times):
        raise ValueError(
            f"steps={steps}, but each of this student's {len(times)} calls belongs to one of its "
            f"phases={phases}: sample it in {len(times)}"
        )
    times = fewer(times, steps)
    if causal is None:
        return FewStep(times, shift, phases, name=name)
    return CausalFewStep(times, shift, causal, first_times, context_time, name=name)


def require_blocks(name, frames, sampler):
    """Raises ValueError where a causal sampler cannot make videos of so many latent frames.

    Args:
        name: of the number, for the message.
        frames: F.
        sampler: a `Sampler`; one that makes all frames at once makes any number.
    """
    if isinstance(sampler, CAUSAL):
        videos = jax.ShapeDtypeStruct((1, frames), np.float32)
        Layout.of(name, videos, sampler.causal, lone_first=True)


def fewer(times, steps):
    """The times of `steps` calls of a student: every n-th of `times`, or evenly spaced ones."""
    check_steps(steps)
    if len(times) % steps:
        return step_times(steps)
    return tuple(times)[:: len(times) // steps]


@partial(jax.jit, static_argnames=("sampler", "shape"))
def _batch(denoiser, cond, uncond, root, index, sampler, shape):
    noise_key, step_key = jax.random.split(root)
    cond, uncond, index = sharding.shard_batch((cond, uncond, index))
    noise = randomness.normal(noise_key, index, shape)
    return sampler(denoiser, noise, cond, uncond, step_key, index)


def draw(denoiser, sampler, cond, uncond, shape, seed=0, *, batch):
    """Draws samples for N conditions, in batches. On a mesh, its devices split each batch.

    The noise of sample i depends on `seed` and i only, not on the sampler, batch size or mesh.

    Args:
        denoiser: a Denoiser.
        sampler: a `Sampler`.
        cond, uncond: conditions and the unconditional input of guidance, pytrees with leading axis
            N.
        shape: of one sample, [...].
        seed: of the noise.
        batch: samples per call; on a mesh, padded to a multiple of its parts.

    Yields:
        float32 [n, ...] in order; n is `batch`, or fewer at the end.
    """
    num, root = len(jax.tree.leaves(cond)[0]), jax.random.key(seed)
    batch = sharding.even_batch(batch)
    for start in range(0, num, batch):
        index = np.arange(start, start + batch) % num  # one shape, one compilation
        batch_cond, batch_uncond = jax.tree.map(lambda x: x[index], (cond, uncond))  # noqa: B023
        x0 = _batch(denoiser, batch_cond, batch_uncond, root, index, sampler, tuple(shape))
        yield np.asarray(sharding.replicate(x0))[: num - start]


def draw_images(denoiser, sampler, labels, seed=0, *, batch=BATCH):
    """Images of a class-conditional network, drawn by `draw`.

    Args:
        labels: int32 [N].

    Returns:
        uint8 [N, H, W, C].
    """
    config, labels = denoiser.net.config, np.asarray(labels, np.int32)
    uncond = np.full_like(labels, config.uncond)
    parts = draw(denoiser, sampler, labels, uncond, config.sample_shape, seed, batch=batch)
    return np.concatenate([to_uint8(part) for part in parts])


def sampler_for(path, *, steps=None, guidance=None, shift=None, solver=None):
    """The sampler for the checkpoint at `path`, by the notes in its header.

    FewStep or CausalFewStep for a student, ManyStep or CausalManyStep for others.

    Args:
        steps: the student's own if None, or 50.
        guidance: not for students; 1 (no guidance) if None.
        shift: that of the checkpoint if None, or 1.
        solver: not for students; "euler" if None.

    Raises:
        ValueError: guidance or a solver for a student, or a number out of range.
    """
    notes = weights.notes(path)
    shift = notes.get("shift", 1.0) if shift is None else shift
    context = {}
    if "causal" in notes:
        time = notes.get("context_time", 0.0)
        context = {"causal": Causal(**notes["causal"]), "context_time": time}
    if "times" not in notes:
        steps = 50 if steps is None else steps
        guidance = 1.0 if guidance is None else guidance
        if not context:
            return ManyStep(steps, guidance, shift, "euler" if solver is None else solver)
        if solver not in (None, "euler"):
            raise ValueError(f"{path} is causal, and sampled by euler alone: drop --solver")
        return CausalManyStep(steps, guidance, shift, **context)
    if guidance is not None:
        raise ValueError(
            f"{path} is a distilled student: guidance is in its weights already; drop --guidance"
        )
    if solver is not None:
        raise ValueError(
            f"{path} is a distilled student, which adds fresh noise at each step and solves no "
            f"ODE: drop --solver={solver}"
        )
    times, first = tuple(notes["times"]), notes.get("first_times")
    if context:
        context["first_times"] = None if first is None else tuple(first)
    if "phases" in notes:
        context["phases"] = tuple(notes["phases"])
    steps = len(times) if steps is None else steps
    return few_step(times, steps, 1, shift, **context)


def balanced(num, num_classes):
    """Labels, int32 [num]: each class in turn."""
    return np.arange(num, dtype=np.int32) % num_classes
