import numpy as np
import pytest
import torch

from lrlhf.config import Sampling
from lrlhf.model.generation import choose

GRID = 10_000
UNIFORMS = (torch.arange(GRID) + 0.5) / GRID
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.0, -3.0, 0.5])
TINY = 1e-2
"""An fp32 cumulative sum is off by 1e-7: one boundary of a token's interval may move by that much of the grid."""


def counts(logits: torch.Tensor, **sampling) -> np.ndarray:
    """How often each token comes when the uniforms cover [0, 1) evenly."""
    tokens = choose(logits.expand(GRID, -1), UNIFORMS, Sampling(**sampling))
    return np.bincount(tokens.numpy(), minlength=len(logits))


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, dtype=np.float64))
    return weights / weights.sum()


def assert_frequencies(got: np.ndarray, expected) -> None:
    """An interval of length p holds floor(p * GRID) or ceil(p * GRID) points of the grid."""
    assert np.abs(got - GRID * np.asarray(expected)).max() < 1 + TINY


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    assert_frequencies(counts(LOGITS, temperature=temperature), softmax(LOGITS / temperature))


@pytest.mark.parametrize("k", [1, 2, 4, 6, 99])
def test_top_k_draws_from_the_k_likeliest_in_their_proportion(k):
    kept = np.argsort(-LOGITS.numpy())[:k]
    expected = np.zeros(6)
    expected[kept] = softmax(LOGITS.numpy()[kept])
    assert_frequencies(counts(LOGITS, top_k=k), expected)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [0, 1, 0, 0]),
        (0.49, [0, 1, 0, 0]),
        (0.51, [0, 0.5 / 0.8, 0.3 / 0.8, 0]),
        (0.79, [0, 0.5 / 0.8, 0.3 / 0.8, 0]),
        (0.81, [0, 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (0.96, [0.05, 0.5, 0.3, 0.15]),
    ],
)
def test_top_p_draws_from_the_smallest_set_that_holds_p(p, expected):
    assert_frequencies(counts(torch.tensor([0.05, 0.5, 0.3, 0.15]).log(), top_p=p), expected)


def test_top_p_looks_at_the_distribution_after_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    squared = np.array([0.25, 0.09, 0]) / 0.34  # 0.25, 0.09, 0.04 of 0.38: the first two hold 0.89
    assert_frequencies(counts(logits, temperature=0.5, top_p=0.85), squared)


def test_top_k_and_top_p_together_keep_what_both_keep():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert_frequencies(counts(logits, top_k=2, top_p=0.95), [0.4 / 0.7, 0.3 / 0.7, 0, 0])
    assert_frequencies(counts(logits, top_k=3, top_p=0.35), [1, 0, 0, 0])


def test_temperature_zero_takes_the_likeliest_token_whatever_the_uniform():
    assert counts(LOGITS, temperature=0.0).tolist() == [0, 0, GRID, 0, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.8), Sampling(temperature=0)])
def test_a_row_gets_the_same_token_alone_and_among_others(sampling):
    random = torch.Generator().manual_seed(0)
    logits, uniforms = 3 * torch.randn(17, 301, generator=random), torch.rand(17, generator=random)
    together = choose(logits, uniforms, sampling)
    alone = [choose(logits[i : i + 1], uniforms[i : i + 1], sampling).item() for i in range(17)]
    assert together.tolist() == alone
    others = torch.randn(17, 301, generator=random)
    others[5] = logits[5]
    assert choose(others, uniforms, sampling)[5] == together[5]


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=7), Sampling(top_p=0.5)])
def test_the_ends_of_the_unit_interval_never_pick_a_token_of_probability_zero(sampling, uniform):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 501, generator=random)
    logits[:, :50] = logits[:, -50:] = -torch.inf
    tokens = choose(logits, torch.full((200,), uniform), sampling)
    assert torch.isfinite(logits.gather(-1, tokens[:, None])).all()
    if sampling.top_k:
        assert (logits.gather(-1, tokens[:, None]) >= logits.topk(7).values[:, -1:]).all()


def test_half_precision_logits_are_drawn_from_in_fp32():
    logits = LOGITS.bfloat16()
    assert_frequencies(counts(logits), softmax(logits.float()))
