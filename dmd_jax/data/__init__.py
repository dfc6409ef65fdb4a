"""What training reads, at random positions: images and labels, or videos and prompts.

    source = load("mnist5k", "train")           'mnist5k' is in the package; any TFDS name will do
    source = Prompts(embeddings, shape)         prompts, embedded by `python -m dmd_jax.embed`
    source = Prompts(embeddings, shape, latents)   and videos, by `python -m dmd_jax.encode`
    batches = Batches(source, 64, seed=0)       batches[step], or batches.iterate(start_step)
    images, labels = arrays(source)             a whole split of images, for metrics

This room knows nothing about diffusion. It may import numpy, Pillow, grain, tensorflow_datasets and
the files of videos, never tensorflow: TensorFlow Datasets reads and writes array_record files
without it.
"""

from dmd_jax.data.batches import Batches
from dmd_jax.data.moving_digits import MovingDigits
from dmd_jax.data.pixels import to_float, to_uint8
from dmd_jax.data.prompts import Prompts
from dmd_jax.data.source import Source, arrays, load

__all__ = ["Batches", "MovingDigits", "Prompts", "Source", "arrays", "load", "to_float", "to_uint8"]
