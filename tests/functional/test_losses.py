import math

import pytest
import torch

from lrlhf.functional import policy_loss, preference_loss, value_loss

# ratio, advantage, loss at clip_range 0.2, gradient of the loss with respect to the log-probability
POLICY = {
    "good, too likely already: clipped": (1.5, 2.0, -2.4, 0.0),
    "good, less likely than before: free": (0.5, 2.0, -1.0, -1.0),
    "bad, more likely than before: free": (1.5, -2.0, 3.0, 3.0),
    "bad, too unlikely already: clipped": (0.5, -2.0, 1.6, 0.0),
    "good, inside the range": (1.1, 2.0, -2.2, -2.2),
    "bad, inside the range": (0.9, -2.0, 1.8, 1.8),
    "no change": (1.0, 2.0, -2.0, -2.0),
    "nothing to gain": (1.5, 0.0, 0.0, 0.0),
}

# value, old value, return, loss at clip_range 0.2, gradient of the loss with respect to the value
VALUE = {
    "moved too far towards the return: clipped": (1.0, 0.0, 1.0, 0.5 * 0.8**2, 0.0),
    "moved away from the return: free": (-1.0, 0.0, 1.0, 0.5 * 2.0**2, -2.0),
    "inside the range": (0.125, 0.0, 1.0, 0.5 * 0.875**2, -0.875),
    "too far down towards the return: clipped": (-1.0, 0.0, -1.0, 0.5 * 0.8**2, 0.0),
    "where it was": (3.0, 3.0, 1.0, 0.5 * 2.0**2, 2.0),
}


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), POLICY.values(), ids=POLICY.keys())
def test_policy_loss_by_hand(ratio, advantage, loss, gradient):
    old = torch.tensor([[-1.5]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    got = policy_loss(logprobs, old, torch.full_like(old, advantage), clip_range=0.2)
    got.sum().backward()
    # exp(log(ratio)) rounds
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_a_wider_policy_range_clips_later():
    ratio = torch.tensor([1.4])
    wide = policy_loss(ratio.log(), torch.zeros(1), torch.ones(1), clip_range=0.5)
    narrow = policy_loss(ratio.log(), torch.zeros(1), torch.ones(1), clip_range=0.1)
    assert (wide.item(), narrow.item()) == pytest.approx((-1.4, -1.1))


@pytest.mark.parametrize(("value", "old", "target", "loss", "gradient"), VALUE.values(), ids=VALUE.keys())
def test_value_loss_by_hand(value, old, target, loss, gradient):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    got = value_loss(values, torch.full_like(values, old), torch.full_like(values, target), clip_range=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "centering"),
    [(2.0, 0.5, 0.0, 0.0), (2.0, 0.5, 0.5, 0.0), (-1.0, 3.0, 0.0, 0.0), (2.0, 0.5, 1.0, 0.01), (1.0, -1.0, 0.0, 9.0)],
)
def test_preference_loss_by_hand(chosen, rejected, margin, centering):
    sigmoid = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    expected = -math.log(sigmoid) + centering * (chosen + rejected) ** 2
    scores = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    assert preference_loss(*scores, margin=margin, centering=centering).item() == pytest.approx(expected, rel=1e-12)


def test_preference_loss_takes_a_margin_for_each_pair():
    chosen, margin = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = [math.log(2), math.log(1 + math.e)]
    assert preference_loss(chosen, chosen, margin=margin).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_both_scores_changes_nothing_without_centering():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    assert torch.equal(preference_loss(chosen + 4, rejected + 4), preference_loss(chosen, rejected))


def test_preference_loss_does_not_overflow():
    assert preference_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2)).tolist() == [1e4, 0]


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_a_loss_stays_one_number_for_each_token(loss):
    assert loss(*torch.randn(3, 2, 5)).shape == (2, 5)
