"""Distances between a set of samples and a set of real images, as pure functions of arrays.

Imports only numpy and scipy. A feature is a row of numbers; `features.py` says which network
computes it. Everything is computed in float64, because the results are small differences of large
sums. Tables of pairwise values are computed in blocks of `BLOCK` rows, which bounds their memory.
"""

from collections.abc import Iterator

import numpy as np

BLOCK = 1024


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017).

    Covariances are the unbiased ones. The estimate itself is biased upwards by finite samples,
    roughly as 1/Na + 1/Nb: compare values at equal counts only, and with that of real images.

    Args:
        features_a: [Na, D].
        features_b: [Nb, D].

    Raises:
        ValueError: D differs, or a set has no more than D samples, so that its covariance is
            singular and the distance mostly measures the number of samples.
    """
    a, b = _matching(features_a, features_b)
    dim = a.shape[1]
    if min(len(a), len(b)) <= dim:
        raise ValueError(
            f"frechet_distance of {len(a)} against {len(b)} samples in {dim} dimensions: each side "
            f"needs more than {dim} samples. Draw more, or use kernel_distance, which is unbiased."
        )
    return gaussian_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance.

    Dowson and Landau 1982, eq. 4. The last trace is the sum of the singular values of
    A^(1/2) B^(1/2): symmetric eigendecompositions only, so a singular covariance gives neither
    complex numbers nor the need for an offset on the diagonal.

    Args:
        mean_a, mean_b: [D].
        cov_a, cov_b: [D, D], symmetric, positive semi-definite.
    """
    cross = np.linalg.svd(_symmetric_sqrt(cov_a) @ _symmetric_sqrt(cov_b), compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(
    features_a: np.ndarray, features_b: np.ndarray, *, within_a: float | None = None
) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    The estimator is that of Gretton et al. 2012, eq. 3, over all samples at once. The published
    Kernel Inception Distance averages the same estimator over random subsets: the expectation is
    the same, and all samples at once has less variance and needs no random numbers. Being
    unbiased it is zero on average for equal distributions, and may be negative.

    Args:
        features_a: [Na, D], Na >= 2.
        features_b: [Nb, D], Nb >= 2.
        within_a: `mean_kernel(features_a)` where it is known.

    Raises:
        ValueError: D differs, or a side has fewer than two samples.
    """
    a, b = _matching(features_a, features_b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"kernel_distance of {len(a)} against {len(b)} samples: needs 2 of each.")
    within_a = mean_kernel(a) if within_a is None else within_a
    cross = _kernel_sum(a, b) / (len(a) * len(b))
    return float(within_a + mean_kernel(b) - 2 * cross)


def mean_kernel(features: np.ndarray) -> float:
    """Mean of the kernel of `kernel_distance` over the pairs of distinct rows of [N, D]."""
    x = np.asarray(features, np.float64)
    diagonal = _kernel(np.square(x).sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _kernel_sum(a, b):
    return sum(_kernel(a[rows] @ b.T, a.shape[1]).sum() for rows in _blocks(len(a)))


def _kernel(dot_products, dim):
    return (dot_products / dim + 1) ** 3


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 3, *, real_radii: np.ndarray | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set's manifold is the union of balls around its members, each reaching to the member's k-th
    nearest neighbour in the set. Precision: the share of `fake` inside the manifold of `real`.
    Recall: the share of `real` inside the manifold of `fake`. The balls shrink as a set grows:
    compare only values at equal counts, and keep the two counts alike.

    Args:
        real: [Nr, D], Nr > k.
        fake: [Nf, D], Nf > k.
        real_radii: `neighbour_radii(real, k)` where it is known.

    Raises:
        ValueError: D differs, or a set has no more than k members.
    """
    real, fake = _matching(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision_recall of {len(real)} real and {len(fake)} fake samples with k={k}: "
            f"each side needs more than {k}."
        )
    real_radii = neighbour_radii(real, k) if real_radii is None else real_radii
    fake_radii = neighbour_radii(fake, k)
    fake_inside = np.zeros(len(fake), bool)
    real_inside = np.zeros(len(real), bool)
    for rows in _blocks(len(fake)):
        squared = _squared_distances(fake[rows], real)
        fake_inside[rows] = (squared <= real_radii).any(1)
        real_inside |= (squared <= fake_radii[rows, None]).any(0)
    return float(fake_inside.mean()), float(real_inside.mean())


def neighbour_radii(x: np.ndarray, k: int = 3) -> np.ndarray:
    """Squared distance of each row of [N, D] to its k-th nearest other row: float64 [N]."""
    x = np.asarray(x, np.float64)
    # Position 0 is the row itself.
    nearest = [np.partition(_squared_distances(x[rows], x), k)[:, k] for rows in _blocks(len(x))]
    return np.concatenate(nearest)


def class_diversity(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance between two samples of one class, for every class in `labels`.

    A generator that has collapsed shows here class by class, which recall, computed over all
    classes at once, may hide.

    Args:
        features: [N, D].
        labels: int [N].

    Returns:
        float64 [number of distinct labels], in the order of `np.unique(labels)`.

    Raises:
        ValueError: a class has a single sample.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        lonely = classes[counts < 2].tolist()
        raise ValueError(f"class_diversity needs 2 samples of each class; {lonely} have one.")
    from scipy.spatial.distance import pdist  # a tenth of what a command imports at its start

    return np.array([pdist(np.asarray(features, np.float64)[labels == c]).mean() for c in classes])


def nearest_distance(samples: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Distance from every sample to the nearest reference: near zero where it is a copy.

    Compare it with the same distance from unseen real images. Samples that are nearer than those
    are copies, or smoother than real images.

    Args:
        samples: [N, ...]; images are flattened.
        references: [M, ...], the same trailing shape. It is converted to float64 block by block.

    Returns:
        float64 [N], the root mean square difference in the units of the arguments (grey levels
        for uint8 images). Exactly zero for an exact copy of uint8 values.

    Raises:
        ValueError: the trailing shapes differ.
    """
    samples, references = (np.reshape(x, (len(x), -1)) for x in (samples, references))
    _require_matching(samples, references)
    squared = np.full(len(samples), np.inf)
    for rows in _blocks(len(samples)):
        some = samples[rows].astype(np.float64)
        for others in _blocks(len(references)):
            distances = _squared_distances(some, references[others].astype(np.float64))
            squared[rows] = np.minimum(squared[rows], distances.min(1))
    return np.sqrt(squared / samples.shape[1])


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose most likely class is the label: logits [N, K], labels int [N]."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def _matching(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N, D]; refuses rows of different lengths."""
    _require_matching(a, b)
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def _require_matching(a: np.ndarray, b: np.ndarray) -> None:
    if np.ndim(a) != 2 or np.ndim(b) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Expected [Na, D] and [Nb, D], got {np.shape(a)} and {np.shape(b)}.")


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _covariance(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    # Rounding leaves the null space of a singular covariance slightly negative.
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[Na, Nb] through one matrix product, which is what makes thousands of rows cheap."""
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.maximum(squared, 0)
