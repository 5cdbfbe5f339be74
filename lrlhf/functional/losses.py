"""The losses, per token, per response or per pair: the caller divides once by a global count."""

import torch
import torch.nn.functional as F
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate: max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c')), ratio = exp(logprobs - old_logprobs).

    Schulman et al., "Proximal policy optimization" (2017), equation 7.

    Args:
        logprobs: [B, R] of the policy that learns, per token; or [B] of whole responses, as in RLOO.
        old_logprobs: of the policy that sampled, same shape; no gradient.
        advantages: same shape; no gradient.
        clip_range: c; how far a token's probability may move per rollout and still be rewarded. 0.2 in the paper;
            0.1 to 0.3 is usual.
        clip_range_high: c', of increases alone; None takes c. "Clip-higher" in DAPO (arXiv 2503.14476), 0.28 there.

    Returns:
        Same shape.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float = 0.2) -> Tensor:
    """Clipped squared error: max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2.

    Args:
        values: [B, R] of the critic that learns.
        old_values: [B, R] at rollout time; no gradient.
        returns: [B, R] G; no gradient.
        clip_range: c, in units of the whitened reward. 0.2 in the paper. Larger lets the critic move faster.

    Returns:
        [B, R], per token.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Bradley-Terry: -log sigmoid(s_chosen - s_rejected - margin) + centering * (s_chosen + s_rejected)^2.

    Bradley and Terry (1952); margin as in Llama 2 (arXiv 2307.09288, equation 2); centring, which keeps the free
    constant of the scores near 0, as in arXiv 2312.09244, section 4.

    Args:
        chosen_scores: [B] float.
        rejected_scores: [B] float.
        margin: [B] or a number: how much better the chosen one should score.
        centering: 0 leaves the constant free; 0.01 is typical.

    Returns:
        [B], per pair.
    """
    loss = -F.logsigmoid(chosen_scores - rejected_scores - margin)
    return loss + centering * (chosen_scores + rejected_scores) ** 2


# Preference pairs, DPO. h is the difference of the implicit rewards of chosen and rejected, before beta.


def sigmoid_loss(difference: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    Rafailov et al., "Direct preference optimization" (arXiv 2305.18290), equation 7; e, the share of labels that are
    wrong, as in Mitchell, "A note on DPO with noisy preferences" (2023), equation 3.

    Args:
        difference: [B] h.
        beta: larger stays closer to the reference; 0.1 is usual, 0.01 to 0.5.
        label_smoothing: e in [0, 1/2).

    Returns:
        [B], per pair.
    """
    logits = beta * difference
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(difference: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2, which no margin, however large, makes 0: labels that never vary do not run away.

    Azar et al., "A general theoretical paradigm to understand learning from human preferences" (arXiv 2310.12036),
    equation 17. Its authors use log-ratios per token there: `length_normalized: true`.

    Args:
        difference: [B] h.
        beta: the paper's tau.

    Returns:
        [B], per pair.
    """
    return (difference - 1 / (2 * beta)) ** 2


def hinge_loss(difference: Tensor, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta h): pairs that are told apart by 1 / beta teach nothing more.

    Zhao et al., "SLiC-HF" (arXiv 2305.10425), equation 1, on DPO's implicit rewards as in Liu et al., "RSO" (arXiv
    2309.06657), equation 11.

    Args:
        difference: [B] h.
        beta: see `sigmoid_loss`.

    Returns:
        [B], per pair.
    """
    return torch.relu(1 - beta * difference)
