import numpy as np
import pytest
import torch

from lrlhf.functional import masked_mean, masked_sum, masked_variance, whiten

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, float("inf"), NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 values with NaN off a random mask."""
    random = torch.Generator().manual_seed(seed)
    values = 3 + 2 * torch.randn(4, 7, generator=random, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=random) < 0.6
    return values.masked_fill(~mask, NAN), mask


def test_padding_never_enters_a_sum_a_mean_or_a_variance():
    assert masked_sum(VALUES, MASK) == 9
    assert masked_mean(VALUES, MASK) == 3
    assert masked_variance(VALUES, MASK) == (4 + 1 + 9) / 3


def test_nothing_true_gives_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing) == masked_mean(VALUES, nothing) == masked_variance(VALUES, nothing) == 0


def test_padding_sends_no_gradient_back():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert torch.equal(values.grad, MASK / 3)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_values_have_mean_zero_and_the_deviation_that_numpy_divides_by(seed):
    values, mask = ragged(seed)
    inside = values[mask].numpy()
    expected = (inside - inside.mean()) / inside.std()
    # epsilon = 1e-8 beside a variance of about 4
    np.testing.assert_allclose(whiten(values, mask)[mask].numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_without_centering_the_mean_stays_and_only_the_scale_changes(seed):
    values, mask = ragged(seed)
    inside, whitened = values[mask].numpy(), whiten(values, mask, center=False)[mask].numpy()
    np.testing.assert_allclose(whitened.mean(), inside.mean(), rtol=1e-12)  # rounding in float64
    np.testing.assert_allclose(whitened.std(), 1, rtol=1e-8)  # epsilon


@pytest.mark.parametrize("center", [True, False])
def test_whitening_leaves_zero_in_the_padding(center):
    values, mask = ragged(0)
    assert (whiten(values, mask, center=center)[~mask] == 0).all()


@pytest.mark.parametrize(("center", "expected"), [(True, 0.0), (False, 2.5)])
def test_a_constant_whitens_to_zero_or_without_centering_to_itself(center, expected):
    constant = torch.full((2, 3), 2.5).masked_fill(~MASK, NAN)
    assert (whiten(constant, MASK, center=center)[MASK] == expected).all()


def test_whitening_does_not_depend_on_the_width_of_the_padding():
    values, mask = ragged(1)
    wider = torch.nn.functional.pad(values, (0, 5), value=NAN), torch.nn.functional.pad(mask, (0, 5))
    # the sums run in another order
    torch.testing.assert_close(whiten(*wider)[:, :7], whiten(values, mask), rtol=0, atol=1e-12)
