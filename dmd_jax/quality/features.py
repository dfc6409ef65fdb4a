"""The feature network that distances are measured in: images in, rows of numbers out.

The shipped one is a small classifier of digits, trained by `python -m dmd_jax.metric_network` on
the train split alone. Its distance is called FD-MNIST64 because it is not comparable with an
Inception FID. Inception is read from a weights file of the user. Any other network is a `Features`:

    Features("FD-mine", fingerprint, D, extract)    extract(uint8 [N, H, W, C]) -> ([N, D], None)

Imports the network families, `weights` for the shipped files, and the data room's pixels.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmd_jax import weights
from dmd_jax.data import Images, to_float
from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves, path_name
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.inception import fold, inception

SHIPPED = "mnist_metric"
HEADER = "dmd_jax.metric"
BATCH = 250
INCEPTION_BATCH = 50  # its first layers take 6 MB per image
INCEPTION_DIM = 2048


@dataclasses.dataclass(frozen=True)
class Features:
    """A feature network and the name of a distance in its features.

    Attributes:
        name: the metric's name in tables and figures, such as "FD-MNIST64".
        fingerprint: changes when the network does; a SHA-256 of its weights is right.
        dim: D, the length of a row of features.
        extract: uint8 [N, H, W, C] -> (features float [N, D], logits float [N, K]); None in place
            of the logits where the network does not classify.
        channels: the numbers of channels of the images that it takes; None for any.
        data: the data set that it learned to classify; None where it has no logits or the file
            does not say.
        classes: names of the K classes of that data set; None for any.
    """

    name: str
    fingerprint: str
    dim: int
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    channels: tuple[int, ...] | None = None
    data: str | None = None
    classes: tuple[str, ...] | None = None

    def require_fit(self, images: Images) -> None:
        """Raises ValueError where the network cannot judge such images; computes nothing."""
        remedy = (
            f"train a network for it, python -m dmd_jax.metric_network --data={images.name} "
            f"--out={images.name.replace('/', '_')}_metric.safetensors, or choose another"
        )
        channels = images.image_shape[-1]
        if self.channels is not None and channels not in self.channels:
            raise ValueError(
                f"{self.name} takes images of {' or '.join(map(str, self.channels))} channels, but "
                f"the data set {images.name!r} has {channels}: {remedy}"
            )
        if self.classes not in (None, images.classes):
            raise ValueError(
                f"{self.name} is a classifier of {_few(self.classes)} (data set {self.data!r}), "
                f"but {images.name!r} has the classes {_few(images.classes)}: {remedy}"
            )

    def classifies(self, data: str) -> bool:
        """Whether the logits are those of a classifier of that data set."""
        return self.data == data


def load_features(path: str | Path = SHIPPED) -> Features:
    """The feature network in a safetensors file.

    It is a classifier that `metric_network.py` trained, or InceptionV3 with the names that
    torch-fidelity gives its tensors, whose distance is called FID.

    Args:
        path: the file, or the name of a shipped one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds neither, its header is damaged, its tensors differ from what the
            network needs, or numbers are infinite or NaN. `extract` raises it for images of another
            number of channels, or that are not uint8.
    """
    path = weights.find(path)
    header, tensors = _read(path)
    if header:
        return _of_classifier(path, header, tensors)[0]
    if "Mixed_5b.branch1x1.conv.weight" in tensors:
        look = _inception_extract(path, tensors)
        return Features("FID", fingerprint(tensors), INCEPTION_DIM, look, channels=(1, 3))
    raise ValueError(
        f"{path} holds neither a metric network (of python -m dmd_jax.metric_network) nor "
        "the weights of Inception"
    )


def load_classifier(path: str | Path, images: Images) -> Classifier:
    """The classifier that `metric_network.py` trained, for images that it fits.

    Raises:
        FileNotFoundError, ValueError: as `load_features`; or the file holds no classifier, or one
            of other images or classes.
    """
    path = weights.find(path)
    header, tensors = _read(path)
    if not header:
        raise ValueError(f"{path} holds no classifier of python -m dmd_jax.metric_network")
    features, classifier = _of_classifier(path, header, tensors)
    features.require_fit(images)
    return classifier


def _of_classifier(path, header, tensors) -> tuple[Features, Classifier]:
    """(its features, the network) of a file of `save_classifier`."""
    try:
        name, config = str(header["name"]), ClassifierConfig(**header["model"])
        classes = tuple(header["classes"]) if "classes" in header else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header is of no metric network: {error!r}") from None
    classifier = _classifier(path, config, tensors)
    features = Features(
        name,
        fingerprint(tensors),
        config.features,
        functools.partial(extract, classifier),
        (config.channels,),
        header.get("data"),
        classes,
    )
    return features, classifier


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes; a header may change without it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + tensor.tobytes())
    return digest.hexdigest()


def save_classifier(
    path: str | Path, name: str, classifier: Classifier, *, data: str, classes: Sequence[str]
) -> None:
    """Writes a classifier as safetensors.

    Args:
        path: the file.
        name: of the metric (see `Features`).
        classifier: the network.
        data: name of the data set that it learned from.
        classes: names of the classes of that data set.
    """
    tensors = {path: np.asarray(leaf) for path, leaf in named_leaves(classifier).items()}
    header = {"name": name, "model": dataclasses.asdict(classifier.config)}
    header |= {"data": data, "classes": list(classes)}
    save_file(tensors, path, {HEADER: json.dumps(header)})


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)})"


def extract(classifier: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D], logits [N, K]) of uint8 [N, H, W, C], in batches of one compiled size."""
    if images.ndim != 4 or images.shape[-1] != classifier.config.channels:
        raise ValueError(
            f"the metric network takes [N, H, W, {classifier.config.channels}], not images "
            f"{images.shape}: train one on your data with python -m dmd_jax.metric_network"
        )
    classifier = sharding.replicate(classifier)
    logits, features = _in_batches(
        lambda batch: _classify(classifier, to_float(batch)), images, BATCH
    )
    return features, logits


@jax.jit
def _classify(classifier: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return classifier(sharding.shard_batch(images))


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
        run = functools.partial(_look, sharding.replicate(folded))
        return _in_batches(run, colour, INCEPTION_BATCH), None

    return extract_inception


@jax.jit
def _look(folded: dict, images: jax.Array) -> jax.Array:
    return inception(folded, sharding.shard_batch(images))


def _in_batches(function: Callable, images: np.ndarray, size: int) -> np.ndarray | tuple:
    """The function's arrays for all images, computed in batches of one size.

    Where there is a mesh, its devices share each batch.
    """
    size = sharding.even_batch(size)
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filled = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
        out = jax.device_get(sharding.replicate(function(filled)))
        parts.append(jax.tree.map(lambda x: x[: len(batch)], out))  # noqa: B023
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _read(path: Path) -> tuple[dict | None, dict[str, np.ndarray]]:
    """(the header of `save_classifier` or None, {name: tensor})."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {_few(broken)}: numbers are infinite or NaN")
    try:
        return header and json.loads(header), tensors
    except ValueError as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from None


def _classifier(path: Path, config: ClassifierConfig, tensors: dict[str, np.ndarray]) -> Classifier:
    abstract = jax.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    if differences := weights.differing(weights.shapes(abstract), weights.shapes(tensors)):
        raise ValueError(f"{path} does not hold the network of its header:\n{differences}")
    return jax.tree_util.tree_map_with_path(
        lambda p, _: jnp.asarray(tensors[path_name(p)], jnp.float32), abstract
    )
