"""What a diffusion model is: a noise schedule, a network as a denoiser, ODE solvers.

Imports jax, numpy, einops and jaxtyping.
"""
