"""The judge: all quality numbers of a set of samples against one reference.

    test, train = arrays(load("mnist5k", "test")), arrays(load("mnist5k", "train"))
    judge = Judge(load_features(), test=test, train=train)
    judge(images, labels)       {'fd': ..., 'kid': ..., ...} of samples and their requested labels
    judge.floor()               the same numbers of real images

The test images are the reference. The train images show copies, and are the samples of the floor.
Imports metrics and the type of a feature network.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from dmd_jax.quality import metrics
from dmd_jax.quality.features import Features

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, C], int32 [N]


class Judge:
    """Judges samples against real images, whose features are computed once, here.

    Attributes:
        name: of the Fréchet distance, as `Features.name`.
        reference: the test images in words, for legends.
        fingerprint: SHA-256 (hex) over the feature network and both sets of real images. Numbers
            with different fingerprints are not comparable.
    """

    def __init__(
        self,
        features: Features,
        *,
        test: Labelled,
        train: Labelled,
        data: str | None = None,
        reference: str = "test images",
    ):
        """Extracts the features of the test images.

        Args:
            features: the feature network.
            test: the reference, images and labels, with two images of each class or more.
            train: the training images of the generator, of the same shape.
            data: name of the data set; accuracy is left out where the network is a classifier of
                another one.
            reference: the test images in words.

        Raises:
            ValueError: there are too few test images for the length of the features.
        """
        if len(test[0]) <= features.dim:
            raise ValueError(
                f"{features.name} has {features.dim} dimensions and needs more than {features.dim} "
                f"test images, not {len(test[0])}: take more, or a network with fewer features"
            )
        self.name, self.reference = features.name, reference
        self._extract = features.extract
        self._test_images, self._test_labels = test
        self._train_images, self._train_labels = train
        self._has_logits = features.classifies(data)
        self._real, self._real_logits = self._extract(self._test_images)
        self._real_kernel = metrics.mean_kernel(self._real)
        self._real_radii = metrics.neighbour_radii(self._real)
        self._real_diversity = metrics.class_diversity(self._real, self._test_labels)
        digest = hashlib.sha256(features.fingerprint.encode())
        for array in (*test, *train):
            digest.update(str((array.dtype, array.shape)).encode() + array.tobytes())
        self.fingerprint = digest.hexdigest()

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Judges samples.

        Args:
            images: uint8 [N, H, W, C], more than the length of the features.
            labels: int32 [N], the requested labels; every class of the test images, twice or more.

        Returns:
            fd, kid: `metrics.frechet_distance` and `kernel_distance` to the test images.
            precision, recall: against the test images, at equal counts (see `_blocks`).
            accuracy: share of samples that the network classifies as the requested label; absent
                where the network is no classifier of this data set.
            diversity: mean distance between two samples of a class, over the same of test images,
                averaged over classes; 1 is as diverse as real images.
            diversity_min: that of the class where it is least.
            nearest_train: median distance to the nearest train image in pixels (root mean square
                grey levels); compare with that of the floor.
            nearest_train_low: its first percentile, where single copies show.

        Raises:
            ValueError: shapes differ from the test images', or there are too few samples.
        """
        if images.shape[1:] != self._test_images.shape[1:] or len(images) != len(labels):
            raise ValueError(
                f"samples {images.shape} with {len(labels)} labels cannot be judged against "
                f"test images {self._test_images.shape}"
            )
        features, logits = self._extract(images)
        return (
            self._distances(features, labels)
            | self._accuracy(logits, labels)
            | self._nearest_train(images)
        )

    def floor(self, count: int = 2000) -> dict[str, float]:
        """The same numbers for real images, as far as real images can give them.

        The distances, precision, recall and diversity are those of train images, the first
        `count / K` of each class, judged as samples. Accuracy and nearest_train are those of the
        test images: the network learned from the train images, and they are copies of themselves.

        Args:
            count: N of the samples to compare with: all numbers but accuracy depend on N.

        Raises:
            ValueError: there are too few train images of a class.
        """
        rows = first_of_each_class(self._train_labels, count)
        features, _ = self._extract(self._train_images[rows])
        return (
            self._distances(features, self._train_labels[rows])
            | self._accuracy(self._real_logits, self._test_labels)
            | self._nearest_train(self._test_images)
        )

    def examples(self, labels: np.ndarray) -> np.ndarray:
        """The first test images of each class, for labels int [n]: uint8 [n, H, W, C]."""
        rows = np.empty(len(labels), np.intp)
        for label in np.unique(labels):
            places = np.flatnonzero(labels == label)
            rows[places] = np.flatnonzero(self._test_labels == label)[: len(places)]
        return self._test_images[rows]

    def _distances(self, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if missing := set(self._test_labels.tolist()) ^ set(labels.tolist()):
            raise ValueError(f"classes {sorted(missing)} are only in the samples or only in test")
        pairs = [
            metrics.precision_recall(self._real, block, real_radii=self._real_radii)
            for block in self._blocks(features, labels)
        ]
        precision, recall = np.mean(pairs, axis=0)
        diversity = metrics.class_diversity(features, labels) / self._real_diversity
        return {
            "fd": metrics.frechet_distance(self._real, features),
            "kid": metrics.kernel_distance(self._real, features, within_a=self._real_kernel),
            "precision": float(precision),
            "recall": float(recall),
            "diversity": float(diversity.mean()),
            "diversity_min": float(diversity.min()),
        }

    def _blocks(self, features: np.ndarray, labels: np.ndarray) -> Sequence[np.ndarray]:
        """Precision and recall depend on counts: blocks of about as many samples as test images.

        Every block has its share of every class. Fewer samples than test images make one block,
        and numbers that can only be compared at that count.
        """
        order = np.argsort(labels, kind="stable")
        blocks = max(1, len(features) // len(self._real))
        return [features[order[i::blocks]] for i in range(blocks)]

    def _accuracy(self, logits: np.ndarray | None, labels: np.ndarray) -> dict[str, float]:
        if logits is None or not self._has_logits:
            return {}
        return {"accuracy": metrics.accuracy(logits, labels)}

    def _nearest_train(self, images: np.ndarray) -> dict[str, float]:
        distance = metrics.nearest_distance(images, self._train_images)
        return {
            "nearest_train": float(np.median(distance)),
            "nearest_train_low": float(np.quantile(distance, 0.01)),
        }


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows of the first `count / K` members of each class, in the order of the rows: int [count].

    Raises:
        ValueError: K does not divide count, or a class has fewer members.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if count % len(classes) or count // len(classes) > sizes.min():
        raise ValueError(
            f"cannot take {count} images, equally many of each of {len(classes)} classes: "
            f"the smallest class has {sizes.min()}"
        )
    share = count // len(classes)
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:share] for c in classes]))
