"""The oracle of an estimator is its expectation, by enumeration of a small vocabulary, against numpy and scipy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from lrlhf import functional as F

ONE_SAMPLE = [
    F.kl,
    F.clamped_kl,
    F.squared_error,
    F.bregman,
    F.js,
    F.js_paper,
    F.absolute,
    F.forward_kl,
    F.total_variation,
    F.alpha_divergence,
    F.negative_kl,
]
EXACT = [F.exact_kl, F.exact_forward_kl, F.exact_js, F.exact_total_variation, F.exact_alpha_divergence]
ALPHAS = [-1.0, 0.3, 0.5, 0.9, 2.0]
LN2 = math.log(2)

unbiased = [
    (F.kl, F.exact_kl, lambda p, q: entropy(p, q)),
    (F.bregman, F.exact_kl, lambda p, q: entropy(p, q)),
    (F.negative_kl, lambda p, q: -F.exact_kl(p, q), lambda p, q: -entropy(p, q)),
    (F.forward_kl, F.exact_forward_kl, lambda p, q: entropy(q, p)),
    (F.js, F.exact_js, lambda p, q: jensenshannon(p, q) ** 2),
    (F.total_variation, F.exact_total_variation, lambda p, q: np.abs(p - q).sum() / 2),
    *(
        (
            partial(F.alpha_divergence, alpha=a),
            partial(F.exact_alpha_divergence, alpha=a),
            lambda p, q, a=a: (np.sum(p**a * q ** (1 - a)) - 1) / (a * (a - 1)),
        )
        for a in ALPHAS
    ),
]
NAMES = ["kl", "bregman", "negative_kl", "forward_kl", "js", "total_variation", *(f"alpha {a}" for a in ALPHAS)]


def pair(seed: int, drift: float = 1.0, size: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two softmax distributions in float64, further apart with `drift`."""
    random = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(2, size, generator=random, dtype=torch.float64)
    return torch.log_softmax(logits, -1), torch.log_softmax(logits + drift * noise, -1)


def expectation(divergence, p: torch.Tensor, q: torch.Tensor) -> float:
    """E_p of a one-sample estimator."""
    return float((p.exp() * divergence(p, q)).sum())


@pytest.mark.parametrize("drift", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("estimator", "exact", "oracle"), unbiased, ids=NAMES)
def test_an_estimator_and_its_exact_form_give_the_divergence_of_their_name(estimator, exact, oracle, seed, drift):
    p, q = pair(seed, drift)
    expected = oracle(p.exp().numpy(), q.exp().numpy())
    # float64 sums of 50 terms; alpha < 0 and forward KL have terms of 1e3
    assert expectation(estimator, p, q) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(exact(p, q)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ONE_SAMPLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_estimator_is_exactly_zero_for_equal_probabilities(estimator, dtype):
    logprobs = pair(0)[0].to(dtype)
    assert (estimator(logprobs, logprobs) == 0).all()


@pytest.mark.parametrize("exact", EXACT)
def test_an_exact_form_is_zero_for_equal_distributions(exact):
    p = pair(0)[0]
    assert abs(exact(p, p)) < 1e-14  # JS and alpha sum 50 rounded terms first


@pytest.mark.parametrize("estimator", [f for f in ONE_SAMPLE if f not in (F.kl, F.negative_kl)])
def test_an_estimator_that_says_so_is_never_negative(estimator):
    drift = torch.logspace(-6, 1, 200, dtype=torch.float64)
    delta = torch.cat([-drift, drift])
    # from 1e-6 on, rounding (1e-16) is smaller than any value that is not 0 by definition
    assert (estimator(delta, torch.zeros_like(delta)) >= 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_divergence_is_never_negative_for_any_alpha(alpha):
    delta = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert (F.alpha_divergence(delta, torch.zeros_like(delta), alpha=alpha) >= 0).all()


def test_single_values_of_kl_may_be_negative():
    p, q = pair(0)
    assert (F.kl(p, q) < 0).any()


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("seed", range(3))
def test_an_exact_form_is_positive_for_different_distributions(exact, seed):
    assert exact(*pair(seed, 0.01)) > 0


@pytest.mark.parametrize("biased", [F.clamped_kl, F.absolute])
@pytest.mark.parametrize("seed", range(3))
def test_clamped_kl_and_absolute_lie_above_kl(biased, seed):
    p, q = pair(seed)
    assert expectation(biased, p, q) > 1.2 * entropy(p.exp(), q.exp())


def test_clamped_kl_and_absolute_keep_the_values_they_should():
    delta, zero = torch.tensor([-2.0, 0.5]), torch.zeros(2)
    assert F.clamped_kl(delta, zero).tolist() == [0, 0.5]
    assert F.absolute(delta, zero).tolist() == [2, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_squared_error_agrees_with_kl_to_second_order(seed):
    def bias(drift: float) -> float:
        p, q = pair(seed, drift)
        return abs(expectation(F.squared_error, p, q) - entropy(p.exp(), q.exp()))

    # a third-order bias falls to 1/8 where the drift halves, a second-order one to 1/4
    assert bias(0.01) < bias(0.02) / 6


def test_js_paper_is_a_quarter_of_the_drift_and_at_most_half_of_ln_2():
    delta = torch.tensor([-1e-4, 1e-4, -50.0, 50.0], dtype=torch.float64)
    values = F.js_paper(delta, torch.zeros_like(delta))
    assert values[:2].tolist() == pytest.approx([1e-4 / 4] * 2, rel=1e-4)  # the next term is -delta^2 / 16
    assert values[2:].tolist() == pytest.approx([LN2 / 2] * 2, rel=1e-12)
    assert (values <= LN2 / 2).all()


def test_js_paper_is_the_formula_of_the_paper():
    p, q = (x.exp().numpy() for x in pair(0))
    m = (p + q) / 2
    expected = 0.5 * (np.maximum(np.log(p / m), 0) + np.maximum(np.log(q / m), 0))
    np.testing.assert_allclose(F.js_paper(*pair(0)).numpy(), expected, rtol=0, atol=1e-14)


def test_js_paper_is_not_jensen_shannon_but_many_times_it():
    p, q = pair(0, drift=0.095, size=2000)
    assert entropy(p.exp(), q.exp()) == pytest.approx(0.0045, rel=0.1), "the drift that the ratio is quoted for"
    assert expectation(F.js_paper, p, q) > 10 * jensenshannon(p.exp(), q.exp()) ** 2


@pytest.mark.parametrize("divergence", [F.exact_js, F.exact_total_variation, F.js_paper, F.squared_error, F.absolute])
def test_a_symmetric_divergence_is_the_same_both_ways(divergence):
    p, q = pair(0)
    assert torch.equal(divergence(p, q), divergence(q, p))


def test_exact_js_and_total_variation_reach_their_bounds_for_distributions_that_share_nothing():
    p = torch.log_softmax(torch.tensor([0.0, -60.0], dtype=torch.float64), -1)
    assert float(F.exact_js(p, p.flip(-1))) == pytest.approx(LN2, rel=1e-12)
    assert float(F.exact_total_variation(p, p.flip(-1))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("alpha", "limit"), [(1 - 1e-6, F.kl), (1 + 1e-6, F.kl), (1e-6, F.forward_kl)])
@pytest.mark.parametrize("form", ["estimator", "exact"])
def test_an_alpha_divergence_tends_to_each_kl(alpha, limit, form):
    p, q = pair(0)
    expected = entropy(p.exp(), q.exp()) if limit is F.kl else entropy(q.exp(), p.exp())
    if form == "exact":
        got = float(F.exact_alpha_divergence(p, q, alpha=alpha))
    else:
        got = expectation(partial(F.alpha_divergence, alpha=alpha), p, q)
    assert got == pytest.approx(expected, rel=1e-5)  # first order in the distance of alpha from the limit


def test_alpha_one_half_is_four_times_the_squared_hellinger_distance():
    p, q = pair(0)
    hellinger = 0.5 * np.sum((np.sqrt(p.exp().numpy()) - np.sqrt(q.exp().numpy())) ** 2)
    assert float(F.exact_alpha_divergence(p, q)) == pytest.approx(4 * hellinger, rel=1e-12)


def test_near_the_reference_js_is_a_quarter_of_kl():
    p, q = pair(0, drift=1e-3)
    assert float(F.exact_js(p, q)) == pytest.approx(float(F.exact_kl(p, q)) / 4, rel=1e-2)  # next order in the drift


@pytest.mark.parametrize("exact", EXACT)
def test_an_exact_form_sums_over_the_last_axis_alone(exact):
    pairs = [pair(seed) for seed in range(6)]
    p, q = (torch.stack(x).view(2, 3, 50) for x in zip(*pairs, strict=True))
    assert exact(p, q).flatten().tolist() == pytest.approx([float(exact(*x)) for x in pairs], rel=1e-12)


def test_exactly_the_exact_forms_ask_for_the_whole_vocabulary():
    assert all(f.over_vocabulary is True for f in EXACT)
    assert not any(hasattr(f, "over_vocabulary") for f in ONE_SAMPLE)
