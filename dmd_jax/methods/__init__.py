"""One file for each method: its losses, the times at which it takes them, and its rollout.

Imports jax, jaxtyping and the rooms rollouts/, losses/, diffusion/ and devices/.
"""
