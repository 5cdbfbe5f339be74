import numpy as np
import pytest
import torch

from lrlhf.metrics import Means, explained_variance

NAN = float("nan")


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, returns and a mask with NaN off it."""
    random = torch.Generator().manual_seed(0)
    values, returns = torch.randn(2, 6, 5, generator=random)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [1]])
    return values.masked_fill(~mask, NAN), returns.masked_fill(~mask, NAN), mask


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_every_token_counts_once_however_the_batch_is_cut(size):
    values, _, mask = ragged()
    means = Means()
    for piece, allowed in zip(values.split(size), mask.split(size), strict=True):
        means.add("value", piece, allowed)
    assert means.compute()["value"] == pytest.approx(values[mask].numpy().mean(), rel=1e-6)  # fp32 sums


def test_without_a_mask_every_value_counts():
    means = Means()
    means.add("score", torch.tensor([1.0, 2.0]))
    means.add("score", torch.tensor([6.0]))
    means.add("length", torch.tensor([3, 4]))
    assert means.compute() == {"score": 3.0, "length": 3.5}


def test_booleans_average_to_a_share_of_the_mask():
    means = Means()
    means.add("clipped", torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False]))
    assert means.compute()["clipped"] == pytest.approx(2 / 3)


def test_a_quantity_that_never_counted_is_zero():
    means = Means()
    means.add("value", torch.tensor([NAN]), torch.tensor([False]))
    assert means.compute() == {"value": 0.0}
    assert Means().compute() == {}


def test_a_mean_keeps_no_graph():
    means = Means()
    means.add("loss", torch.ones(2, requires_grad=True))
    assert type(means.compute()["loss"]) is float


def test_explained_variance_equals_its_formula_in_numpy_and_ignores_padding():
    values, returns, mask = ragged()
    v, g = values[mask].double().numpy(), returns[mask].double().numpy()
    expected = 1 - np.var(g - v) / np.var(g)
    assert explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-5)  # fp32


def test_a_perfect_critic_explains_everything_and_a_constant_one_nothing():
    _, returns, mask = ragged()
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1, abs=1e-6)  # a bias is not variance
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)


def test_returns_that_do_not_vary_explain_nothing():
    _, _, mask = ragged()
    assert explained_variance(torch.randn(6, 5), torch.full((6, 5), 0.5), mask) == 0
