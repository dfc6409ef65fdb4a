"""Images and labels: TensorFlow Datasets builders, read at random positions through Grain.

    source = load("mnist5k", "train")           'mnist5k' is in the package; any TFDS name will do
    batches = Batches(source, 64, seed=0)       batches[step], or batches.iterate(start_step)
    images, labels = arrays(source)             a whole split, for metrics

This room knows nothing about diffusion. It may import numpy, Pillow, grain and
tensorflow_datasets, never tensorflow: TensorFlow Datasets reads and writes array_record files
without it.
"""

from dmd_jax.data.batches import Batches
from dmd_jax.data.pixels import to_float, to_uint8
from dmd_jax.data.source import Source, arrays, load

__all__ = ["Batches", "Source", "arrays", "load", "to_float", "to_uint8"]
