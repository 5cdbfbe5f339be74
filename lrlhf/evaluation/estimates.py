"""Numbers with their 95 % intervals."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy as np

Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A number with its 95 % interval; the bounds are nan where n is too small for one."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0


class Line(NamedTuple):
    """One line of a result: what was measured, the number, and its format specification, such as ".1%"."""

    label: str
    estimate: Estimate
    style: str = ".3f"


def mean_interval(values: Sequence[float]) -> Estimate:
    """mean +- 1.96 s / sqrt(n), with s^2 = sum((x - mean)^2) / (n - 1)."""
    n, mean = len(values), fmean(values)
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else math.nan
    return Estimate(mean, mean - Z * error, mean + Z * error, n)


def wilson_interval(share: float, n: int) -> Estimate:
    """(p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n): within [0, 1], and right for small n.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Args:
        share: p, in [0, 1].
        n: number of trials.
    """
    if n < 1:
        return Estimate(share, math.nan, math.nan, n)
    center, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    reach = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, (center - reach) / scale, (center + reach) / scale, n)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], clusters: Sequence[Any] | np.ndarray, *, resamples: int = 2000
) -> Estimate:
    """Percentile interval of a statistic when whole clusters, such as prompts, are drawn anew with replacement.

    Efron and Tibshirani (1993), chapter 13; clusters stay together because their rows are not independent.

    Args:
        statistic: from row numbers [N] int64, repeated as they were drawn, to a number; nan where it has none.
        clusters: the cluster of each row.
        resamples: number of draws.

    Returns:
        The statistic of all rows, with the number of clusters as n.
    """
    count = len({str(cluster) for cluster in clusters})
    if not count:
        return Estimate(math.nan)
    return percentiles(
        float(statistic(np.arange(len(clusters)))), bootstrap_draws(statistic, clusters, resamples), count
    )


def clustered_mean(values: np.ndarray, clusters: Sequence[Any] | np.ndarray) -> Estimate:
    """The mean of values [N] with `bootstrap_interval`, by the cluster of each."""
    return bootstrap_interval(lambda rows: float(values[rows].mean()), clusters)


def percentiles(value: float, draws: np.ndarray, n: int) -> Estimate:
    """A number with the middle 95 % of its bootstrap draws; without bounds for one cluster, or without finite draws."""
    finite = draws[np.isfinite(draws)]
    low, high = np.percentile(finite, (2.5, 97.5)) if n > 1 and len(finite) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), n)


def bootstrap_draws(
    statistic: Callable[[np.ndarray], Any], clusters: Sequence[Any] | np.ndarray, resamples: int, seed: int = 0
) -> np.ndarray:
    """A statistic, a number or an array, of rows of clusters drawn with replacement: [resamples, ...].

    Args:
        statistic: from row numbers [N] int64.
        clusters: the cluster of each row.
        resamples: number of draws.
        seed: of the draws.
    """
    _, of_row = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)
    members = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])
    draws = np.random.default_rng(seed).integers(0, len(members), (resamples, len(members)))
    alone = np.concatenate(members) if len(members) == len(of_row) else None
    return np.array(
        [statistic(alone[draw] if alone is not None else np.concatenate([members[i] for i in draw])) for draw in draws]
    )
