import numpy as np
import pytest
import torch

from lrlhf.functional import generalized_advantages

LENGTHS = torch.tensor([[7], [1], [0], [4]])
MASK = torch.arange(7) < LENGTHS


def case(padding: float = float("nan")) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=random, dtype=torch.float64).masked_fill(~MASK, padding)
    return rewards, values, MASK


def by_definition(rewards, values, length, discount, trace_decay):
    """A_t = sum over l of (discount * trace_decay)^l (r + discount V' - V), one term at a time."""
    after = np.append(values[1:length], 0)
    return [
        sum(
            (discount * trace_decay) ** (s - t) * (rewards[s] + discount * after[s] - values[s])
            for s in range(t, length)
        )
        for t in range(length)
    ]


@pytest.mark.parametrize(("discount", "trace_decay"), [(1, 0.95), (0.9, 0.8), (0.99, 0), (1, 1), (0.5, 1)])
def test_advantages_follow_their_definition(discount, trace_decay):
    rewards, values, mask = case()
    advantages, _ = generalized_advantages(rewards, values, mask, discount=discount, trace_decay=trace_decay)
    for row, length in enumerate(LENGTHS.flatten().tolist()):
        expected = by_definition(rewards[row].numpy(), values[row].numpy(), length, discount, trace_decay)
        # float64, at most 7 terms
        np.testing.assert_allclose(advantages[row, :length].numpy(), expected, rtol=0, atol=1e-13)


def test_a_case_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, discount=1.0, trace_decay=0.5)
    # errors: 0 + 0.25 - 0.5 = -0.25 and 1 + 0 - 0.25 = 0.75
    assert advantages.tolist() == [[-0.25 + 0.5 * 0.75, 0.75, 0]]
    assert returns.tolist() == [[0.625, 1.0, 0]]


def test_without_discount_and_decay_the_advantage_is_the_reward_to_go_less_the_value():
    rewards, values, mask = case()
    advantages, returns = generalized_advantages(rewards, values, mask, discount=1.0, trace_decay=1.0)
    to_go = np.cumsum(np.nan_to_num(rewards.numpy())[:, ::-1], axis=1)[:, ::-1] * MASK.numpy()
    np.testing.assert_allclose(returns.numpy(), to_go, rtol=0, atol=1e-13)
    np.testing.assert_allclose(advantages.numpy(), to_go - np.nan_to_num(values.numpy()), rtol=0, atol=1e-13)


def test_a_decay_of_zero_gives_the_one_step_error():
    rewards, values, mask = (x[:1] for x in case())
    advantages, _ = generalized_advantages(rewards, values, mask, discount=0.9, trace_decay=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    assert torch.equal(advantages, rewards + 0.9 * after - values)


def test_returns_are_advantages_plus_values():
    rewards, values, mask = case()
    advantages, returns = generalized_advantages(rewards, values, mask)
    assert torch.equal(returns[mask], (advantages + values)[mask])


@pytest.mark.parametrize("padding", [0.0, 1e6, float("inf"), float("nan")])
def test_what_lies_in_the_padding_changes_nothing(padding):
    clean, dirty = (generalized_advantages(*case(x)) for x in (0.0, padding))
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got, expected)
        assert (got[~MASK] == 0).all()


def test_more_padding_changes_nothing():
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in case()]
    for got, expected in zip(generalized_advantages(*wide), generalized_advantages(*case()), strict=True):
        assert torch.equal(got[:, :7], expected)
        assert (got[:, 7:] == 0).all()


def test_the_inputs_are_left_as_they_were():
    given = case()
    generalized_advantages(*given)
    for x, y in zip(given, case(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
