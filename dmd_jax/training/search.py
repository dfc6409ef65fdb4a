"""The fastest mesh, rematerialisation and accumulation with which a run fits its devices.

    best, result = search(config, chip, devices, limit=8, say=print)

Compiling takes minutes, so cheap checks come first: what the config refuses, the bytes that devices
keep between steps, the time that the FLOPs alone take, and what was refused before. Only where
nothing fits is memory saved at a price: see `savings`. Imports `plan`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmd_jax.devices import sharding
from dmd_jax.training import plan

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

    def needs_all_of(self, other):
        """Whether it needs at least the memory of `other` in every respect."""
        remat = REMATS.index(self.remat) <= REMATS.index(other.remat)
        return remat and self.kept >= other.kept and self.share >= other.share


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
        ValueError: the config fits no mesh, or what devices keep between steps is too large.
    """
    least, last = [], None
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
        best, last, limit = _fastest(config, found, chip, devices, limit, say, last)
        if best is not None:
            return best
        if limit == 0:
            break
    available = plan.memory(chip, len(devices))
    if last is None and min(least) > available:
        raise ValueError(
            f"networks and optimizers alone take {min(least) / plan.GIB:.2f} GiB a device on the "
            f"best mesh, of {available / plan.GIB:.2f}: take more devices or larger chips"
        )
    if last is None:
        raise ValueError("no candidate could be compiled; see the reasons above")
    return last


def savings(config, devices):
    """Overrides that save memory, {path of an entry: value}, in the order in which they are tried.

    First none; then optimizers and, with them, frozen networks in the memory of the host, which
    changes no number; then frozen networks in int8, which does. For GPUs, plans count optimizers as
    if on the devices, so there they stay.
    """
    kind = config.method.cls
    frozen = [*kind.frozen, *(role for role in kind.trainable if "adapter" in config[role])]
    frozen = [role for role in frozen if "compute" in config[role]]
    moments = {f"{role}.optimizer.memory": "host" for role in kind.trainable}
    if devices[0].platform == "gpu":
        moments = {}
    moved = moments | {f"{role}.compute.memory": "host" for role in frozen}
    rounded = moments | {f"{role}.compute.weights_dtype": "int8" for role in frozen}
    return {}, *(saving for saving in (moments, moved, rounded) if saving)


def _fastest(config, found, chip, devices, limit, say, last):
    """(the fastest that fits or None, the last that was compiled, what is left of `limit`).

    Both are (Candidate, Plan).
    """
    room = [c for c in found if c.kept <= plan.memory(chip, len(devices))]
    say(f"{len(found)} candidates; {len(found) - len(room)} keep too much between steps")
    best, refused = None, []
    for candidate in room:
        if best is not None and candidate.seconds >= best[1].least_seconds:
            break  # its FLOPs alone take as long as all of the best
        if any(map(candidate.needs_all_of, refused)):
            continue
        if limit == 0:
            say("the limit is reached: other candidates may be faster")
            break
        limit -= 1
        result = _compiled(config, candidate, chip, devices, say)
        if result is None:
            continue
        last = candidate, result
        if not result.fits:
            refused.append(candidate)
        elif best is None or result.least_seconds < best[1].least_seconds:
            best = last
    return best, last, limit


def _flags(overrides):
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def _compiled(config, candidate, chip, devices, say):
    """The Plan of a candidate; None if the networks cannot be split like that."""
    try:
        result = plan.plan(changed(config, candidate.overrides), chip, devices)
    except ValueError as error:
        say(f"{candidate.flags}: {error}")
        return None
    hours = f"{result.least_seconds / 3600:.3g} hours at best"
    say(f"{candidate.flags}: {hours if result.fits else 'does not fit'}")
    return result


def changed(config, overrides):
    """A copy of a config with other values."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(dict(overrides))
    return copy


def candidates(config, chip, devices, saving=()):
    """All settings that the config accepts, in their `order`, each with `saving`. See `search`."""
    found, reason, saving = [], None, dict(saving)
    roles = (*config.method.cls.trainable, *config.method.cls.frozen)
    roles = [role for role in roles if "remat" in config[role].get("compute", {})]
    work = {}
    for mesh in _meshes(len(devices)):
        axes = saving | {f"mesh.{axis}": size for axis, size in mesh.items()}
        try:
            run = plan.prepare(changed(config, axes | {"accumulate": 1}), devices)
        except ValueError as error:
            reason = reason or error
            continue
        kept = sum(plan.kept(run).values())
        rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
        for remat in REMATS:
            compute = {f"{role}.compute.remat": remat for role in roles}
            if remat not in work:  # FLOPs depend neither on the mesh nor on the parts
                work[remat] = plan.flops(
                    plan.prepare(changed(config, axes | compute | {"accumulate": 1}), devices)
                ).run
            seconds = work[remat] / len(devices) / plan.peak_flops(chip, config)
            for parts in _powers_of_two(rows):
                share = rows / parts / (mesh["context"] * mesh["tensor"])
                overrides = axes | compute | {"accumulate": parts}
                found.append(Candidate(overrides, mesh, remat, parts, kept, share, seconds))
    if not found:
        raise reason
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
