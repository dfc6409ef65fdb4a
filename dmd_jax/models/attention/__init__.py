"""Softmax attention and its masks, with one kernel per platform. Imports jax, numpy and devices.

masks       which keys a query may attend to
dispatch    `attention`: checks, mesh, choice of the kernel; `forward_mode`, for jax.jvp
splash      the kernel for TPU
cudnn       the kernel for CUDA
tiled       the kernel for every other platform
padding     sequences padded to whole blocks
"""

from dmd_jax.models.attention.dispatch import attention, forward_mode
from dmd_jax.models.attention.masks import BlockCausal, Causal, Mask, TeacherForcing

__all__ = ["BlockCausal", "Causal", "Mask", "TeacherForcing", "attention", "forward_mode"]
