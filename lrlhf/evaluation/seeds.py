"""Means and differences over training seeds: the seed is what was repeated, the prompts are what every run answered.

A mean of S seeds and P prompts, [S, P], varies with both. Its standard error is that of the pigeonhole bootstrap (Owen
2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1), which draws seeds and prompts anew, each with
replacement, and errs on the safe side. Percentiles of so few seeds would be far too narrow: three of them lie on one
side of the truth in a quarter of all studies. So the error is scaled by sqrt(S / (S - 1)) and the interval has the t
distribution of S - 1 degrees of freedom.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate

try:
    from scipy import stats
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.power import TTestPower
except ImportError as error:
    raise UserError(f"statistics over seeds need {error.name}: pip install 'lrlhf[study]'.") from None

LEVEL = 0.05
"""Share of true null hypotheses that may be rejected."""
POWER = 0.8
"""Share of true effects that are to be found."""


class Difference(NamedTuple):
    """A difference of two conditions, paired by seed and prompt."""

    estimate: Estimate
    """With its own 95 % interval; n counts seeds."""
    p: float
    """Two-sided, of this comparison alone; nan for one seed."""
    seeds_needed: int | None
    """Seeds with which an effect of the size asked about would be found with POWER; None where unknown."""


def mean_over_seeds(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of values [S, P] with its 95 % interval over seeds and prompts.

    Args:
        values: of each seed and prompt.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        Without bounds for one seed, which says nothing about another.
    """
    return _interval(values, standard_error(values, resamples, seed) if len(values) > 1 else math.nan)


def _interval(values: np.ndarray, error: float) -> Estimate:
    count, mean = len(values), float(values.mean())
    reach = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, count)


def standard_error(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> float:
    """Of the mean of values [S, P], S > 1, by the pigeonhole bootstrap, scaled by sqrt(S / (S - 1)).

    Args:
        values: of each seed and prompt.
        resamples: number of draws.
        seed: of the draws.
    """
    draws, (seeds, prompts) = np.random.default_rng(seed), values.shape
    times_seed = draws.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # [resamples, S]
    times_prompt = draws.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts  # [resamples, P]
    means = ((times_seed @ values) * times_prompt).sum(1)
    return float(means.std()) * math.sqrt(seeds / (seeds - 1))


def difference(first: np.ndarray, second: np.ndarray, effect: float, *, resamples: int = 2000) -> Difference:
    """Of first - second, both [S, P] with the same seeds and prompts in their places.

    Args:
        first: values of one condition.
        second: values of the other.
        effect: a difference worth finding, for `seeds_needed`.
        resamples: number of draws.
    """
    values = first - second
    error = standard_error(values, resamples) if len(values) > 1 else math.nan
    estimate = _interval(values, error)
    if math.isnan(error):
        return Difference(estimate, math.nan, None)
    if error == 0:
        return Difference(estimate, float(estimate.value == 0), 2)
    p = 2 * float(stats.t.sf(abs(estimate.value) / error, estimate.n - 1))
    return Difference(estimate, p, seeds_needed(error * math.sqrt(estimate.n), effect))


def seeds_needed(deviation: float, effect: float) -> int:
    """How many seeds find an effect with POWER at LEVEL, by a two-sided paired t-test; at least 2.

    Args:
        deviation: of the paired difference from seed to seed, that of the prompts included.
        effect: the true difference.
    """
    power, numbers = TTestPower().power, range(2, 100_001)
    size = min(abs(effect) / deviation, 100.0)
    return 2 + bisect_left(numbers, POWER, key=lambda n: power(size, n, LEVEL))


def corrected(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons so that the chance of any false one stays below LEVEL (Holm 1979).

    Args:
        p: of each comparison; nan stays nan and counts for nothing.
    """
    known = [value for value in p if not math.isnan(value)]
    found = iter(multipletests(known, LEVEL, method="holm")[1].tolist() if known else [])
    return [math.nan if math.isnan(value) else next(found) for value in p]


def verdict(estimate: Estimate, p: float) -> str:
    """higher, lower, or not told apart: only where the interval excludes 0 and the corrected p is below LEVEL.

    Args:
        estimate: of a difference.
        p: corrected.
    """
    if not (estimate.low > 0 or estimate.high < 0) or not p < LEVEL:
        return "not told apart"
    return "higher" if estimate.value > 0 else "lower"
