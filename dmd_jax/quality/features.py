"""What the distances are measured in: a network that turns images into rows of numbers.

The shipped one is a small classifier of digits, trained by `metric_network.py` on the train split
and nothing else; its distance is called FD-MNIST64, because it is not comparable with any Inception
FID. Inception itself is read from a weights file of the user's; any other network is a `Features`:

    Features("FD-mine", fingerprint, D, extract)    extract(uint8 [N, H, W, C]) -> ([N, D], None)

Imports the network families, `weights` for the shipped files, and the data room's pixels.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmd_jax import weights
from dmd_jax.data import to_float
from dmd_jax.devices.paths import named_leaves, path_name
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.inception import fold, inception

SHIPPED = "mnist_metric"
HEADER = "dmd_jax.metric"
BATCH = 250
INCEPTION_BATCH = 50  # Its first layers take 6 MB an image.
INCEPTION_DIM = 2048


@dataclasses.dataclass(frozen=True)
class Features:
    """A feature network and what to call a distance in its features.

    Attributes:
        name: the metric's name in tables and figures, such as "FD-MNIST64".
        fingerprint: changes when the network does; a SHA-256 of its weights is right.
        dim: D, the length of a row of features.
        extract: uint8 [N, H, W, C] -> (features float [N, D], logits float [N, K]), or None in
            place of the logits where the network does not classify what is generated.
    """

    name: str
    fingerprint: str
    dim: int
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def load_features(path: str | Path = SHIPPED) -> Features:
    """The feature network in a safetensors file, whichever of the two kinds it is.

    A classifier that `metric_network.py` trained; or InceptionV3 with the names that torch-fidelity
    gives its tensors, whose distance is called FID.

    Args:
        path: the file, or the name of a shipped one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds neither, or its tensors differ from what the network needs. `extract`
            raises it for images of another number of channels, or that are not uint8.
    """
    path = weights.find(path)
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    header, tensors = _read(path)
    if header:
        classifier = _classifier(path, header, tensors)
        dim = classifier.config.features
        return Features(header["name"], fingerprint, dim, functools.partial(extract, classifier))
    if "Mixed_5b.branch1x1.conv.weight" in tensors:
        return Features("FID", fingerprint, INCEPTION_DIM, _inception_extract(path, tensors))
    raise ValueError(
        f"{path} holds neither a metric network (made by python -m dmd_jax.metric_network) nor "
        "the weights of Inception"
    )


def save_classifier(path: str | Path, name: str, classifier: Classifier) -> None:
    """Writes a classifier as safetensors; `name` is the metric's (see `Features`)."""
    tensors = {path: np.asarray(leaf) for path, leaf in named_leaves(classifier).items()}
    header = {"name": name, "model": dataclasses.asdict(classifier.config)}
    save_file(tensors, path, {HEADER: json.dumps(header)})


def extract(classifier: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D], logits [N, K]) of uint8 [N, H, W, C], in batches of one compiled size."""
    if images.ndim != 4 or images.shape[-1] != classifier.config.channels:
        raise ValueError(
            f"the metric network takes [N, H, W, {classifier.config.channels}], not images "
            f"{images.shape}: train one on your data with python -m dmd_jax.metric_network"
        )
    logits, features = _in_batches(
        lambda batch: _classify(classifier, to_float(batch)), images, BATCH
    )
    return features, logits


@jax.jit
def _classify(classifier: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return classifier(images)


def _inception_extract(path: Path, tensors: dict[str, np.ndarray]) -> Callable:
    """`Features.extract` of Inception; grey images become three equal channels."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    try:
        folded = fold(tensors)
        jax.eval_shape(inception, folded, image)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold all of Inception: {error}") from error

    def extract_inception(images):
        colour = np.broadcast_to(images, (*images.shape[:3], 3))
        run = functools.partial(jax.jit(inception), folded)
        return _in_batches(run, colour, INCEPTION_BATCH), None

    return extract_inception


def _in_batches(function: Callable, images: np.ndarray, size: int) -> np.ndarray | tuple:
    """The function's arrays for all images, computed in batches of one size."""
    filled = np.pad(images, [(0, -len(images) % size), (0, 0), (0, 0), (0, 0)])
    batches = [jax.device_get(function(b)) for b in np.split(filled, len(filled) // size)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *batches)


def _read(path: Path) -> tuple[dict | None, dict[str, np.ndarray]]:
    """(our header or None, {name: tensor})."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    return header and json.loads(header), tensors


def _classifier(path: Path, header: dict, tensors: dict[str, np.ndarray]) -> Classifier:
    config = ClassifierConfig(**header["model"])
    abstract = jax.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    if differences := weights.differing(weights.shapes(abstract), weights.shapes(tensors)):
        raise ValueError(f"{path} does not hold the network of its header:\n{differences}")
    return jax.tree_util.tree_map_with_path(
        lambda p, _: jnp.asarray(tensors[path_name(p)]), abstract
    )
