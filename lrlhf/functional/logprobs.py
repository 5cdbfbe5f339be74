"""Log-probabilities of tokens from hidden states, without ever holding a [B, T, V] tensor.

The language-model head is the widest product of a small model, so it runs over response positions only and in chunks of
rows. With gradients on, each chunk is checkpointed: the backward pass recomputes its logits instead of keeping them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [N, H] to logits [N, V]."""

CHUNK = 512
"""Rows per chunk: 512 x 50k fp32 logits are 100 MB. Larger is barely faster; smaller saves memory."""


class TokenStatistics(NamedTuple):
    """What one pass of the head says about each sampled token, fp32, shape of `tokens`."""

    logprobs: Tensor
    entropy: Tensor


def log_softmax(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Log-probabilities of the distribution that is sampled: log softmax(logits / temperature), fp32 [N, V]."""
    return torch.log_softmax(head(hidden).float() / temperature, dim=-1)


def token_statistics(
    hidden: Tensor, head: Head, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK
) -> TokenStatistics:
    """Log-probability of each token, and the entropy of the distribution it was drawn from.

    Args:
        hidden: [B, R, H], the states that predict `tokens`.
        head: the LM head.
        tokens: [B, R] int64.
        mask: [B, R] bool; other positions are skipped and come back as 0.
        temperature: the sampling temperature, > 0.
        chunk: rows per head pass.

    Returns:
        fp32 [B, R] each.
    """

    def piece(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = log_softmax(rows, head, temperature)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy

    def chunk_statistics(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return piece(rows, targets)
        return checkpoint(piece, rows, targets, use_reentrant=False, preserve_rng_state=False)

    chunks = zip(hidden[mask].split(chunk), tokens[mask].split(chunk), strict=True)
    parts = [chunk_statistics(rows, targets) for rows, targets in chunks]
    empty = hidden.new_zeros(mask.shape, dtype=torch.float32)
    return TokenStatistics(*(empty.masked_scatter(mask, torch.cat(column)) for column in zip(*parts, strict=True)))


def vocabulary_divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Head,
    ref_head: Head,
    mask: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """An exact divergence at each position, summed over the whole vocabulary, in chunks.

    Args:
        hidden: [B, R, H] of the policy.
        ref_hidden: [B, R, H] of the reference.
        head: the LM head of the policy.
        ref_head: the LM head of the reference; the same one unless full models train.
        mask: [B, R] bool; other positions come back as 0.
        divergence: maps log-probabilities [N, V] of policy and reference to [N].
        temperature: the sampling temperature, > 0.
        chunk: rows per head pass.

    Returns:
        fp32 [B, R].
    """
    pairs = zip(hidden[mask].split(chunk), ref_hidden[mask].split(chunk), strict=True)
    parts = [divergence(log_softmax(a, head, temperature), log_softmax(b, ref_head, temperature)) for a, b in pairs]
    return hidden.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(parts))
