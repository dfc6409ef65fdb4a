"""What XLA's compiler must know of a GPU that is not in this machine.

    devices("h100", nodes=8, per_node=8)

Imports jax.
"""

import dataclasses

from jax.experimental import topologies

# What a program may ask of any of these cards. The compiler divides by some and trusts the others.
LIMITS = """
    shared_memory_per_block: 49152
    registers_per_block_limit: 65536
    registers_per_core_limit: 65536
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    thread_dim_limit_x: 1024
    thread_dim_limit_y: 1024
    thread_dim_limit_z: 64
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """The facts of a card that its compiler reads, as the card's driver reports them.

    Attributes:
        name: of the card, by its driver.
        capability: of CUDA, (major, the proto's name of its extensions).
        cores: streaming multiprocessors, `lanes` float32 units each.
        clock: GHz.
        memory: bytes.
        bandwidth: bytes/s between the card and its memory.
        cache: bytes of the L2 cache.
        shared: the most bytes of shared memory of a block, 1 KiB less than a core has.
    """

    name: str
    capability: tuple[int, str]
    cores: int
    lanes: int
    clock: float
    memory: int
    bandwidth: float
    cache: int
    shared: int

    def text(self):
        """The facts as a GpuTargetConfigProto of XLA's."""
        major, extensions = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} feature_extension: {extensions} }}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared + 2**10}
              shared_memory_per_block_optin: {self.shared}
              {LIMITS}
            }}
        """


_HOPPER = Target(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, "ACCELERATED_FEATURES"),
    cores=132,
    lanes=128,
    clock=1.98,
    memory=84_942_979_072,
    bandwidth=3.352e12,
    cache=50 * 2**20,
    shared=227 * 2**10,
)
TARGETS = {
    "a100": Target(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, "NONE"),
        cores=108,
        lanes=64,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2.039e12,
        cache=40 * 2**20,
        shared=163 * 2**10,
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER, name="NVIDIA H200", memory=151_397_597_184, bandwidth=4.8e12
    ),
}


def devices(name, nodes, per_node):
    """The GPUs of some nodes, for which programs can be compiled, and not run.

    Raises:
        ImportError: JAX's wheels for CUDA, which hold the compiler, are not installed.
    """
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{nodes}x{per_node}",
            target_config=TARGETS[name].text(),
        )
    except NotImplementedError as error:
        raise ImportError(
            "the compiler for GPUs is missing: pip install 'dmd_jax[cuda]', which are JAX's wheels "
            "for CUDA (4.4 GB); no GPU is needed"
        ) from error
    return found.devices
