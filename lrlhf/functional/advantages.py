"""Advantages: by generalised estimation with a critic, or by comparing the responses to one prompt."""

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


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """A_i = s_i - mean of the OTHER scores of its group: the baseline does not depend on the response it judges.

    So it leaves the policy gradient unbiased. Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019);
    RLOO in Ahmadian et al., "Back to basics" (arXiv 2402.14740), section 2.3.

    Args:
        scores: [B] float, groups next to each other.
        group_size: n >= 2, divides B.

    Returns:
        [B]; sums to 0 over each group.
    """
    groups = scores.view(-1, group_size)
    return (group_size / (group_size - 1) * (groups - groups.mean(1, keepdim=True))).flatten()


def group_normalized(scores: Tensor, group_size: int, *, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """A_i = (s_i - mean) / (deviation + epsilon) over its group; without the division if not `scale`.

    GRPO: Shao et al., "DeepSeekMath" (arXiv 2402.03300), section 4.1.2, with the sample deviation (n - 1) of its
    implementations. Dividing weighs prompts up whose responses score alike, very easy and very hard ones: Liu et al.,
    "Understanding R1-Zero-like training" (Dr. GRPO, arXiv 2503.20783), section 3.1, leave it out.

    Args:
        scores: [B] float, groups next to each other.
        group_size: n >= 2, divides B.
        scale: divide by the deviation.
        epsilon: guards a group of equal scores, whose advantages are 0.

    Returns:
        [B]; sums to 0 over each group.
    """
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + epsilon) if scale else centred).flatten()
