"""Root-mean-square norm (arXiv 1910.07467), forward and backward in a few passes over memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 inside and rounded once.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean of squares.

    Returns:
        [..., H] in the dtype of `x`.
    """
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normalize(x, weight, eps)[0]


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms(x), which is at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps)
    result = torch.mul(wide, inverse[..., None], out=None if wide is x else wide)
    return result.mul_(weight).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and u = weight * dy: dx = r u - x r^3 <u, x> / H; dweight is the sum of r x dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide = x.to(inverse.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * wide * inverse[..., None]).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = gradient * weight.to(inverse.dtype)
        along = torch.linalg.vecdot(scaled, wide) * inverse.pow(3) / -x.shape[-1]
        grad_x = scaled.mul_(inverse[..., None]).addcmul_(wide, along[..., None]).to(x.dtype)
        return grad_x, grad_weight, None
