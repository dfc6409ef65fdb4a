"""The chips for which a run can be planned, and their devices for a compiler on another machine.

    chip, devices = load("v5p:4x4x4")

`CHIPS` has the published numbers of each chip. Imports `gpus`.
"""

import contextlib
import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from dmd_jax.training import gpus


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has. Peaks are those of its maker; no program reaches them.

    Attributes:
        memory: bytes of HBM that a program can use.
        bfloat16: FLOP/s of matrix products of bfloat16.
        float32: FLOP/s of matrix products whose operands stay float32.
        bandwidth: bytes/s between the chip and its HBM.
        links: bytes/s that it can send to other chips of its slice or node, all links together.
        network: bytes/s that it can send to another slice or node, its share of the host's network.
        host: bytes/s between the chip and the memory of its host, one way.
        caveat: what a plan for it must say; "" for nothing.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    links: float
    network: float
    host: float
    caveat: str = ""


def _tpu(gib, tflops, *rates):
    """A TPU. It multiplies float32 in six products of bfloat16 (XLA's precision HIGHEST)."""
    peak = tflops * 1e12
    return Chip(gib * 2**30, peak, peak / 6, *(rate * 1e9 for rate in rates))


# HBM [GiB], bfloat16 [TFLOP/s], HBM [GB/s], links one way [GB/s]: cloud.google.com/tpu/docs/v5e,
# /v5p, /v6e. Network and host's memory [GB/s a chip]: "How to Scale Your Model", part 2,
# jax-ml.github.io/scaling-book.
# HBM is what the compiler lets a program use, a little less than the chip has.
CHIPS = {
    "v5e": _tpu(15.75, 197, 819, 200, 3.1, 15),
    "v5p": _tpu(95.74, 459, 2765, 600, 6.2, 15),
    "v6e": _tpu(31.25, 918, 1638, 400, 12.5, 32),
}


def _gpu(name, bfloat16, float32, *rates):
    card = gpus.TARGETS[name]
    peaks = bfloat16 * 1e12, float32 * 1e12, card.bandwidth, *(rate * 1e9 for rate in rates)
    return Chip(card.memory, *peaks)


# bfloat16 without sparsity, float32 outside of the tensor cores [TFLOP/s], NVLink one way [GB/s],
# and last PCIe one way [GB/s]: NVIDIA's data sheets of the A100 SXM 80 GB, H100 SXM and H200 SXM.
# Network [GB/s a GPU], a card of 200 or 400 Gbit/s for each: those of the DGX A100, H100 and H200.
CHIPS |= {
    "a100": _gpu("a100", 312, 19.5, 300, 25, 32),
    "h100": _gpu("h100", 989, 67, 450, 50, 64),
    "h200": _gpu("h200", 989, 67, 450, 50, 64),
}
KNOWN = (
    "v5e:8x8, v5p:4x4x4, v6e:16x16 (a TPU and the chips along its sides), a100:1x8, h100:8x8, "
    "h200:2x4 (nodes and the GPUs of each), cpu:8"
)


def load(topology, slices=1):
    """The chip of a topology (None for a CPU) and its devices.

    Devices of a TPU and GPUs belong to no machine: programs can be compiled for them, with the
    compiler of the package libtpu or of JAX's wheels for CUDA, and not run. It must be the first
    use of jax's devices in the process if more CPU devices are asked for than there are.

    Args:
        topology: "v5p:4x4x4", a TPU and the chips along the sides of a slice; "h100:8x4", 8 nodes
            of 4 GPUs; or "cpu:8".
        slices: number of such slices of a TPU.

    Raises:
        ValueError: no such topology, or too few CPU devices.
        ImportError: the compiler is not installed.
    """
    name, _, sides = topology.partition(":")
    if name not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", sides):
        raise ValueError(f"unknown topology {topology!r}; write one like {KNOWN}")
    if slices < 1 or (slices > 1 and name in ("cpu", *gpus.TARGETS)):
        raise ValueError(f"{slices} slices of {topology!r}: give 1 or more, and 1 if it is no TPU")
    if name == "cpu":
        return None, _cpu(topology, sides)
    if name in gpus.TARGETS:
        return _usable(CHIPS[name]), _gpus(topology)
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


def _usable(chip):
    """A GPU with the part of its memory that JAX takes, as much as in a run."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # now, and formerly
    share = float(next(filter(None, map(os.environ.get, names)), 0.75))
    caveat = (
        f"Of {chip.memory / 2**30:.2f} GiB, JAX takes {share:.0%} (XLA_CLIENT_MEM_FRACTION). The "
        "compiler of a GPU refuses\nnothing: whether a step fits is our sum of the bytes that it "
        "reports, without cuDNN's workspace."
    )
    return dataclasses.replace(chip, memory=share * chip.memory, caveat=caveat)


def _gpus(topology):
    name, _, sides = topology.partition(":")
    numbers = [int(n) for n in sides.split("x")]
    if len(numbers) != 2 or 0 in numbers:
        raise ValueError(
            f"unknown topology {topology!r}: write the nodes and the GPUs of each, {name}:1x8"
        )
    return gpus.devices(name, *numbers)


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
