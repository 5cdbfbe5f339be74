"""Operators of PyTorch that are not public, each with what stands in for it where a version has it no more."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _found(module: Any, name: str) -> Callable[..., Tensor] | None:
    try:
        return getattr(module, name)
    except (AttributeError, RuntimeError):
        return None


LINEAR = _found(torch.ops.mkldnn, "_linear_pointwise")
"""oneDNN's product; `lrlhf.kernels.linear` uses PyTorch's own where there is none."""
_SOFTMAX_BACKWARD = _found(torch, "_softmax_backward_data")
_SILU_BACKWARD = _found(torch.ops.aten, "silu_backward")


def softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient by z of weights = softmax(z) over the last axis: weights * (gradient - sum(gradient * weights)).

    Args:
        gradient: [..., S], by the weights.
        weights: [..., S] of the same dtype.
    """
    if _SOFTMAX_BACKWARD is not None:
        return _SOFTMAX_BACKWARD(gradient, weights, -1, weights.dtype)
    return weights * (gradient - (gradient * weights).sum(-1, keepdim=True))


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient by x of x * sigmoid(x): gradient * s * (1 + x * (1 - s)), s = sigmoid(x).

    Args:
        gradient: [..., I], by the result.
        x: [..., I] of the same dtype.
    """
    if _SILU_BACKWARD is not None:
        return _SILU_BACKWARD(gradient, x)
    s = torch.sigmoid(x)
    return gradient * s * (1 + x * (1 - s))
