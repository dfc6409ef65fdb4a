"""Distribution Matching Distillation in JAX: slow diffusion teachers become few-step students."""

__version__ = "0.1.0"
