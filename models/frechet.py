# SPDX-License-Identifier: Apache-2.0
"""How far synthetic records are from real ones in a space of features: for simulation alone.

Every function here reads features of real records as they are, without noise. What it returns is
not differentially private and must never leave a simulation or a research study on public data;
nothing of a deployment may call it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from ..core.errors import ConfigError, DataError

Features = NDArray[np.floating]  # (num_records, dim)

_BLOCK = 1 << 22  # distances held at a time
_TIE = 1e-12  # of the largest squared length; two distances as near as that are equal
_SCALING = 5.0  # c of the divergence curve
_NUM_MIXTURES = 400  # points of the divergence curve


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance, and how much of the space its two covariances were seen in.

    Attributes:
      distance: Squared Wasserstein-2 distance of two Gaussians with the samples' moments; >= 0.
      ranks: Of the two covariance matrices.
      dim: Length of a feature vector. With ranks below it the distance of two samples of one
        distribution is far from zero, and only distances of equally large samples compare.
    """

    distance: float
    ranks: tuple[int, int]
    dim: int


def frechet_distance(a: Features, b: Features) -> FrechetDistance:
    """Fréchet distance of two samples, with plain sample covariances, not shrunk.

    It is taken from singular values, so it holds for fewer records than dimensions, where a
    square root of the product of the covariances does not. Say on what features it was computed:
    on anything but Inception-v3 it is not the "FID".

    Args:
      a: Features, `(num_records, dim)`; two records or more.
      b: Features, `(num_others, dim)`; two records or more.

    Raises:
      DataError: Fewer than two records on a side, lengths that differ, or a value not finite.

    Privacy:
      None: reads raw records. For simulation and research only.

    Reference:
      Dowson and Landau (1982), "The Fréchet distance between multivariate normal
      distributions"; Heusel et al. (2017), https://arxiv.org/abs/1706.08500, section 2.
    """
    a, b = _checked(a, b, fewest=2)
    roots = [np.linalg.qr(x - x.mean(axis=0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    # the trace of (A^T A B^T B)^(1/2) is the sum of singular values of A B^T
    common = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float((root**2).sum()) for root in roots)
    apart = float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum())
    ranks = [int(np.linalg.matrix_rank(root)) for root in roots]
    return FrechetDistance(
        max(0.0, apart + spread - 2 * float(common)), (ranks[0], ranks[1]), a.shape[1]
    )


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall.

    Attributes:
      precision: Share of synthetic records that lie among the real ones.
      recall: Share of real records that lie among the synthetic ones.
    """

    precision: float
    recall: float


def precision_recall(real: Features, synthetic: Features, k: int = 3) -> PrecisionRecall:
    """Shares of records that lie within the other sample's estimated support.

    The support of a sample is the union of balls around its records, each of which reaches to the
    record's k-th neighbor in the sample. Compare samples of equal size only.

    Args:
      real: Features, `(num_real, dim)`; more than `k` records.
      synthetic: Features, `(num_synthetic, dim)`; more than `k` records.
      k: Which neighbor; >= 1.

    Raises:
      ConfigError: `k` is below 1.
      DataError: `k` records or fewer on a side, lengths that differ, or a value not finite.

    Privacy:
      None: reads raw records. For simulation and research only.

    Reference:
      Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric for Assessing Generative
      Models", https://arxiv.org/abs/1904.06991, equations 1 and 2.
    """
    if k < 1:
        raise ConfigError(f"k must be 1 or more, not {k}")
    real, synthetic = _checked(real, synthetic, fewest=k + 1)
    center = real.mean(axis=0)  # differences of large squares are inexact
    real, synthetic = real - center, synthetic - center
    return PrecisionRecall(
        _covered(synthetic, real, _radii(real, k)), _covered(real, synthetic, _radii(synthetic, k))
    )


@dataclass(frozen=True)
class Divergence:
    """Area under a divergence curve, with a confidence interval.

    Attributes:
      value: In (0, 1]; one for equal samples, 1/252 for samples that share no cluster.
      low: Where the interval starts.
      high: Where it ends.
    """

    value: float
    low: float
    high: float


def mauve_like(
    a: Features,
    b: Features,
    num_clusters: int,
    rng: np.random.Generator,
    *,
    units_a: NDArray[np.int64] | None = None,
    units_b: NDArray[np.int64] | None = None,
    num_resamples: int = 500,
    confidence: float = 0.95,
) -> Divergence:
    """Area under the divergence curve of two samples over clusters of their union.

    As MAUVE, but on any features: k-means on the union, no reduction of dimensions, scaling 5.
    It falls with the number of clusters and rises with the size of the samples, even for two
    samples of one distribution: compare at equal sizes and clusters, and next to the values of
    `real_against_real`. The interval is of the bootstrap over units with the clusters held
    fixed, about the value itself: the plain percentiles would be too low.

    Args:
      a: Features, `(num_records, dim)`.
      b: Features, `(num_others, dim)`.
      num_clusters: A tenth of the smaller sample is usual; >= 2.
      rng: For k-means and the bootstrap.
      units_a: Whom each record of `a` is of, `(num_records,)`, from 0. Units are drawn whole, for
        a user's records are alike. `None`: a record is a unit.
      units_b: The same of `b`.
      num_resamples: Draws of the bootstrap.
      confidence: Of the interval.

    Raises:
      ConfigError: scikit-learn is missing, or `num_clusters`, `num_resamples` or `confidence` is
        out of range.
      DataError: No record on a side, fewer records than clusters, lengths that differ, or a value
        not finite.

    Privacy:
      None: reads raw records. For simulation and research only.

    Reference:
      Pillutla et al. (2021), "MAUVE: Measuring the Gap Between Neural Text and Human Text using
      Divergence Frontiers", https://arxiv.org/abs/2102.01454, equations 1 to 3.
    """
    if num_clusters < 2 or num_resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            "num_clusters must be 2 or more, num_resamples 1 or more, and confidence between 0"
            f" and 1, not {num_clusters}, {num_resamples} and {confidence}"
        )
    a, b = _checked(a, b, fewest=1)
    clusters = _clusters(np.concatenate([a, b]), num_clusters, rng)
    sides = [
        (clusters[: len(a)], np.arange(len(a)) if units_a is None else units_a),
        (clusters[len(a) :], np.arange(len(b)) if units_b is None else units_b),
    ]
    value = area(*(np.bincount(side, minlength=num_clusters) for side, _ in sides))
    draws = np.array(
        [
            area(*(_resampled(side, units, num_clusters, rng) for side, units in sides))
            for _ in range(num_resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = value + np.quantile(draws, [tail, 1 - tail]) - draws.mean()
    return Divergence(value, float(max(0.0, low)), float(min(1.0, high)))


def real_against_real(
    real: Features,
    num_records: int,
    num_clusters: int,
    rng: np.random.Generator,
    *,
    units: NDArray[np.int64] | None = None,
    num_splits: int = 5,
) -> NDArray[np.float64]:
    """What `mauve_like` gives for two samples of real records: as high as synthetic ones can get.

    Args:
      real: Features, `(num_real, dim)`; at least twice `num_records`.
      num_records: Size of either sample: that of the samples to compare with.
      num_clusters: As there.
      rng: For the splits and k-means.
      units: Whom each record is of, `(num_real,)`; no unit is in both samples. `None`: a record is
        a unit.
      num_splits: Pairs of samples.

    Returns:
      A value for each pair, `(num_splits,)`.

    Raises:
      ConfigError: As `mauve_like`, or `num_records` or `num_splits` is below 1.
      DataError: As `mauve_like`, or too few real records.

    Privacy:
      None: reads raw records. For simulation and research only.
    """
    if min(num_records, num_splits) < 1:
        raise ConfigError(
            f"num_records and num_splits must be 1 or more, not {num_records:,} and {num_splits:,}"
        )
    units = np.arange(len(real)) if units is None else units
    values = np.empty(num_splits)
    for split in range(num_splits):
        first, second = _two_samples(units, num_records, rng)
        values[split] = mauve_like(
            real[first], real[second], num_clusters, rng, num_resamples=1
        ).value
    return values


def area(p: NDArray[np.number], q: NDArray[np.number]) -> float:
    """Area under the divergence curve of two histograms.

    The curve runs through `(exp(-5 KL(q, r)), exp(-5 KL(p, r)))` for all mixtures r of p and q.

    >>> round(area(np.array([1, 0]), np.array([0, 1])), 4)  # 1 / 252
    0.004

    Args:
      p: Counts or probabilities, `(num_clusters,)`; not all zero.
      q: The same of the other sample.

    Privacy:
      None: for simulation and research only.
    """
    p, q = p / p.sum(), q / q.sum()
    shares = (np.arange(_NUM_MIXTURES) + 0.5) / _NUM_MIXTURES
    mixtures = shares[:, None] * p + (1 - shares[:, None]) * q
    x = np.exp(-_SCALING * rel_entr(q, mixtures).sum(axis=1))
    y = np.exp(-_SCALING * rel_entr(p, mixtures).sum(axis=1))
    # as the share of p falls from one, the curve falls from (0, 1) to (1, 0)
    x, y = np.array([0.0, *x[::-1], 1.0]), np.array([1.0, *y[::-1], 0.0])
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)


def _checked(a: Features, b: Features, *, fewest: int) -> tuple[Features, Features]:
    """Both samples in float64."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DataError("both samples must be features of one length, (num_records, dim)")
    if min(len(a), len(b)) < fewest:
        raise DataError(f"both samples must have {fewest} records or more")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("all features must be finite")
    return a, b


def _radii(sample: Features, k: int) -> NDArray[np.float64]:
    """Squared distance from each record to its k-th neighbor in the sample, `(num_records,)`."""
    radii = np.empty(len(sample))
    for start, squared in _squared_distances(sample, sample):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # nobody is his own neighbor
        radii[start : start + len(squared)] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _covered(sample: Features, others: Features, radii: NDArray[np.float64]) -> float:
    """Share of a sample that lies within a radius of some other record."""
    reach = radii + _TIE * max(1e-300, float((others**2).sum(axis=1).max()))
    inside = [(squared <= reach).any(axis=1) for _, squared in _squared_distances(sample, others)]
    return float(np.concatenate(inside).mean())


def _squared_distances(
    sample: Features, others: Features
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Blocks of rows of squared distances, each with the position of its first row."""
    lengths = (others**2).sum(axis=1)
    size = max(1, _BLOCK // len(others))
    for start in range(0, len(sample), size):
        block = sample[start : start + size]
        yield start, (block**2).sum(axis=1)[:, None] + lengths - 2 * (block @ others.T)


def _clusters(points: Features, num_clusters: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cluster of each point by k-means, `(num_points,)`."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ConfigError("mauve_like needs scikit-learn: pip install scikit-learn") from error
    if len(points) < num_clusters:
        raise DataError("both samples together must have as many records as there are clusters")
    means = KMeans(num_clusters, n_init=1, random_state=int(rng.integers(1 << 31)))
    clusters: NDArray[np.int64] = means.fit_predict(points).astype(np.int64)
    return clusters


def _resampled(
    clusters: NDArray[np.int64],
    units: NDArray[np.int64],
    num_clusters: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Histogram of clusters of as many units, drawn with replacement."""
    unique, unit = np.unique(units, return_inverse=True)
    drawn = np.bincount(rng.integers(len(unique), size=len(unique)), minlength=len(unique))
    return np.bincount(clusters, drawn[unit], num_clusters).astype(np.float64)


def _two_samples(
    units: NDArray[np.int64], num_records: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of two samples of records that share no unit."""
    unique, unit = np.unique(units, return_inverse=True)
    order = np.argsort(rng.permutation(len(unique))[unit], kind="stable")
    first = order[:num_records]
    rest = order[num_records:]
    second = rest[units[rest] != units[first[-1]]][:num_records]
    if len(second) < num_records:
        raise DataError(
            "there must be twice as many real records as are compared: lower num_records, or give"
            " more"
        )
    return first, second
