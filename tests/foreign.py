"""Weights and tensors for networks that are compared with the code of others.

Both sides, and the stored numbers, get the same values from names alone: nothing large is stored.
"""

import zlib

import numpy as np


def tensor(name, shape, scale=1.0):
    """Normal values that are a function of the name and the shape: float32."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), *shape])
    return (scale * rng.normal(size=shape)).astype(np.float32)


def weight(name, shape):
    """A weight of a size at which every layer matters: matrices keep variance, vectors spread."""
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
    return tensor(name, shape, 1.5 / np.sqrt(fan_in) if len(shape) > 1 else 0.5)


def give_weights(module):
    """Sets all weights of a torch module by their names; returns it, ready to be called."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return module.eval()


def relative_error(a, b):
    """|a - b| / |b| in the Euclidean norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)
