"""Log-probabilities of tokens from hidden states, without ever holding a [B, T, V] tensor.

The language-model head is the widest product of a small model, so it runs over response positions only and in chunks of
rows. With gradients on, a chunk keeps no logits either. Rows are independent, so under a frozen head the derivative of
each result by its own row is made at once, from the logits that are there: the backward pass only scales it. Under a
head that trains, a chunk is checkpointed: the backward pass makes its logits again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [N, H] to logits [N, V]."""

CHUNK = {"cpu": 128}
"""Rows per chunk by device: 128 x 50k fp32 logits are 25 MB and stay in a CPU's cache."""
CHUNK_ELSEWHERE = 512
"""Rows per chunk on a GPU: 512 x 32k fp32 logits are 65 MB."""


class TokenStatistics(NamedTuple):
    """What one pass of the head says about each sampled token, fp32, shape of `tokens`."""

    logprobs: Tensor
    entropy: Tensor


def chunk_size(device: torch.device) -> int:
    """Rows per pass of the head."""
    return CHUNK.get(device.type, CHUNK_ELSEWHERE)


def log_softmax(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Log-probabilities of the distribution that is sampled: log softmax(logits / temperature), fp32 [N, V]."""
    return _normalize(head(hidden), temperature)


def _normalize(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_statistics(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy_trains: bool = False,
) -> TokenStatistics:
    """Log-probability of each token, and the entropy of the distribution it was drawn from.

    Args:
        hidden: [B, R, H], the states that predict `tokens`.
        head: the LM head.
        tokens: [B, R] int64.
        mask: [B, R] bool; other positions are skipped and come back as 0.
        temperature: the sampling temperature, > 0.
        chunk: rows per head pass; None takes what suits the device.
        entropy_trains: whether the entropy has a gradient too, which costs a product more.

    Returns:
        fp32 [B, R] each.
    """
    head_trains = any(p.requires_grad for p in getattr(head, "parameters", tuple)())

    def statistics(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() or not (rows.requires_grad or head_trains):
            return _statistics(rows, targets, head, temperature)
        if head_trains:
            logprobs, entropy = checkpoint(_statistics, rows, targets, head, temperature, use_reentrant=False)
            return logprobs, entropy if entropy_trains else entropy.detach()
        return _OnFrozenHead.apply(rows, targets, head, temperature, entropy_trains)

    size = chunk or chunk_size(hidden.device)
    chunks = zip(hidden[mask].split(size), tokens[mask].split(size), strict=True)
    parts = [statistics(rows, targets) for rows, targets in chunks]
    empty = hidden.new_zeros(mask.shape, dtype=torch.float32)
    return TokenStatistics(*(empty.masked_scatter(mask, torch.cat(column)) for column in zip(*parts, strict=True)))


def _statistics(rows: Tensor, targets: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of the targets, and entropies [N]."""
    logprobs = log_softmax(rows, head, temperature)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), -torch.linalg.vecdot(logprobs.exp(), logprobs)


class _OnFrozenHead(torch.autograd.Function):
    """`_statistics` whose derivatives by the rows are made in the forward pass.

    With p = softmax(z / T): d log p_y / dz = (1_y - p) / T, and d entropy / dz = -p (log p + entropy) / T.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, head: Head, temperature: float, entropy_trains: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            logits = head(rows)
        everything = _normalize(logits.detach(), temperature)
        probabilities = everything.exp()
        entropy = -torch.linalg.vecdot(probabilities, everything)

        def through_head(grad_logits: Tensor, more: bool = False) -> Tensor:
            grad_logits = (grad_logits if temperature == 1 else grad_logits / temperature).to(logits.dtype)
            return torch.autograd.grad(logits, rows, grad_logits, retain_graph=more)[0]

        grad_entropy = None
        if entropy_trains:
            grad_entropy = through_head(-probabilities * (everything + entropy[:, None]), more=True)
        else:
            ctx.mark_non_differentiable(entropy)
        grad_logprobs = probabilities.neg_().scatter_add_(-1, targets[:, None], torch.ones_like(probabilities[:, :1]))
        ctx.save_for_backward(through_head(grad_logprobs), grad_entropy)
        return everything.gather(-1, targets[:, None]).squeeze(-1), entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        made_logprobs, made_entropy = ctx.saved_tensors
        gradient = grad_logprobs[:, None] * made_logprobs
        if made_entropy is not None:
            gradient = gradient + grad_entropy[:, None] * made_entropy
        return gradient.to(made_logprobs.dtype), None, None, None, None


def vocabulary_divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Head,
    ref_head: Head,
    mask: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
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
        chunk: rows per head pass; None takes what suits the device.

    Returns:
        fp32 [B, R].
    """
    size = chunk or chunk_size(hidden.device)
    pairs = zip(hidden[mask].split(size), ref_hidden[mask].split(size), strict=True)
    parts = [divergence(log_softmax(a, head, temperature), log_softmax(b, ref_head, temperature)) for a, b in pairs]
    return hidden.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(parts))
