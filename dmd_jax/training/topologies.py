"""The chips for which a run can be planned, and their devices for a compiler on another machine.

    chip, devices = load("v5p:4x4x4")

`CHIPS` has the published numbers of each chip. Imports jax.
"""

import contextlib
import dataclasses
import os
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has. Peaks are those of its maker; no program reaches them.

    Attributes:
        memory: bytes of HBM.
        bfloat16: FLOP/s of matrix products of bfloat16.
        float32: FLOP/s of matrix products whose operands stay float32.
        bandwidth: bytes/s between the chip and its HBM.
        links: bytes/s that it can send to other chips of its slice, all links together.
        network: bytes/s that it can send to another slice, its share of the host's network.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    links: float
    network: float


def _tpu(gib, tflops, bandwidth, links, network):
    """A TPU. It multiplies float32 in six products of bfloat16 (XLA's precision HIGHEST)."""
    peak = tflops * 1e12
    return Chip(gib * 2**30, peak, peak / 6, bandwidth * 1e9, links * 1e9, network * 1e9)


# HBM [GiB], bfloat16 [TFLOP/s], HBM [GB/s], links one way [GB/s]: cloud.google.com/tpu/docs/v5e,
# /v5p, /v6e. Network [GB/s a chip]: "How to Scale Your Model", part 2,
# jax-ml.github.io/scaling-book.
# HBM is what the compiler lets a program use, a little less than the chip has.
CHIPS = {
    "v5e": _tpu(15.75, 197, 819, 200, 3.1),
    "v5p": _tpu(95.74, 459, 2765, 600, 6.2),
    "v6e": _tpu(31.25, 918, 1638, 400, 12.5),
}
KNOWN = "v5e:8x8, v5p:4x4x4, v6e:16x16 (a TPU and the chips along its sides), cpu:8"


def load(topology, slices=1):
    """The chip of a topology (None for a CPU) and its devices.

    A TPU's devices belong to no machine: programs can be compiled for them with the compiler of the
    package libtpu, and not run. It must be the first use of jax's devices in the process if more
    CPU devices are asked for than there are.

    Args:
        topology: "v5p:4x4x4", a TPU and the chips along the sides of a slice; or "cpu:8".
        slices: number of such slices.

    Raises:
        ValueError: no such topology, or too few CPU devices.
        ImportError: libtpu is not installed.
    """
    name, _, sides = topology.partition(":")
    if name not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", sides):
        raise ValueError(f"unknown topology {topology!r}; write one like {KNOWN}")
    if slices < 1 or (slices > 1 and name == "cpu"):
        raise ValueError(f"{slices} slices of {topology!r}: give 1 or more, and 1 for a CPU")
    if name == "cpu":
        return None, _cpu(topology, sides)
    return CHIPS[name], _tpu_devices(topology, [int(n) for n in sides.split("x")], slices)


def _cpu(topology, sides):
    if not sides.isdecimal() or int(sides) < 1:
        raise ValueError(f"unknown topology {topology!r}: write the number of devices, cpu:8")
    count = int(sides)
    with contextlib.suppress(RuntimeError):  # devices are there already, as in a notebook
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{topology!r} needs {count} CPU devices and this process has {len(devices)}: start it "
            f"with JAX_NUM_CPU_DEVICES={count}"
        )
    return devices[:count]


def _tpu_devices(name, sides, slices):
    # libtpu reads these when it is loaded. It only compiles here: it must not ask the cloud which
    # machine this is, and other processes may have loaded it too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # By default a host has 2 x 2 chips, which a single row does not divide into.
    host = [min(n, 2) for n in (*sides, 1, 1)[:2]] + [1]
    more = {"num_slices": slices} if slices > 1 else {}
    if host != [2, 2, 1]:
        more["chips_per_host_bounds"] = host
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ImportError(
                "the TPU's compiler is missing: pip install 'dmd_jax[plan]', which is the package "
                "libtpu"
            ) from error
        raise ValueError(f"unknown topology {name!r} ({error}); known are {KNOWN}") from error
    return topology.devices
