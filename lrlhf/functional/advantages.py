"""Advantages and returns by generalised advantage estimation."""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, trace_decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE: A_t = sum_l (discount * trace_decay)^l * e_(t+l), e_t = r_t + discount * V_(t+1) - V_t.

    The response ends at the last true position of a row: V beyond it is 0. Schulman et al., "High-dimensional
    continuous control using generalized advantage estimation" (2016), equation 16.

    Args:
        rewards: [B, R] float, reward for token t.
        values: [B, R] float, value before token t.
        mask: [B, R] bool, true on a prefix of each row.
        discount: gamma; 1 in the paper, since a response is short.
        trace_decay: lambda; larger trusts sampled rewards more (1 is Monte Carlo), smaller trusts the critic. 0.95 in
            arXiv 2309.09055, 1.0 in AlpacaFarm.

    Returns:
        advantages and returns (advantages + values), [B, R], 0 off the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + discount * next_value - values[:, t]
        advantage = error + discount * trace_decay * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values
