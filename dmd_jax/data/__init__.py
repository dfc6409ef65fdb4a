"""Training data, read at random positions: images and labels, or videos and prompts.

    source = load("mnist5k", "train")            labelled images: 'mnist5k' is in the package
    source = Prompts(embeddings, shape)          prompts, embedded by `python -m dmd_jax.embed`
    source = Prompts(embeddings, shape, latents)  and videos, encoded by `python -m dmd_jax.encode`
    source = OdePairs(embeddings, shape, pairs)   a teacher's ODE along them, by `dmd_jax.ode_pairs`
    source = ImagePairs(pairs, "mnist5k")        the same of a teacher of images
    batches = Batches(source, 64, seed=0)        batches[step], or batches.iterate(start_step)
    images, labels = arrays(source)              a whole split of images, for metrics

Training reads any `Source`. This room knows nothing about diffusion. It may import numpy, Pillow,
grain and tensorflow_datasets, never tensorflow: TensorFlow Datasets reads and writes array_record
files without it.
"""

from dmd_jax.data.batches import Batches
from dmd_jax.data.bouncing_digits import BouncingDigits
from dmd_jax.data.images import Images, arrays, load
from dmd_jax.data.moving_digits import MovingDigits
from dmd_jax.data.pixels import to_float, to_uint8
from dmd_jax.data.prompts import Prompts
from dmd_jax.data.source import Source
from dmd_jax.data.trajectories import ImagePairs, OdePairs

__all__ = [
    "Batches",
    "BouncingDigits",
    "ImagePairs",
    "Images",
    "MovingDigits",
    "OdePairs",
    "Prompts",
    "Source",
    "arrays",
    "load",
    "to_float",
    "to_uint8",
]
