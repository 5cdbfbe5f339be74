"""Statistics over seeds, against closed forms and against simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from lrlhf.evaluation import seeds
from lrlhf.evaluation.estimates import Estimate


def study(draws, count, prompts, effect, by_seed, by_prompt, noise):
    """A paired difference [S, P]: effect, what a seed adds, what a prompt adds, and the rest."""
    return (
        effect
        + by_seed * draws.standard_normal((count, 1))
        + by_prompt * draws.standard_normal((1, prompts))
        + noise * draws.standard_normal((count, prompts))
    )


def test_with_many_prompts_the_interval_is_that_of_a_t_test_over_seeds():
    values = study(np.random.default_rng(0), 5, 1, 0.3, 1.0, 0, 0).repeat(50, 1)
    found = seeds.mean_over_seeds(values, resamples=20_000)
    low, high = stats.t.interval(0.95, 4, values[:, 0].mean(), stats.sem(values[:, 0]))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert found.n == 5


def test_p_is_that_of_a_paired_t_test_where_prompts_add_nothing():
    draws = np.random.default_rng(1)
    first, second = draws.standard_normal((2, 6, 1)).repeat(40, 2) + np.array([[[0.8]], [[0.0]]])
    expected = stats.ttest_rel(first[:, 0], second[:, 0])
    assert seeds.difference(first, second, 0.5).p == pytest.approx(expected.pvalue, rel=0.06)


def test_the_standard_error_counts_seeds_and_prompts():
    """Var = a^2 / S + b^2 / P, to which the bootstrap's share of the rest adds at most three times its own."""
    draws = np.random.default_rng(2)
    found = [seeds.standard_error(study(draws, 4, 30, 0, 0.2, 0.6, 0), 500) ** 2 for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.2**2 / 4 + 0.6**2 / 30 * 4 / 3, rel=0.1)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize(("by_seed", "by_prompt", "noise"), [(0.05, 0, 0), (0.05, 0.1, 0.2), (0.0, 0.3, 0.0)])
def test_a_study_without_an_effect_finds_one_no_more_often_than_it_says(count, by_seed, by_prompt, noise):
    draws = np.random.default_rng(3)
    wrong = [
        seeds.difference(values, np.zeros_like(values), 0.05, resamples=400).p < seeds.LEVEL
        for values in (study(draws, count, 40, 0.0, by_seed, by_prompt, noise) for _ in range(1000))
    ]
    assert np.mean(wrong) <= seeds.LEVEL + 3 * math.sqrt(seeds.LEVEL * (1 - seeds.LEVEL) / 1000)


def test_a_study_with_the_seeds_that_the_power_line_asks_for_finds_the_effect():
    draws, deviation, effect = np.random.default_rng(4), 0.05, 0.05
    needed = int(seeds.seeds_needed(deviation, effect))
    assert needed == 10  # a paired t-test of effect size 1 at 0.05 and 0.8 takes 9.94
    found = [
        seeds.difference(values, np.zeros_like(values), effect, resamples=400).p < seeds.LEVEL
        for values in (study(draws, needed, 20, effect, deviation, 0, 0) for _ in range(500))
    ]
    assert np.mean(found) == pytest.approx(seeds.POWER, abs=0.06)


def test_among_eight_comparisons_without_effects_the_correction_keeps_any_false_one_rare(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # which statsmodels calls each time
    draws = np.random.default_rng(5)
    plain, held = [], []
    for _ in range(400):
        p = stats.ttest_1samp(draws.standard_normal((4, 8)), 0).pvalue.tolist()
        plain.append(min(p) < seeds.LEVEL)
        held.append(min(seeds.corrected(p)) < seeds.LEVEL)
    assert np.mean(plain) > 0.25
    assert np.mean(held) <= seeds.LEVEL + 0.03


def test_holm_by_hand():
    assert seeds.corrected([0.01, math.nan, 0.04, 0.03]) == [
        pytest.approx(0.03), pytest.approx(math.nan, nan_ok=True), pytest.approx(0.06), pytest.approx(0.06),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.1, 0.3, 0.01, "higher"),
        (-0.3, -0.1, 0.01, "lower"),
        (-0.1, 0.3, 0.01, "not told apart"),
        (0.1, 0.3, 0.2, "not told apart"),
        (math.nan, math.nan, math.nan, "not told apart"),
    ],
)
def test_nothing_is_better_whose_interval_includes_zero_or_whose_corrected_p_is_large(low, high, p, word):
    assert seeds.verdict(Estimate((low + high) / 2, low, high, 3), p) == word


def test_one_seed_has_no_interval():
    found = seeds.difference(np.ones((1, 5)), np.zeros((1, 5)), 0.05)
    assert found.estimate.value == 1
    assert math.isnan(found.estimate.low)
    assert math.isnan(found.p)
