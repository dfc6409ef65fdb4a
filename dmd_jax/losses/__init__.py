"""The objectives of the papers, as functions of predictions.

Imports jax, jaxtyping and the room diffusion/.
"""
