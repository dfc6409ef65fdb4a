"""A split of labelled images by name: TensorFlow Datasets prepares it, array_record reads it.

`load` opens the embedded data, a data set of the TFDS catalogue and a builder of the user in the
same way. This file may import numpy, Pillow and tensorflow_datasets, never tensorflow.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import sys
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


class Images:
    """One split of images and labels, read at random positions; returned by `load`.

    Implements `Source`. `len(images)` is the number of examples; `images[i]` is
    {'image': uint8 [H, W, C], 'label': int}.

    Attributes:
        name, split, data_dir: the arguments of `load`.
        image_shape: (H, W, C).
        classes: names of the K classes; a label is an index into it.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],  # {'image': the bytes of a file, 'label': int}
        *,
        name: str,
        split: str,
        data_dir: str | None,
        image_shape: tuple[int, int, int],
        classes: Sequence[str],
    ):
        self.name = name
        self.split = split
        self.data_dir = data_dir
        self.image_shape = image_shape
        self.classes = tuple(classes)
        self._examples = examples
        # Decoding a PNG takes longer than all the rest of a batch. A small split is kept after its
        # first epoch; examples are decoded when first read, so that no start waits for all of them.
        self._kept = None
        if len(examples) * math.prod(image_shape) <= IN_MEMORY_BYTES:
            self._kept = self._empty(len(examples))
            self._is_kept = np.zeros(len(examples), bool)

    @property
    def num_classes(self) -> int:
        """K: labels are in [0, K)."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self.take([index])
        return {"image": images[0], "label": int(labels[0])}

    def take(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Reads n examples, in the order of `indices`. Several threads may read at once.

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
        """Shape of one sample of a generator."""
        return self.image_shape

    @property
    def model_fields(self) -> dict[str, int]:
        """Fields of a new network's config that follow from the data."""
        size, _, channels = self.image_shape
        return dict(image_size=size, channels=channels, num_classes=self.num_classes)

    @property
    def notes(self) -> dict[str, Any]:
        """Entries for the header of an exported network: none."""
        return {}

    def require_fit(self, what: str, model: Any) -> None:
        """Raises ValueError where the config of a network has other images or classes.

        Args:
            what: path of the network in the config, for the message.
            model: config of the network.
        """
        makes = getattr(model, "sample_shape", None), getattr(model, "num_classes", None)
        has = self.image_shape, self.num_classes
        if None in makes:
            raise ValueError(
                f"{what} is a {type(model).__name__} network, which does not generate images of a "
                f"class; the data set {self.name!r} has images {has[0]} of {has[1]} classes"
            )
        if makes != has:
            raise ValueError(
                f"{what} makes images {makes[0]} of {makes[1]} classes, but the data set "
                f"{self.name!r} has {has[0]} of {has[1]}"
            )

    # What follows is for reports (`quality.evaluation`).

    measures: ClassVar[Mapping[str, str]] = {}  # images are judged through a feature network

    @property
    def columns(self) -> int:
        """Number of pictures in a row."""
        return self.num_classes

    def preview_conditions(self) -> tuple[np.ndarray, np.ndarray]:
        """(conditions, unconditional inputs) of the samples to show: eight of each class."""
        labels = np.arange(8 * self.num_classes, dtype=np.int32) % self.num_classes
        conditions = self._conditions(labels)
        return conditions["cond"], conditions["uncond"]

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Samples float [N, H, W, C] as uint8 pictures of the same shape."""
        return to_uint8(x0)

    def examples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The part of a batch that n examples make.

        Returns:
            {"data": float32 [n, H, W, C] in [-1, 1], "cond": int32 [n], "uncond": int32 [n]}.
            "cond" holds the labels, "uncond" the label `num_classes`, which means no class.
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


def load(name: str, split: str, data_dir: str | None = None) -> Images:
    """Opens one split of a data set; prepares the data set first if it is not on disk.

    Args:
        name: 'mnist5k', or anything that `tfds.builder` takes: a name of the catalogue
            ('cifar10'), one with a configuration ('imagenet_resized/64x64'), a builder whose
            module has been imported, or a data set that is prepared in `data_dir`.
        split: 'train', 'test', a slice ('train[:90%]') or a sum ('train+test').
        data_dir: directory of prepared data sets. None is the default of TFDS: $TFDS_DATA_DIR, or
            ~/tensorflow_datasets.

    Raises:
        ValueError: there is no such data set or split; it is not uint8 images of one size with
            class labels; it cannot be downloaded or written; or it was prepared before, in a
            format without random access.
    """
    # Imported here because it takes seconds, and a program that samples needs no data.
    import tensorflow_datasets as tfds

    builder = _find(name, data_dir)
    # Before any download: the features are known without the data.
    image_shape, classes = _image_and_label(name, builder.info.features)
    builder = _prepare(builder, name, data_dir)
    try:
        # Encoded, for Pillow: TFDS decodes with OpenCV where that happens to be installed, and two
        # decoders of JPEG are two sets of pixels.
        encoded = {"image": tfds.decode.SkipDecoding()}
        examples = builder.as_data_source(split, decoders=encoded)
    except NotImplementedError as error:
        raise ValueError(
            f"{name!r} is stored in {builder.data_dir} as {builder.info.file_format.value}, which "
            "has no random access. Give another data_dir, or delete that directory: the data set "
            "is then prepared again, as array_record."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"cannot read split {split!r} of {name!r}, which has {list(builder.info.splits)}: "
            f"{error}"
        ) from error
    return Images(
        examples,
        name=name,
        split=split,
        data_dir=data_dir,
        image_shape=image_shape,
        classes=classes,
    )


def arrays(images: Images, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split into memory.

    Args:
        images: a split of N examples.
        limit: of a larger split, so many examples are read, at even distances; None is no limit.

    Returns:
        (images uint8 [n, H, W, C], labels int32 [n]) in the order of the split.
    """
    count = len(images)
    if limit is not None and count > limit:
        return images.take(np.arange(limit) * count // limit)
    return images.take(range(count))


def _find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of that name; its data may or may not be on disk."""
    import tensorflow_datasets as tfds

    from dmd_jax.data import mnist5k  # noqa: F401  Registers the embedded data set.

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
    # The configuration, the version, or a data_dir that cannot be reached.
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"cannot open data set {name!r}: {error}") from error


def _image_and_label(
    name: str, features: tfds.features.FeatureConnector
) -> tuple[tuple[int, int, int], list[str]]:
    """The shape of the images and the names of the classes."""
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
    return image.shape, label.names


def _prepare(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: str | None
) -> tfds.core.DatasetBuilder:
    """Downloads and writes the data set unless it is on disk; returns its builder."""
    import tensorflow_datasets as tfds

    if not builder.data_path.exists():
        size = builder.info.download_size
        download = f" (a download of {size})" if size else ""
        print(f"preparing data set {name!r} in {builder.data_dir}{download}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        # TFDS writes into a directory of its own and renames it when complete. It announces that
        # on standard output, which belongs to the program.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
        return builder
    except Exception as error:  # A builder may raise anything.
        if builder.data_path.exists():
            # Another process prepared the same data meanwhile and was the first to rename.
            return _find(name, data_dir)
        raise ValueError(
            f"cannot prepare {name!r} in {builder.data_dir}: {type(error).__name__}: {error}\n"
            "The first use of a data set downloads and writes it. Where there is no network or "
            "no writable disk, prepare it on another machine and give its directory as data_dir."
        ) from error
