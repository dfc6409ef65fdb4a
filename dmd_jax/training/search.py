"""The fastest mesh, rematerialisation and accumulation with which a run fits its devices.

    best, result = search(config, chip, devices, limit=8, say=print)

Compiling takes minutes, so cheap checks come first: what the config refuses, the bytes that devices
keep between steps, the time that the FLOPs alone take, and what was refused before. Only where
nothing fits is memory saved at a price: see `savings`. Imports `plan`, `checks` and the
configuration.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dmd_jax.devices import sharding
from dmd_jax.training import checks, plan
from dmd_jax.training.configuration import flatten

REMATS = ("none", "full", "offload")  # each needs less memory of the devices than the one before


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of a run.

    Attributes:
        overrides: {path of an entry of the config: its value}.
        mesh: {axis: devices along it}.
        remat: of all networks that have the setting; frozen ones matter where a method takes
            gradients through them, as SiD and DMD2 do.
        parts: `config.accumulate`.
        kept: bytes that a device keeps between steps.
        share: samples of a part of the batch on a device, 1 / n for one that is split over n.
        seconds: the time of the run's FLOPs at the chip's peak; no such run is faster.
    """

    overrides: Mapping[str, Any]
    mesh: Mapping[str, int]
    remat: str
    parts: int
    kept: int
    share: float
    seconds: float

    @property
    def flags(self):
        """The settings as flags of a command."""
        return _flags(self.overrides)

    @property
    def order(self):
        """Few FLOPs first, then few parts and whole samples, then the most sharded weights."""
        axes = (self.mesh[axis] for axis in ("tensor", "context", "data"))
        return self.seconds, REMATS.index(self.remat), self.parts, *axes

    def is_hopeless(self, other, needed, available):
        """Whether it is not worth compiling, because `other`, which keeps no more, did not fit.

        It has as many samples on a device; or too many even if all that a step needs fell with
        them. A rule of thumb: gathered weights may be smaller on another mesh.

        Args:
            other: a Candidate that was refused.
            needed: bytes that it needed; 0 if that is not known.
            available: bytes of a device.
        """
        if REMATS.index(self.remat) > REMATS.index(other.remat) or self.kept < other.kept:
            return False
        share = self.share / other.share
        return share >= 1 or share * needed > available


def search(config, chip, devices, limit, say=print):
    """Compiles candidates, the most promising first, until no other can be faster.

    Args:
        config: a ConfigDict of `configuration.complete`; its mesh, remat and accumulate are free.
        chip: the `topologies.Chip` of the devices.
        devices: those of a topology.
        limit: the most candidates to compile.
        say: is called with a line about each candidate that is compiled.

    Returns:
        (the Candidate that fits with the least time, its Plan); the last that was compiled if none
        fits.

    Raises:
        ValueError: the config lacks an entry or fits no mesh, or what devices keep between steps is
            too large.
    """
    checks.entries(config)
    compiler, least = _Compiler(config, chip, devices, limit, say), []
    for saving in savings(config, devices):
        if saving:
            say("nothing fits; with " + _flags(saving))
        try:
            found = candidates(config, chip, devices, saving)
        except ValueError as error:
            if not saving:
                raise
            say(f"that is not possible: {error}")
            continue
        least.append(min(candidate.kept for candidate in found))
        if (best := compiler.fastest(found)) is not None:
            return best
        if compiler.limit == 0:
            say("the limit is reached: other settings may fit")
            break
    if compiler.last is not None:
        return compiler.last
    available = plan.memory(chip, len(devices))
    if min(least) > available:
        raise ValueError(
            f"networks and optimizers alone take {min(least) / plan.GIB:.2f} GiB a device on the "
            f"best mesh, of {available / plan.GIB:.2f}: take more devices or larger chips"
        )
    raise ValueError("no candidate could be compiled; see the reasons above")


def savings(config, devices):
    """Overrides that save memory, {path of an entry: value}, in the order in which they are tried.

    First none; then optimizers and, with them, frozen networks in the memory of the host, which
    changes no number; then frozen networks in int8, which does. What the config has so already, or
    has no such entry for, is left out. For GPUs, plans count optimizers as if on the devices, so
    there they stay.
    """
    kind, values = config.method.cls, flatten(config)
    frozen = [*kind.frozen, *(role for role in kind.trainable if "adapter" in config[role])]
    moments = {f"{role}.optimizer.memory": "host" for role in kind.trainable}
    if devices[0].platform == "gpu":
        moments = {}
    moved = moments | {f"{role}.compute.memory": "host" for role in frozen}
    rounded = moments | {f"{role}.compute.weights_dtype": "int8" for role in frozen}
    found = [{}]
    for saving in (moments, moved, rounded):
        changes = {path: v for path, v in saving.items() if values.get(path, v) != v}
        if changes not in found:
            found.append(changes)
    return found


@dataclasses.dataclass
class _Compiler:
    """What compiles candidates of a config.

    Attributes:
        limit: the most candidates that it may still compile.
        last: (Candidate, Plan), the last that it compiled; None before.
    """

    config: Any
    chip: Any
    devices: Sequence[Any]
    limit: int
    say: Callable[[str], None]
    last: tuple[Candidate, plan.Plan] | None = None

    def fastest(self, found):
        """(Candidate, Plan) with the least time of those that fit; None if none does."""
        available = plan.memory(self.chip, len(self.devices))
        room = [c for c in found if c.kept <= available]
        self.say(f"{len(found)} candidates; {len(found) - len(room)} keep too much between steps")
        best, refused = None, []
        for candidate in room:
            if best is not None and candidate.seconds >= best[1].least_seconds:
                break  # its FLOPs alone take as long as all of the best
            if any(candidate.is_hopeless(*refusal, available) for refusal in refused):
                continue
            if self.limit == 0:
                if best is not None:
                    self.say("the limit is reached: other candidates may be faster")
                break
            result = self._plan(candidate)
            if result is None:
                continue
            if not result.fits:
                refused.append((candidate, result.needed))
            elif best is None or result.least_seconds < best[1].least_seconds:
                best = candidate, result
        return best

    def _plan(self, candidate):
        """The Plan of a candidate; None if the networks cannot be split like that."""
        self.limit -= 1
        try:
            result = plan.plan(changed(self.config, candidate.overrides), self.chip, self.devices)
        except ValueError as error:
            self.say(f"{candidate.flags}: {error}")
            return None
        self.last = candidate, result
        hours = f"{result.least_seconds / 3600:.3g} hours at best"
        self.say(f"{candidate.flags}: {hours if result.fits else 'does not fit'}")
        return result


def _flags(overrides):
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def changed(config, overrides):
    """A copy of a config with other values."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(dict(overrides))
    return copy


def candidates(config, chip, devices, saving):
    """All settings that the config accepts, in their `order`, each with `saving`. See `search`."""
    found, reasons, work = [], [], {}
    roles = (*config.method.cls.trainable, *config.method.cls.frozen)
    roles = [role for role in roles if "remat" in config[role].get("compute", {})]

    def accepted(overrides):
        """The Run of the config with other values; None if it is refused."""
        try:
            return plan.prepare(changed(config, overrides | {"accumulate": 1}), devices)
        except ValueError as error:
            reasons.append(error)
            return None

    for mesh in _meshes(len(devices)):
        axes = saving | {f"mesh.{axis}": size for axis, size in mesh.items()}
        if (run := accepted(axes)) is None:
            continue
        kept = sum(plan.kept(run).values())
        rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
        for remat in REMATS:
            compute = {f"{role}.compute.remat": remat for role in roles}
            if remat not in work:  # FLOPs depend neither on the mesh nor on the parts
                changed_run = accepted(axes | compute)
                work[remat] = None if changed_run is None else plan.flops(changed_run).run
            if work[remat] is None:  # networks or devices that do not have it
                continue
            seconds = work[remat] / len(devices) / plan.peak_flops(chip, config)
            for parts in _powers_of_two(rows):
                share = rows / parts / (mesh["context"] * mesh["tensor"])
                overrides = axes | compute | {"accumulate": parts}
                found.append(Candidate(overrides, mesh, remat, parts, kept, share, seconds))
    if not found:
        raise reasons[0]
    return sorted(found, key=lambda candidate: candidate.order)


def _meshes(devices):
    """{axis: size} that multiply to `devices`; all but `data` are powers of two."""
    for context in _powers_of_two(devices):
        for tensor in _powers_of_two(devices // context):
            for fsdp in _powers_of_two(devices // context // tensor):
                data = devices // (context * tensor * fsdp)
                yield dict(zip(sharding.AXES, (data, fsdp, context, tensor), strict=True))


def _powers_of_two(number):
    """1, 2, 4, ... as far as they divide `number`."""
    power = 1
    while number % power == 0:
        yield power
        power *= 2
