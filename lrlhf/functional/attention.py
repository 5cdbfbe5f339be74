"""Causal attention for CPUs, where PyTorch's own kernel is slow in bf16 and copies shared key-value heads.

Key-value heads stay as they are: the query heads that share one are laid one after the other along the rows of one
product. The weights [B, H, T, S] live inside a call alone; the backward pass makes them again.
"""

from typing import Any

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T, over what the mask allows) V, the softmax in fp32.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D]; K divides H.
        value: [B, K, S, D].
        mask: bool, broadcastable to [B, 1, T, S]; None is causal, the last query at the last key. A
            row that may look at nothing looks at everything.
        scale: 1 / sqrt(D), usually.

    Returns:
        [B, H, T, D] in the dtype of `query`.
    """
    if mask is None:
        square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = square.tril(key.shape[2] - query.shape[2])[None, None]
    blocked = ~mask[:, :, None]
    packed = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return _Attention.apply(packed, key, value, blocked, scale).view(query.shape)


def _weights(query: Tensor, key: Tensor, blocked: Tensor, scale: float) -> Tensor:
    """[B, K, H / K * T, S], in the dtype of `query`."""
    logits = (query @ key.transpose(-1, -2)).unflatten(2, (-1, blocked.shape[-2]))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(scale)
    logits = logits.masked_fill_(blocked, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1).flatten(2, 3).to(query.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, blocked)
        ctx.scale = scale
        return _weights(query, key, blocked, scale) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, blocked = ctx.saved_tensors
        weights = _weights(query, key, blocked, ctx.scale)
        of_weights = gradient @ value.transpose(-1, -2)
        mean = (of_weights * weights).sum(-1, keepdim=True)
        of_logits = ((of_weights - mean) * weights * ctx.scale).to(query.dtype)
        return of_logits @ key, of_logits.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient, None, None
