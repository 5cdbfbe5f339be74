"""Causal attention for CPUs, where PyTorch's own kernel is slow in bf16 and copies shared key-value heads.

Key-value heads stay as they are: the query heads that share one are laid one after the other along the rows of one
product, which adds the mask too. The weights [B, H, T, S] live inside a call alone; the backward pass makes them again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrlhf.kernels.operators import softmax_backward


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T, over what the mask allows) V; sums are fp32, what is stored has the dtype of `query`.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D]; K divides H.
        value: [B, K, S, E]; E is D in most models.
        mask: bool, broadcastable to [B, 1, T, S]; None is causal, the last query at the last key. A
            row that may look at nothing looks at everything.
        scale: 1 / sqrt(D), usually.

    Returns:
        [B, H, T, E] in the dtype of `query`.
    """
    rows, heads, length = query.shape[:3]
    groups, keys = key.shape[1:3]
    if mask is None:
        square = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        mask = square.tril(keys - length)[None, None]
    query, key, value = (x.reshape(rows * groups, -1, x.shape[-1]) for x in (query, key, value))
    inputs = query, key, value, mask.expand(rows, 1, length, keys), scale
    result = _Attention.apply(*inputs) if torch.is_grad_enabled() else _attend(*inputs)
    return result.view(rows, heads, length, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.bmm(_weights(query, key, mask, scale), value)


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B * K, H / K * T, S] of queries [B * K, H / K * T, D] and mask [B, 1, T, S]."""
    rows, _, length, keys = mask.shape
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(query.dtype).min)
    bias = bias.expand(rows, query.numel() // (rows * length * query.shape[-1]), length, keys)
    logits = torch.baddbmm(bias.reshape(len(query), -1, keys), query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(logits, dim=-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return _attend(query, key, value, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        weights = _weights(query, key, mask, ctx.scale)
        grad_weights = torch.bmm(gradient, value.transpose(1, 2))
        grad_logits = softmax_backward(grad_weights, weights)

        def scaled(left: Tensor, right: Tensor) -> Tensor:
            return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=ctx.scale)

        grad_value = torch.bmm(weights.transpose(1, 2), gradient)
        return scaled(grad_logits, key), scaled(grad_logits.transpose(1, 2), query), grad_value, None, None
