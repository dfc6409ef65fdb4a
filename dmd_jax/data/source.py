"""A split of a data set by name: TensorFlow Datasets prepares it once, array_record reads it.

`load` is the only door: the embedded data, a name of the TFDS catalogue and a builder of the
user's own take the same path. This file may import numpy, Pillow and tensorflow_datasets, never
tensorflow.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from dmd_jax.data.pixels import to_float, to_uint8

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# A split of at most this many decoded bytes is kept once decoded (CIFAR-10 and SVHN fit).
IN_MEMORY_BYTES = 256 * 2**20

# Pillow's name for an image of that many channels.
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Source:
    """One split of images and labels, read at random positions. Made by `load`.

    `len(source)` is the number of examples; `source[i]` is {'image': uint8 [H, W, C],
    'label': int}.

    Attributes:
        name: the data set, as given to `load`.
        split: the split, as given to `load`.
        image_shape: (H, W, C).
        num_classes: labels are in [0, num_classes).
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],  # {'image': the bytes of a file, 'label': int}
        *,
        name: str,
        split: str,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ):
        self.name = name
        self.split = split
        self.image_shape = image_shape
        self.num_classes = num_classes
        self._examples = examples
        # Decoding a PNG takes longer than all the rest of a batch. A small split pays for it once,
        # example by example as they are asked for: nobody waits for the whole of it at the start.
        self._kept = None
        if len(examples) * math.prod(image_shape) <= IN_MEMORY_BYTES:
            self._kept = self._empty(len(examples))
            self._is_kept = np.zeros(len(examples), bool)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self.take([index])
        return {"image": images[0], "label": int(labels[0])}

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Reads n examples at once, in the order asked for. Several threads may read together.

        Args:
            indices: n integers in [0, len(self)); repeats are allowed.

        Returns:
            (images uint8 [n, H, W, C], labels int32 [n]), copies that the caller may change.

        Raises:
            IndexError: an index is out of range.
        """
        rows = np.asarray(indices, np.intp)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise IndexError(f"{self.name} {self.split} has no row {outside[0]} in {len(self)}")
        if self._kept is None:
            read = self._empty(len(rows))
            self._decode(rows, into=read, at=range(len(rows)))
            return read
        missing = rows[~self._is_kept[rows]]
        self._decode(missing, into=self._kept, at=missing)
        self._is_kept[missing] = True
        images, labels = self._kept
        return images[rows], labels[rows]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of what a generator of such data makes."""
        return self.image_shape

    @property
    def model_fields(self) -> dict[str, int]:
        """What the config of a new network need not say, since the data do."""
        size, _, channels = self.image_shape
        return dict(image_size=size, channels=channels, num_classes=self.num_classes)

    @property
    def notes(self) -> dict[str, Any]:
        """What the file of a network trained on such data must say of them: nothing."""
        return {}

    # What the data can tell of samples, in words by name: nothing, a `Judge` can.
    measures: ClassVar[Mapping[str, str]] = {}

    @property
    def columns(self) -> int:
        """How many pictures of `shown` make a row."""
        return self.num_classes

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Conditions worth looking at, and what guidance leaves them for: eight of each class."""
        told = self._conditions(np.arange(8 * self.num_classes, dtype=np.int32) % self.num_classes)
        return told["cond"], told["uncond"]

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Samples [N, H, W, C] as bytes to look at."""
        return to_uint8(x0)

    def require_fit(self, what: str, model: Any) -> None:
        """Raises ValueError where a network's config names other images or classes than these."""
        makes, has = (model.sample_shape, model.num_classes), (self.image_shape, self.num_classes)
        if makes != has:
            raise ValueError(
                f"{what} makes images {makes[0]} of {makes[1]} classes, but the data set "
                f"{self.name!r} has {has[0]} of {has[1]}"
            )

    def examples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """What training sees of n examples.

        Returns:
            {"data": float32 [n, H, W, C] in [-1, 1], "cond": int32 [n], "uncond": int32 [n]}: the
            labels, and the label `num_classes`, which stands for none.
        """
        images, labels = self.take(rows)
        return {"data": to_float(images), **self._conditions(labels)}

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """`examples` without "data": decodes no image."""
        return self._conditions(np.array([self._examples[r]["label"] for r in rows], np.int32))

    def _conditions(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {"cond": labels, "uncond": np.full_like(labels, self.num_classes)}

    def _empty(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((count, *self.image_shape), np.uint8), np.empty(count, np.int32)

    def _decode(
        self, rows: np.ndarray, *, into: tuple[np.ndarray, np.ndarray], at: Sequence[int]
    ) -> None:
        images, labels = into
        mode = PILLOW_MODES[self.image_shape[-1]]
        for row, place in zip(rows, at, strict=True):
            example = self._examples[row]
            with Image.open(io.BytesIO(example["image"])) as image:
                images[place] = np.asarray(image.convert(mode)).reshape(self.image_shape)
            labels[place] = example["label"]


def load(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens one split of a data set, preparing the data set first where that was never done.

    Args:
        name: 'mnist5k', or anything that `tfds.builder` takes: a name of the catalogue
            ('cifar10'), one with a configuration ('imagenet_resized/64x64'), a builder whose
            module has been imported, or a data set that stands prepared in `data_dir`.
        split: 'train', 'test', a slice ('train[:90%]') or a sum ('train+test').
        data_dir: where data sets stand. None is TFDS' own default: $TFDS_DATA_DIR, or
            ~/tensorflow_datasets.

    Returns:
        The split.

    Raises:
        ValueError: there is no such data set or split; it is not uint8 images of one size with
            class labels; it cannot be downloaded or written; or it was prepared before, in a
            format without random access.
    """
    # Imported where it is used: a program that samples without data need not pay for it.
    import tensorflow_datasets as tfds

    builder = _find(name, data_dir)
    # Before any download: the features are known without the data.
    image_shape, num_classes = _image_and_label(name, builder.info.features)
    builder = _prepare(builder, name, data_dir)
    try:
        # Encoded, for Pillow: TFDS decodes with OpenCV where that happens to be installed, and two
        # decoders of JPEG are two sets of pixels.
        encoded = {"image": tfds.decode.SkipDecoding()}
        examples = builder.as_data_source(split, decoders=encoded)
    except NotImplementedError as error:
        raise ValueError(
            f"{name!r} stands in {builder.data_dir} as {builder.info.file_format.value}, which "
            "has no random access. Give another data_dir, or delete that directory: the data set "
            "is then prepared anew, as array_record."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"cannot read split {split!r} of {name!r}, which has {list(builder.info.splits)}: "
            f"{error}"
        ) from error
    return Source(
        examples, name=name, split=split, image_shape=image_shape, num_classes=num_classes
    )


def arrays(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split into memory.

    Args:
        source: a split of N examples.

    Returns:
        (images uint8 [N, H, W, C], labels int32 [N]) in the order of the source.
    """
    return source.take(range(len(source)))


def _find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of that name; its data may or may not be on disk."""
    import tensorflow_datasets as tfds

    from dmd_jax.data import mnist5k  # noqa: F401  The import registers the embedded data set.

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0], known)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        # Not chained: the original lists all the thousand names.
        raise ValueError(
            f"there is no data set {name!r}. {hint}A name is one of the TFDS catalogue, of a "
            "builder whose module the config imports, or of a data set prepared in "
            f"{data_dir or 'the default data_dir'}."
        ) from None
    except (ValueError, AssertionError) as error:  # The configuration or the version.
        raise ValueError(f"cannot open data set {name!r}: {error}") from error


def _image_and_label(
    name: str, features: tfds.features.FeatureConnector
) -> tuple[tuple[int, int, int], int]:
    """The image shape and the number of classes, of a data set that has both."""
    import tensorflow_datasets as tfds

    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        kinds = {key: type(feature).__name__ for key, feature in found.items()}
        raise ValueError(
            f"{name!r} must have the features 'image' (Image) and 'label' (ClassLabel); it has "
            f"{kinds}. Write a builder that yields these two (docs/data.md)."
        )
    size, channels = image.shape[:-1], image.shape[-1]
    if image.np_dtype != np.uint8 or None in size or channels not in PILLOW_MODES:
        raise ValueError(
            f"the images of {name!r} must be uint8, of one size, with {list(PILLOW_MODES)} "
            f"channels; they are {np.dtype(image.np_dtype)} {image.shape}. Write a builder that "
            "converts them (docs/data.md)."
        )
    return image.shape, label.num_classes


def _prepare(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: str | None
) -> tfds.core.DatasetBuilder:
    """Downloads and writes the data set unless it is on disk; returns its builder."""
    try:
        # TFDS writes into a directory of its own and renames it when complete.
        builder.download_and_prepare(file_format="array_record")
        return builder
    except Exception as error:  # Whatever a builder, anybody's, may raise.
        if builder.data_path.exists():
            # Another process prepared the same data meanwhile and was the first to rename.
            return _find(name, data_dir)
        raise ValueError(
            f"cannot prepare {name!r} in {builder.data_dir}: {type(error).__name__}: {error}\n"
            "The first use of a data set downloads and writes it. Where there is no network or "
            "no writable disk, prepare it on another machine and give its directory as data_dir."
        ) from error
