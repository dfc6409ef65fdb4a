"""Arrays in the memory of the host, from which a program fetches the parts that it needs.

The type of such an array says where it is, also in a traced program. Nothing computes with it
there: `to_device` comes first. Imports jax.
"""

import jax

KIND = "pinned_host"  # memory that the system does not move, so that devices read it themselves


def placed(tree):
    """Abstract arrays, with shardings, in host memory; what has no axes stays on the devices."""

    def place(x):
        if not x.shape:
            return x
        there = x.sharding.with_memory_kind(KIND)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree.map(place, tree)


def is_placed(x):
    """Whether an abstract array is to be in host memory."""
    return x.sharding is not None and x.sharding.memory_kind == KIND


def holds(x):
    """Whether an array, traced or not, is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device(tree):
    """The arrays of a tree on the devices."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if holds(x) else x, tree
    )


def back(tree, before):
    """The arrays of a tree, each in the memory in which that of `before` is."""
    return jax.tree.map(
        lambda x, old: jax.device_put(x, jax.memory.Space.Host) if holds(old) else x, tree, before
    )


def check(what, memory):
    """Raises ValueError if the value of a setting of memory is neither "host" nor None."""
    if memory not in (None, "host"):
        raise ValueError(f"{what}={memory!r}: use 'host', or None for that of the devices")


def require(what, devices):
    """Refuses devices that read no memory of their host.

    Devices of which a machine has only the compiler may state none of their kinds of memory: they
    are not refused.

    Args:
        what: the setting that asks for it, such as "config.teacher.compute.memory='host'".
        devices: of the mesh.

    Raises:
        ValueError: they have other kinds of memory only.
    """
    kinds = [memory.kind for memory in devices[0].addressable_memories()]
    if kinds and KIND not in kinds:
        raise ValueError(
            f"{what}: {devices[0].device_kind} devices have the kinds of memory {kinds}, and "
            f"{KIND!r} is needed. Remove it; config.mesh.fsdp splits weights over devices"
        )
