"""The FLOPs and forward passes of a run: a measure of its cost that is the same on every machine.

    cost(run)             Cost, from shapes alone
    cost(run).lines()     lines of a report

Imports `flops` and the rooms below.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from dmd_jax.data import ImagePairs, OdePairs
from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.training import flops

TEXT_TOKENS = 512  # assumed length of a prompt if its embeddings are missing, as in a dry run


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products and convolutions, all devices together.

    Attributes:
        step: {update_generator: FLOPs of a step}, expected values where a step draws its length.
        forward: FLOPs of one forward pass of the generator over a batch.
        steps: {update_generator: number of such steps in the run}.
        batch_size: samples in a batch.
    """

    step: dict[bool, int]
    forward: int
    steps: dict[bool, int]
    batch_size: int

    @property
    def run(self) -> int:
        """FLOPs of all steps of the run."""
        return sum(self.step[kind] * self.steps[kind] for kind in self.step)

    def lines(self) -> dict[str, str]:
        """The lines of a report or a dry run, by name."""
        names = {True: "with the generator's update", False: "without"}
        return {
            "FLOPs of a step": ", ".join(f"{si(n)} {names[kind]}" for kind, n in self.step.items()),
            "FLOPs of the run": f"{si(self.run)} in {sum(self.steps.values()):,} steps",
            "forward passes": (
                f"the run costs as much as {round(self.run / self.forward):,} of the generator "
                f"over {self.batch_size} samples, at {si(self.forward)} each"
            ),
        }


def cost(run) -> Cost:
    """The cost of a `run.Run`: its steps are traced, nothing is computed.

    A rollout's length is random; it counts as its expected value (`DMD.trips`).
    Judging and the report are not included.
    """
    config = run.config
    batch, key = batch_shape(run), jax.eval_shape(lambda: jax.random.key(0))
    numbers = [run.updates_generator(step) for step in range(config.steps)]
    steps = {kind: numbers.count(kind) for kind in (True, False) if kind in numbers}
    count = partial(flops.count, trips=getattr(run.method, "trips", {}))
    state, frozen = run.state_shape(), run.frozen_shape()
    generator = jax.eval_shape(run.bind, state.nets, frozen)["generator"]
    with jax.set_mesh(run.mesh):
        step = {
            kind: count(partial(run.step, update_generator=kind), state, frozen, batch, key)
            for kind in steps
        }
        x = jax.ShapeDtypeStruct((config.batch_size, *run.source.sample_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)
        forward = count(type(generator).__call__, generator, x, t, batch["cond"])
    return Cost(step, forward, steps, config.batch_size)


def batch_shape(run):
    """A global batch of the run, as jax.ShapeDtypeStructs.

    Missing prompts (in a dry run) count as TEXT_TOKENS long; latents and trajectories may be
    missing too.
    """
    size, source = run.config.batch_size, run.source
    try:
        rows = (source.examples if run.method.uses_data else source.conditions)([0])
    except FileNotFoundError:
        rows = _missing_row(run)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows)


def _missing_row(run):
    """A row of a batch whose files are missing, as jax.ShapeDtypeStructs."""
    source, model = run.source, run.nets["generator"].net.config
    sample = jax.ShapeDtypeStruct((1, *source.sample_shape), jnp.float32)
    cond = jax.ShapeDtypeStruct((1,), jnp.int32)  # of pairs of images: a class
    if hasattr(model, "text_dim"):
        cond = jax.ShapeDtypeStruct((1, TEXT_TOKENS, model.text_dim), jnp.bfloat16)
    row = {"cond": cond, "uncond": cond}
    if not run.method.uses_data:
        return row
    if not isinstance(source, ImagePairs):
        row["data"] = sample
    if isinstance(source, ImagePairs | OdePairs):  # at the times that the method will ask for
        times = getattr(run.method, "times", ())
        times = [float(shift_time(t, run.method.shift)) for t in times]
        row["trajectory"] = dict.fromkeys((*times, 0.0), sample)
    return row


def si(value: float) -> str:
    """A number in three digits and an SI prefix: 1.7e13 is "17 T"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {prefixes[power]}"
