"""The quality metrics against closed forms and scipy's own algorithms."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from dmd_jax.quality import metrics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def random_covariance(dim, seed):
    root = normal(dim, dim + 3, seed=seed)
    return root @ root.T


# Fréchet distance


def test_gaussian_distance_of_diagonal_covariances_is_the_closed_form():
    mean_a, mean_b = normal(6, seed=1), normal(6, seed=2)
    var_a, var_b = np.exp(normal(6, seed=3)), np.exp(normal(6, seed=4))
    expected = np.sum((mean_a - mean_b) ** 2 + (np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    distance = metrics.gaussian_distance(mean_a, np.diag(var_a), mean_b, np.diag(var_b))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_gaussian_distance_of_correlated_gaussians_agrees_with_scipy_sqrtm():
    a, b = random_covariance(20, 1), random_covariance(20, 2)
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    assert metrics.gaussian_distance(0, a, 0, b) == pytest.approx(expected, rel=1e-9)


def test_gaussian_distance_is_finite_and_exact_for_singular_covariances():
    # Two lines at an angle: A = uu', B = vv', so tr (AB)^(1/2) = |u.v|.
    u, v = normal(5, seed=1), normal(5, seed=2)
    distance = metrics.gaussian_distance(0, np.outer(u, u), 0, np.outer(v, v))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-7)


def test_frechet_distance_of_moved_and_stretched_copies_is_exact():
    x = normal(500, 8) @ random_covariance(8, 5)
    spread = np.trace(np.cov(x.T))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * spread)
    assert metrics.frechet_distance(x, x + 3) == pytest.approx(8 * 9, rel=1e-9)
    centred = x - x.mean(0)
    assert metrics.frechet_distance(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-9)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    a, b = normal(40_000, 4, seed=1), 2 * normal(40_000, 4, seed=2) + 1
    # Standard error of the estimate: about 4 sqrt(D / N).
    assert metrics.frechet_distance(a, b) == pytest.approx(4 + 4, abs=0.16)


def test_frechet_distance_refuses_singular_sample_covariances():
    with pytest.raises(ValueError, match="8 against 100 samples in 8 dimensions"):
        metrics.frechet_distance(normal(8, 8), normal(100, 8))


# Kernel distance


def test_kernel_distance_is_the_double_sum_over_distinct_pairs():
    a, b = normal(7, 3, seed=1), normal(9, 3, seed=2) + 0.5

    def mean_kernel(x, y, *, distinct):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not distinct or i != j]
        return np.mean([(np.dot(x[i], y[j]) / 3 + 1) ** 3 for i, j in pairs])

    within = mean_kernel(a, a, distinct=True) + mean_kernel(b, b, distinct=True)
    expected = within - 2 * mean_kernel(a, b, distinct=False)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased_even_for_five_samples():
    # In one dimension the kernel is 1 + 3xy + 3(xy)^2 + (xy)^3, so the distance of the
    # distributions is 3 (dm1)^2 + 3 (dm2)^2 + (dm3)^2 in the raw moments m1, m2, m3.
    # N(0, 1): 0, 1, 0.  Uniform on [-1, 2]: 1/2, 1, 5/4.
    rng = np.random.default_rng(0)
    estimates = [
        metrics.kernel_distance(rng.standard_normal((5, 1)), rng.uniform(-1, 2, (5, 1)))
        for _ in range(20_000)
    ]
    expected = 3 * 0.5**2 + 3 * 0 + 1.25**2
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert error < 0.1 * expected
    assert np.mean(estimates) == pytest.approx(expected, abs=3 * error)


def test_kernel_distance_needs_pairs():
    with pytest.raises(ValueError, match="1 against 5"):
        metrics.kernel_distance(normal(1, 2), normal(5, 2))


# Precision and recall


def test_precision_recall_agrees_with_trees_of_neighbours():
    real, fake = normal(300, 5, seed=1), 1.3 * normal(200, 5, seed=2) + 0.3

    def share_inside(points, manifold):
        radii = KDTree(manifold).query(manifold, 4)[0][:, -1]  # The nearest is the point itself.
        return np.mean((cdist(points, manifold) <= radii).any(1))

    expected = share_inside(fake, real), share_inside(real, fake)
    assert metrics.precision_recall(real, fake) == expected


def test_precision_falls_with_noise_and_recall_with_collapse():
    real, other = normal(400, 4, seed=1), normal(400, 4, seed=2)
    precision, recall = metrics.precision_recall(real, other)
    noisy, _ = metrics.precision_recall(real, 4 * other)
    _, collapsed = metrics.precision_recall(real, 0.1 * other)
    assert min(precision, recall) > 0.8
    assert noisy < 0.3
    assert collapsed < 0.05


def test_precision_and_recall_are_one_for_the_same_set_and_zero_for_a_distant_one():
    x = normal(50, 3)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)


def test_precision_recall_needs_more_members_than_neighbours():
    with pytest.raises(ValueError, match="k=3"):
        metrics.precision_recall(normal(3, 2), normal(10, 2))


# Diversity, copies, accuracy


def test_class_diversity_is_the_mean_distance_within_each_class():
    features = np.array([[0.0, 0], [3, 4], [10, 0], [10, 1], [10, 2]])
    diversity = metrics.class_diversity(features, np.array([2, 2, 7, 7, 7]))
    np.testing.assert_allclose(diversity, [5, (1 + 1 + 2) / 3])


def test_class_diversity_names_the_class_of_a_single_sample():
    with pytest.raises(ValueError, match=r"\[7\]"):
        metrics.class_diversity(normal(3, 2), np.array([2, 2, 7]))


def test_nearest_distance_is_zero_for_copies_and_in_grey_levels_otherwise():
    train = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    samples = np.concatenate([train[3:5], np.full((1, 4, 4, 1), 255, np.uint8)])
    expected = cdist(samples.reshape(3, -1), train.reshape(20, -1)).min(1) / 4
    distance = metrics.nearest_distance(samples, train)
    assert distance[:2].tolist() == [0, 0]
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_accuracy_counts_the_most_likely_class():
    logits = np.array([[0.0, 1], [2, 1], [0, 5], [1, 0]])
    assert metrics.accuracy(logits, np.array([1, 0, 0, 0])) == 0.75


# What all share


def test_blocks_of_rows_change_no_result(monkeypatch):
    a, b = normal(50, 4, seed=1), normal(43, 4, seed=2)

    def everything():
        return [
            metrics.kernel_distance(a, b),
            *metrics.precision_recall(a, b),
            *metrics.nearest_distance(a, b),
        ]

    whole = everything()
    monkeypatch.setattr(metrics, "BLOCK", 7)
    np.testing.assert_allclose(everything(), whole, rtol=1e-11)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.frechet_distance,
        metrics.kernel_distance,
        metrics.precision_recall,
        metrics.nearest_distance,
    ],
)
def test_features_of_different_lengths_are_refused_with_both_shapes(metric):
    with pytest.raises(ValueError, match=r"\(20, 3\) and \(20, 4\)"):
        metric(normal(20, 3), normal(20, 4))


def test_nearest_distance_converts_its_references_block_by_block():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (20_000, 256), np.uint8)
    samples = references[[3, 19_999]] ^ np.uint8([[0], [1]])
    tracemalloc.start()
    found = metrics.nearest_distance(samples, references)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [0.0, 1.0]
    assert peak < references.nbytes * 2  # float64 of all of them would be eight times as much


def test_parts_that_are_known_already_change_no_number():
    real, fake = np.random.default_rng(0).normal(size=(2, 50, 4))
    within = metrics.mean_kernel(real)
    assert metrics.kernel_distance(real, fake, within_a=within) == metrics.kernel_distance(
        real, fake
    )
    radii = metrics.neighbour_radii(real)
    known = metrics.precision_recall(real, fake, real_radii=radii)
    assert known == metrics.precision_recall(real, fake)
