"""How a run keeps its arrays between steps: frozen networks in int8 or in the memory of the host.

    config.teacher.compute.weights_dtype = "int8"    layers in eight bits
    config.teacher.compute.memory = "host"           layers in the memory of the host
    config.generator.optimizer.memory = "host"       the state of a role's optimizer there
    config.generator.compute.remat = "offload"       what the backward pass needs of its layers

docs/training.md has what each saves and costs. Imports `layers`, `host_memory` and the
configuration.
"""

import dataclasses

from dmd_jax.devices import host_memory
from dmd_jax.models import layers
from dmd_jax.training.configuration import config_role


def in_int8(config, role):
    """Whether `compute.weights_dtype` of a role says that its weights are kept in int8.

    Raises:
        ValueError: it is something else.
    """
    dtype = config[role].get("compute", {}).get("weights_dtype")
    if dtype not in (None, "int8"):
        raise ValueError(
            f"config.{role}.compute.weights_dtype={dtype!r}: use 'int8', or None for the compute "
            "dtype"
        )
    return dtype == "int8"


def in_host(config, role):
    """Whether `compute.memory` of a role says that its layers are kept in the memory of the host.

    Raises:
        ValueError: it is something else.
    """
    memory = config[role].get("compute", {}).get("memory")
    host_memory.check(f"config.{role}.compute.memory", memory)
    return memory == "host"


def optimizers_in_host(config, roles):
    """Those of some trained roles whose optimizer's state is kept in the memory of the host."""
    return {role for role in roles if config[role].optimizer.get("memory") == "host"}


def require_frozen(config, role):
    """Raises ValueError where the settings of a role are only for weights that are not trained."""
    int8, host = in_int8(config, role), in_host(config, role)
    if not (int8 or host) or role not in config.method.cls.trainable or "adapter" in config[role]:
        return
    if int8:
        raise ValueError(
            f"config.{role}.compute.weights_dtype='int8', but the {role} is trained, and eight "
            "bits lose small updates: only networks that are not trained can be int8. Remove it, "
            f"or train an adapter: config.{role}.adapter"
        )
    raise ValueError(
        f"config.{role}.compute.memory='host', but the {role} is trained, and every step changes "
        f"its weights. Remove it; config.{role}.optimizer.memory='host' is possible"
    )


def in_dtype(config, role, denoiser):
    """An abstract frozen network in its compute dtype, its layers in int8 where the role says so.

    Raises:
        ValueError: it is to be int8, and has no layers for which that is possible.
    """
    if not in_int8(config, role):
        return denoiser
    return _with_layers(f"config.{role}.compute.weights_dtype='int8'", layers.in_int8, denoiser)


def in_memory(config, role, denoiser):
    """A frozen network, abstract and with shardings, in the memory that the role names.

    Raises:
        ValueError: it is to be that of the host, and has no layers for which that is possible.
    """
    if not in_host(config, role):
        return denoiser

    def moved(net):
        return layers.map_kernels(host_memory.placed, net)

    return _with_layers(f"config.{role}.compute.memory='host'", moved, denoiser)


def _with_layers(setting, change, denoiser):
    """The Denoiser of `change(net)`; an error names the setting."""
    try:
        return dataclasses.replace(denoiser, net=change(denoiser.net))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def check(run):
    """Refuses a run whose devices, networks or method cannot do what its settings of memory say.

    Raises:
        ValueError: the setting, and what to do.
    """
    config, devices = run.config, run.mesh.devices.flat
    for name, denoiser in (run.frozen | run.nets).items():  # gradients pass through both
        if getattr(getattr(denoiser, "net", denoiser).config, "remat", None) == "offload":
            host_memory.require(f"config.{config_role(name)}.compute.remat='offload'", devices)
    for role in sorted(optimizers_in_host(config, run.nets)):
        host_memory.require(f"config.{role}.optimizer.memory='host'", devices)
    for name in run.frozen:
        role = config_role(name)
        if in_host(config, role):
            setting = f"config.{role}.compute.memory='host'"
            host_memory.require(setting, devices)
            _check_features(run, name, setting)
    run.frozen_shape()  # raises for a network without such layers


def _check_features(run, name, setting):
    """Refuses a method that reads a frozen network in pieces, each a slice of all its layers."""
    readers = [name, *(role for role, base in run.bind.bases.items() if base == name)]
    if getattr(run.method, "features", None) in readers:
        raise ValueError(
            f"{setting}: config.method.features={run.method.features!r} reads this network in "
            "pieces, for which its layers must be on the devices. Remove one of them"
        )
