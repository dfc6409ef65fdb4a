"""Trajectories of a teacher's ODE: for `methods.causal_ode` and, of images, for `methods.dmd1`.

All functions write folders: of videos for `data.OdePairs`, of images for `data.ImagePairs`. Imports
`sampling` and the rooms below.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import weights
from dmd_jax.data import Prompts, embeddings, self_forcing_lmdb, trajectories
from dmd_jax.data.latents import Latents
from dmd_jax.devices import randomness, sharding
from dmd_jax.devices.disk import check_writable, local_path
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser, guided
from dmd_jax.diffusion.schedule import (
    check_step_times,
    check_steps,
    check_times,
    shift_time,
    step_times,
)
from dmd_jax.models.attention import Causal
from dmd_jax.pipelines.sampling import load_denoiser
from dmd_jax.rollouts.ode import check_kept, trajectory
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced, check_video

TIMES = (1.0, 0.75, 0.5, 0.25)
IMAGES = 250  # in one call


@dataclasses.dataclass(frozen=True)
class Solution:
    """How a teacher's ODE is solved.

    Attributes:
        causal: blocks, window and sink of the teacher; None for a teacher of images.
        times: the stored points before the shift; among the times of the steps.
        shift: time shift of the steps.
        steps: Euler steps.
        guidance: weight of the teacher's guidance (see `denoiser.guided`).
        seed: of the noise.

    Raises:
        ValueError: a number is out of range, or a stored point lies between two steps.
    """

    causal: Causal | None = Causal()
    times: tuple[float, ...] = TIMES
    shift: float = 5.0
    steps: int = 48
    guidance: float = 6.0
    seed: int = 0

    def __post_init__(self):
        check_step_times(self.times)
        check_times(shift=self.shift, clip=(0.0, 1.0))
        check_steps(self.steps)
        check_kept(step_times(self.steps), self.times)

    @property
    def levels(self):
        """The times of the stored points, after the shift."""
        return [float(shift_time(t, self.shift)) for t in self.times]


# From noise to the end in one call of the student.
OF_IMAGES = Solution(causal=None, times=(1.0,), shift=1.0, steps=50, guidance=1.0)


def solve(
    checkpoint: str | PathLike,
    embedded: str | PathLike,
    encoded: str | PathLike,
    out: str | PathLike,
    how: Solution,
    *,
    batch: int = 1,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda line: None,
) -> trajectories.Trajectories:
    """Solves a causal teacher's ODE along every real video, each block after the real ones.

    (Causal-Forcing, arXiv 2602.02214.) On the current mesh (`jax.set_mesh`) or the first device.

    Args:
        checkpoint: the teacher, trained by `methods.causal_pretrain.TeacherForcing`.
        embedded, encoded: folders of the captions and the latents of the videos
            (`pipelines.precompute`).
        out: the folder of the trajectories. A second call resumes.
        how: which ODE.
        batch: videos in one call.
        dtype: in which the teacher computes.
        progress: is called with a line of text after each batch.

    Raises:
        FileNotFoundError, ValueError: something is missing or damaged, does not fit together, or
            `out` holds other trajectories or cannot be written to.
    """
    real = Latents(local_path(encoded))
    source, out = Prompts(str(embedded), real.shape, str(encoded)), local_path(out)
    source.open()
    check_video(real.shape, how.causal)
    _require_trained(checkpoint, how.causal)
    check_writable(out)
    teacher = load_denoiser(checkpoint, dtype=dtype)
    source.require_fit(f"the teacher at {checkpoint}", teacher.net.config)
    work = _Work(teacher, how, real.shape, real.prompt.tolist(), source.examples, batch, progress)
    return work.write(out, videos=real.source)


def solve_images(
    checkpoint: str | PathLike,
    out: str | PathLike,
    how: Solution = OF_IMAGES,
    *,
    num: int = 10_000,
    batch: int = IMAGES,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda line: None,
) -> trajectories.Trajectories:
    """Solves a teacher's ODE from noises, for all classes in turn (DMD, Yin et al. 2023).

    On the current mesh (`jax.set_mesh`) or the first device. For the other arguments and errors,
    see `solve`.

    Args:
        checkpoint: a teacher of images of a class.
        num: trajectories.
    """
    check_writable(out := local_path(out))
    teacher = load_denoiser(checkpoint, dtype=dtype)
    classes, shape = teacher.net.config.num_classes, teacher.net.config.sample_shape

    def conditions(index):
        labels = np.int32(index % classes)
        return {"cond": labels, "uncond": np.full_like(labels, classes)}

    labels = conditions(np.arange(num))["cond"].tolist()
    work = _Work(teacher, how, shape, labels, conditions, batch, progress)
    return work.write(out, num=num)


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """The trajectories of one call, solved in batches and written as rows.

    Attributes:
        teacher: the Denoiser.
        how: which ODE.
        shape: of one sample.
        conditions: for each trajectory, the row of its prompt or its label.
        examples: int [n] -> {"cond", "uncond" and, of videos, "data"} of these trajectories.
        batch: trajectories in one call, before it is made even for the devices.
        progress: as for `solve`.
    """

    teacher: Denoiser
    how: Solution
    shape: tuple[int, ...]
    conditions: list[int]
    examples: Callable[[np.ndarray], dict]
    batch: int
    progress: Callable[[str], None]

    def write(self, out, **source):
        """Solves what is missing in the folder, and opens it."""
        count, batch, start = len(self.conditions), sharding.even_batch(self.batch), time.time()
        root, what = jax.random.key(self.how.seed), "image" if self.how.causal is None else "video"

        @functools.lru_cache(maxsize=1)
        def solved(first):
            index = np.arange(first, first + batch) % count  # one shape, one compilation
            points = _solve(self.teacher, root, index, self.examples(index), self.how, self.shape)
            points = np.asarray(sharding.replicate(points))
            done = min(first + batch, count)
            self.progress(f"{what} {done} of {count}, {time.time() - start:.1f} s")
            return points

        def row(number):
            return solved(number - number % batch)[number % batch]

        digest = weights.digest(named_leaves(self.teacher.net).items())
        trajectories.write(
            out,
            enumerate(self.conditions),
            row,
            self.shape,
            levels=self.how.levels,
            source=dataclasses.asdict(self.how) | {"teacher": digest} | source,
        )
        return trajectories.Trajectories(out)


def _require_trained(checkpoint, causal):
    """Refuses other blocks, or another context, than those that the teacher's file states."""
    notes = weights.notes(checkpoint)
    if "causal" in notes and (trained := Causal(**notes["causal"])) != causal:
        raise ValueError(
            f"{checkpoint} was trained with {trained}, not {causal}: say so by --frames_per_block, "
            "--first_alone, --window and --sink"
        )
    if time := notes.get("context_time"):
        raise ValueError(
            f"{checkpoint} was trained with context_time={time}, and trajectories have a clean "
            "context: use CausalConsistency, or a teacher with context_time=0"
        )


@functools.partial(jax.jit, static_argnames=("how", "shape"))
def _solve(teacher, root, index, examples, how, shape):
    """float32 [B, T, *shape]: the stored points, the end and, of videos, the real one."""
    index, examples = sharding.shard_batch((index, examples))
    network, cond, uncond = teacher, examples["cond"], examples["uncond"]
    if how.causal is not None:
        network = TeacherForced(teacher, how.causal)
        cond, uncond = (After(each, examples["data"]) for each in (cond, uncond))

    def denoiser(x_t, t, cond):
        return guided(network, x_t, t, cond, uncond, how.guidance)

    points = trajectory(
        denoiser,
        randomness.normal(root, index, shape),
        cond,
        times=step_times(how.steps),
        kept=how.times,
        schedule=teacher.schedule,
        shift=how.shift,
    )
    if how.causal is None:
        return points
    return jnp.concatenate([points, examples["data"][:, None]], axis=1)


def convert(
    lmdb: str | PathLike,
    embedded: str | PathLike,
    out: str | PathLike,
    *,
    times: Sequence[float] = TIMES,
    shift: float = 8.0,
    progress: Callable[[str], None] = lambda line: None,
) -> trajectories.Trajectories:
    """Converts the trajectories that Self-Forcing or Causal-Forcing stored as LMDB.

    Args:
        lmdb: the folder of the database, or of its parts.
        embedded: the folder that `precompute.embed_prompts` wrote for `out`/prompts.txt, which this
            function writes first.
        out: the folder of the trajectories. A second call resumes.
        times, shift: those of the stored points; Self-Forcing's teacher had a shift of 8.
        progress: is called with a line of text.

    Raises:
        FileNotFoundError, ValueError: as `solve`; or a prompt is not embedded, or the database has
            another number of points.
        ImportError: the package lmdb is missing.
    """
    stored, out = self_forcing_lmdb.Trajectories(local_path(lmdb)), local_path(out)
    levels = [float(shift_time(t, shift)) for t in times]
    check_writable(out)
    listed, prompts = out / "prompts.txt", stored.prompts
    listed.write_text("".join(f"{prompt}\n" for prompt in dict.fromkeys(prompts)))
    progress(f"{len(prompts)} trajectories; their prompts: {listed}")
    texts = embeddings.Embeddings(local_path(embedded))
    rows = {prompt: row for row, prompt in enumerate(texts.prompts)}
    if absent := [prompt for prompt in prompts if prompt not in rows]:
        raise ValueError(
            f"{embedded} lacks {len(absent)} of {len(prompts)} prompts, as {absent[0][:60]!r}: "
            f"embed them with `python -m dmd_jax.embed --prompts={listed} ...`"
        )

    def points(number):
        return stored.points(number, len(levels))

    numbered = ((i, rows[prompt]) for i, prompt in enumerate(prompts))
    made_by = {"lmdb": stored.name, "count": len(prompts)}
    trajectories.write(out, numbered, points, stored.shape, levels=levels, source=made_by)
    return trajectories.Trajectories(out)
