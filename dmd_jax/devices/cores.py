"""The cores of a CPU as JAX devices, so that they share a batch. Imports jax and the mesh.

XLA uses one core for the small matrix products of small networks. Several devices, each with a part
of the batch, use several cores.
"""

import contextlib
import math
import os
from collections.abc import Iterator

import jax

from dmd_jax.devices import sharding

LEAST = 8  # samples of a batch for one device; with fewer, splitting costs more than it saves


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux: honours taskset and the limits of containers
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split_cores(batch: int, *, even: bool = True, mesh: tuple[int, ...] = (-1,)) -> None:
    """Divides the CPU into devices that split batches of `batch` samples. Other platforms are
    unaffected.

    It takes the largest number of devices that gives LEAST samples to each. Where the user has set
    the number, by JAX_NUM_CPU_DEVICES or XLA_FLAGS, it does nothing.

    Args:
        batch: number of samples; must be called before JAX initialises its devices.
        even: whether the number of devices must divide `batch`; False where the caller pads it.
        mesh: sizes of the axes of the mesh that the user states, -1 for one that is free: there are
            as many devices as they need.
    """
    flag = "xla_force_host_platform_device_count"
    if flag in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices >= 0:
        return
    counts = range(1, min(usable_cores(), batch // LEAST) + 1)
    fit = [n for n in counts if not even or batch % n == 0]
    count, stated = max(fit, default=1), math.prod(n for n in mesh if n > 0)
    if -1 not in mesh or count % stated:
        count = stated
    jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def shared(batch: int) -> Iterator[None]:
    """Sets a mesh on which the cores of a CPU split the samples that are drawn in it.

    Without several devices of a CPU, or with fewer than 2 LEAST samples, no mesh is set.

    Args:
        batch: number of samples in one call; `sharding.even_batch` pads it.
    """
    split_cores(batch, even=False)
    devices = jax.devices()
    count = min(len(devices), batch // LEAST) if devices[0].platform == "cpu" else 1
    if count < 2:
        yield
        return
    with jax.set_mesh(sharding.make_mesh(devices=devices[:count])):
        yield
