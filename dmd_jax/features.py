"""What the distances are measured in: a network that turns images into rows of numbers.

The shipped one is a small classifier of digits, trained by `metric_network.py` on the train split
and nothing else; its distance is called FD-MNIST64, because it is not comparable with any Inception
FID. Another network, Inception included, is one `Features` with a name of its own:

    Features("FID", fingerprint, extract)      extract(uint8 [N, H, W, C]) -> (float [N, D], None)

Imports the classifier, `weights` for the shipped files, and the data room's pixels.
"""

import dataclasses
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
from dmd_jax.models.classifier import Classifier, ClassifierConfig
from dmd_jax.paths import named_leaves, path_name

SHIPPED = "mnist_metric"
HEADER = "dmd_jax.metric"
BATCH = 250


@dataclasses.dataclass(frozen=True)
class Features:
    """A feature network and what to call a distance in its features.

    Attributes:
        name: the metric's name in tables and figures, such as "FD-MNIST64".
        fingerprint: changes when the network does; a SHA-256 of its weights is right.
        extract: uint8 [N, H, W, C] -> (features float [N, D], logits float [N, K]), or None in
            place of the logits where the network does not classify what is generated.
    """

    name: str
    fingerprint: str
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def load_features(path: str | Path = SHIPPED) -> Features:
    """The features of a classifier that `metric_network.py` trained.

    Args:
        path: its safetensors file, or the name of a shipped one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold such a classifier, or its tensors differ from its header
            (every differing path is named with both shapes). `extract` raises it for images of
            another number of channels, or that are not uint8.
    """
    path = weights.find(path)
    name, classifier = load_classifier(path)
    return Features(
        name, hashlib.sha256(path.read_bytes()).hexdigest(), lambda x: extract(classifier, x)
    )


def save_classifier(path: str | Path, name: str, classifier: Classifier) -> None:
    """Writes a classifier as safetensors; `name` is the metric's (see `Features`)."""
    tensors = {path: np.asarray(leaf) for path, leaf in named_leaves(classifier).items()}
    header = {"name": name, "model": dataclasses.asdict(classifier.config)}
    save_file(tensors, path, {HEADER: json.dumps(header)})


def load_classifier(path: str | Path) -> tuple[str, Classifier]:
    """(metric name, classifier) of a file of `save_classifier`; errors as in `load_features`."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    if header is None:
        raise ValueError(
            f"{path} holds no metric network: make one with python -m dmd_jax.metric_network"
        )
    header = json.loads(header)
    config = ClassifierConfig(**header["model"])
    abstract = jax.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    if differences := weights.differing(weights.shapes(abstract), weights.shapes(tensors)):
        raise ValueError(f"{path} does not hold the network of its header:\n{differences}")
    classifier = jax.tree_util.tree_map_with_path(
        lambda p, _: jnp.asarray(tensors[path_name(p)]), abstract
    )
    return header["name"], classifier


def extract(classifier: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D], logits [N, K]) of uint8 [N, H, W, C], in batches of one compiled size."""
    if images.ndim != 4 or images.shape[-1] != classifier.config.channels:
        raise ValueError(
            f"the metric network takes [N, H, W, {classifier.config.channels}], not images "
            f"{images.shape}: train one on your data with python -m dmd_jax.metric_network"
        )
    features, logits = [], []
    for start in range(0, len(images), BATCH):
        batch = to_float(images[start : start + BATCH])
        padding = [(0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)]
        batch_logits, batch_features = jax.device_get(_apply(classifier, np.pad(batch, padding)))
        features.append(batch_features[: len(batch)])
        logits.append(batch_logits[: len(batch)])
    return np.concatenate(features), np.concatenate(logits)


@jax.jit
def _apply(classifier: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return classifier(images)
