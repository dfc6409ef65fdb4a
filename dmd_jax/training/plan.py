"""A run, planned: its train steps compiled for devices that are not here, and what they would need.

    chip, devices = topologies.load("v5p:4x4x4")
    print(plan(config, chip, devices).table())

The compiler is the real one and the program is the run's own, so bytes are the compiler's word.
Times are estimates from the numbers of the chip: no program is faster. Imports `run`, `loop`,
`cost`, `hlo` and `configuration`.
"""

import dataclasses
import math
import os
import re

import jax
import numpy as np

from dmd_jax.devices import host_memory, sharding
from dmd_jax.devices.disk import first_line
from dmd_jax.devices.paths import tree_bytes
from dmd_jax.training import loop
from dmd_jax.training.configuration import compute_dtypes
from dmd_jax.training.cost import batch_shape, cost, si
from dmd_jax.training.hlo import Program, Traffic
from dmd_jax.training.run import build

NAMES = {True: "with the generator's update", False: "without"}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Step:
    """One variant of the train step. Bytes and seconds are those of one device.

    Attributes:
        count: such steps in the run.
        flops: of all devices together.
        refusal: why the compiler refused it; "" if it did not, and what follows is zero if it did.
        temporaries: activations, gradients and everything else that lives within the step.
        total: what the step needs: all that the device keeps between steps, read by this step or
            not, the temporaries, and results that do not take the place of an argument.
        traffic: bytes that the step moves.
        seconds: {"FLOPs", "memory", "links", "network", "host": the least time that each allows};
            empty if the peaks of the device are not known.
    """

    count: int
    flops: int
    refusal: str = ""
    temporaries: int = 0
    total: int = 0
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def needed(self):
        """`total`; of a refused step the bytes that the compiler names, 0 if it names none."""
        found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", self.refusal)
        if found is None:
            return self.total
        return int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))

    @property
    def least_seconds(self):
        """Time of a step in which everything overlaps."""
        return max(self.seconds.values(), default=math.nan)

    @property
    def most_seconds(self):
        """Time of a step at the same peaks in which nothing overlaps."""
        return sum(self.seconds.values()) if self.seconds else math.nan


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs, device by device.

    Attributes:
        kind: of the devices, by their maker: "TPU v5".
        devices: number of them.
        mesh: {axis: devices along it}.
        batch_size, accumulate: of the config.
        available: bytes of memory of one device.
        roles: {what: bytes that one device keeps between steps}.
        cache: bytes of a causal rollout's keys and values if they split evenly, a part of the
            temporaries.
        steps: {whether the generator is updated: Step}.
        caveat: what limits the plan's word, of the chip.
        host: {what: bytes that the host keeps for one device between steps}.
    """

    kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    available: int
    roles: dict[str, int]
    cache: int
    steps: dict[bool, Step]
    caveat: str = ""
    host: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def needed(self):
        """Bytes that the largest step needs, as far as is known."""
        return max(step.needed for step in self.steps.values())

    @property
    def fits(self):
        """Whether the compiler took all steps, and they leave room for what they do not read.

        The compilers of a CPU and of a GPU take everything.
        """
        return all(not s.refusal and s.total <= self.available for s in self.steps.values())

    @property
    def least_seconds(self):
        """Time of all steps of the run, nothing else, if everything overlaps."""
        return sum(step.count * step.least_seconds for step in self.steps.values())

    @property
    def most_seconds(self):
        """The same if nothing overlaps."""
        return sum(step.count * step.most_seconds for step in self.steps.values())

    def json(self):
        """Everything as a dict of JSON values; numbers that are not known are None."""

        def hours(seconds):
            return seconds / 3600 if math.isfinite(seconds) else None

        steps = {}
        for kind, step in self.steps.items():
            values = dataclasses.asdict(dataclasses.replace(step, traffic=Traffic()))
            traffic = vars(step.traffic) | {"sent": dict(step.traffic.sent)}
            steps[NAMES[kind]] = values | {"traffic": traffic}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "steps": steps,
            "fits": self.fits,
            "hours": {"least": hours(self.least_seconds), "most": hours(self.most_seconds)},
        }

    def table(self):
        """The plan in lines."""
        kept = sum(self.roles.values())
        lines = [
            f"{self.devices} x {self.kind}, mesh {self.mesh}, batch {self.batch_size}, "
            f"accumulate {self.accumulate}",
            f"{'memory of a device':<44}{'GiB':>10}",
            *(_gib(name, size) for name, size in self.roles.items() if size),
            _gib("kept between steps", kept),
            *(_gib(f"    {name}, by the host", size) for name, size in self.host.items() if size),
        ]
        for kind, step in self.steps.items():
            if step.refusal:
                lines.append(f"the compiler refuses the step {NAMES[kind]}: {step.refusal}")
                continue
            lines.append(_gib(f"temporaries {NAMES[kind]}", step.temporaries))
            lines.append(_gib("    needed in all", step.total))
        if self.cache:
            lines.append(_gib("of them, keys and values of the rollout", self.cache))
        lines.append(_gib("a program may use", self.available))
        lines.append("fits" if self.fits else f"DOES NOT FIT: {self._advice(kept)}")
        lines += [self.caveat] if self.caveat else []
        return "\n".join(lines + self._work())

    def _advice(self, kept):
        """What to change in a run that does not fit."""
        if kept > self.available:
            return (
                "what is kept between steps is too large, most of all "
                f"{max(self.roles, key=self.roles.get)}. Raise config.mesh.fsdp, keep some in "
                "the memory of the host (docs/training.md), or take more devices or larger chips"
            )
        return (
            "the temporaries are too large. Set config.<role>.compute.remat='full' or 'offload', "
            "raise config.accumulate or config.mesh.context, lower config.batch_size, or take more "
            "devices"
        )

    def _work(self):
        """The lines about FLOPs, bytes and time."""
        lines = ["", f"{'work of a step':<44}" + "".join(f"{NAMES[k]:>30}" for k in self.steps)]
        steps = self.steps.values()

        def row(name, values):
            lines.append(f"{name:<44}" + "".join(f"{value:>30}" for value in values))

        row("FLOPs, all devices", [si(step.flops) for step in steps])
        row("bytes of memory, a device", [si(step.traffic.memory) for step in steps])
        for kind in sorted({kind for step in steps for kind in step.traffic.sent}):
            row(f"bytes sent, {kind}", [si(step.traffic.sent.get(kind, 0)) for step in steps])
        if any(step.traffic.network for step in steps):
            row("of them, over the network", [si(step.traffic.network) for step in steps])
        if any(step.traffic.host for step in steps):
            row("bytes from and to the host, a device", [si(step.traffic.host) for step in steps])
        if loops := sum(step.traffic.unknown_loops for step in steps):
            lines.append(f"{loops} loops of unknown length: their bytes count once")
        if not self.fits or not all(step.seconds for step in steps):
            return lines
        lines += ["", "estimate from the peaks of the maker's data sheet; a real run takes longer"]
        for name in dict.fromkeys(name for step in steps for name in step.seconds):
            row(f"seconds a step, {name}", [f"{step.seconds.get(name, 0):.3g}" for step in steps])
        least, most = self.least_seconds / 3600, self.most_seconds / 3600
        count = sum(step.count for step in steps)
        samples = self.batch_size * count
        lines += [
            f"{count:,} steps: {least:.3g} hours if all of it overlaps, {most:.3g} if nothing does",
            f"{samples / most:,.0f} to {samples / least:,.0f} samples an hour, "
            f"{least * self.devices:,.3g} to {most * self.devices:,.3g} chip-hours",
        ]
        return lines


def _gib(name, size):
    return f"{name:<44}{size / GIB:>10.2f}"


def plan(config, chip, devices):
    """Compiles the train steps of a run for `devices` and says what they need.

    Args:
        config: a ConfigDict of `configuration.complete`; its files may be absent, as in a dry run.
        chip: a `topologies.Chip`; None for the CPU of this machine.
        devices: those of a topology, or CPU devices.

    Raises:
        ValueError: the config does not fit the devices.
    """
    return plan_run(prepare(config, devices), chip)


def prepare(config, devices):
    """The `run.Run` of a config on devices of a topology; compiles nothing."""
    try:
        return build(config, devices, files=False)
    except NotImplementedError as error:
        raise ValueError(
            f"config.mesh={dict(config.mesh)} cannot be laid over these chips: {first_line(error)}"
        ) from error


def plan_run(run, chip):
    """The plan of a run that is built; see `plan`."""
    work, roles, host = flops(run), kept(run), kept(run, by_host=True)
    steps = {}
    for kind, count in work.steps.items():
        step = Step(count, work.step[kind])
        try:
            compiled = loop.lower(run, *_inputs(run), kind).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            steps[kind] = dataclasses.replace(step, refusal=first_line(error, limit=300))
        else:
            steps[kind] = _measured(step, compiled, run, chip, roles, host)
    mesh, cache = run.mesh, run.cache_shape()
    return Plan(
        kind=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=run.config.batch_size,
        accumulate=run.config.accumulate,
        available=memory(chip, mesh.size),
        roles=roles,
        host=host,
        cache=0 if cache is None else tree_bytes(cache) // mesh.size,
        steps=steps,
        caveat=_caveat(run, chip, host),
    )


def memory(chip, devices):
    """Bytes of memory of one of `devices`: the chip's, or its share of this machine's."""
    if chip is not None:
        return int(chip.memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices


def flops(run):
    """The `cost.Cost` of a run, traced for one CPU device: the same on every machine."""
    host = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    return cost(dataclasses.replace(run, mesh=host))


def _caveat(run, chip, host):
    """What limits the plan's word."""
    text = "" if chip is None else chip.caveat
    if any(host.values()) and not _tells_host_memory(run):
        text += (
            "\nThis compiler does not tell the memory of the host apart: what is kept there is our "
            "arithmetic,\nmoments count as if on the devices, and copies of either take no time."
        )
    return text.strip()


def _tells_host_memory(run):
    """Whether compiled programs say what is in the memory of the host: those for TPUs do."""
    return run.mesh.devices.flat[0].platform == "tpu"


def kept(run, *, by_host=False):
    """{what: bytes that one device, or the host for it, keeps between steps}."""
    state = run.state_shape()
    trees = run.frozen_shape() | state.nets
    trees |= {"optimizers": state.opt_state, "averages": (state.ema, state.more_ema)}
    trees |= {"stream": state.stream, "batch": _inputs(run)[0]}
    leaves = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    return {
        name: sum(_device_bytes(x) for x in arrays if host_memory.is_placed(x) == by_host)
        for name, arrays in leaves.items()
    }


def _device_bytes(x):
    """Bytes of one device's part of an array."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * np.dtype(x.dtype).itemsize


def _inputs(run):
    """(batch, key) of a step, as jax.ShapeDtypeStructs, placed as in a run: the same program."""
    split, whole = (
        jax.sharding.NamedSharding(run.mesh, spec) for spec in (jax.P(sharding.BATCH), jax.P())
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch_shape(run)
    )
    key = jax.eval_shape(lambda: loop.root_key(run.config))
    return batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)


def _measured(step, compiled, run, chip, roles, host):
    """A step with what its compiled program says, beside the `kept` bytes of device and host."""
    m, resident = compiled.memory_analysis(), sum(roles.values())
    arguments, temporaries = m.argument_size_in_bytes, m.temp_size_in_bytes
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    if not _tells_host_memory(run):  # networks there are fetched in parts, moments as a whole
        arguments -= sum(host.values()) - host["optimizers"]
        resident += host["optimizers"]
    unread = max(0, resident - arguments)  # the teacher, in a step that trains only the fake score
    total = arguments + unread + temporaries + new
    trips = getattr(run.method, "trips", {})
    traffic = Program(compiled.as_text(), trips, islands(run.mesh)).traffic()
    return dataclasses.replace(
        step,
        temporaries=temporaries,
        total=total,
        traffic=traffic,
        seconds={} if chip is None else roofline(step.flops / run.mesh.size, traffic, chip, run),
    )


def islands(mesh):
    """The slice of a TPU, or the node of GPUs, that each device is in; links join those of one."""
    devices = mesh.devices.flat
    part = "process_index" if devices[0].platform == "gpu" else "slice_index"
    return [getattr(device, part, 0) for device in devices]


def roofline(device_flops, traffic, chip, run):
    """{what: the seconds that it takes one chip at its peak}."""
    sent = sum(traffic.sent.values()) - traffic.network
    seconds = {
        "FLOPs": device_flops / peak_flops(chip, run.config),
        "memory": traffic.memory / chip.bandwidth,
        "links": sent / chip.links,
    }
    if traffic.network:
        seconds["network"] = traffic.network / chip.network
    if traffic.host:
        seconds["host"] = traffic.host / chip.host
    return seconds


def peak_flops(chip, config):
    """FLOP/s of a chip in the dtypes of a config: bfloat16 if one of its networks uses it."""
    return chip.bfloat16 if "bfloat16" in compute_dtypes(config) else chip.float32
