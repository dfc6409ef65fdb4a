"""Network families, and the attention, cache and layers they share.

dit          images from classes
wan          video latents from text and images
wan_vae      video latents and pixels
umt5         text embeddings
discriminator  heads on the features of another network
experts      several networks as one, each for an interval of noise levels
attention    masks, one kernel per platform
kv_cache     keys and values of earlier frames
layers       linear layers, time embedding, stacks of layers

Imports jax, flax, devices and diffusion.
"""
