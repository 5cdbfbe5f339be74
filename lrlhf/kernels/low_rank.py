"""The low-rank update of a linear layer (arXiv 2106.09685, equation 3) as one small product and one that adds."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """result + x A^T B^T.

    Args:
        result: [..., O], of the layer beneath.
        x: [..., I], its input, of the same dtype.
        down: A [R, I] of the same dtype; of several adapters, one above the other.
        up: B [O, R] of the same dtype, times its scale; of several adapters, side by side.

    Returns:
        [..., O].
    """
    if torch.is_grad_enabled():
        return _AddLowRank.apply(result, x, down, up)
    return _add(result, x.flatten(0, -2) @ down.t(), up)


def _add(result: Tensor, between: Tensor, up: Tensor) -> Tensor:
    return torch.addmm(result.flatten(0, -2), between, up.t()).view(result.shape)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        between = rows @ down.t()
        ctx.save_for_backward(rows, down, up, between)
        return _add(result, between, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, up, between = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        grad_between = flat @ up
        grad_x = (grad_between @ down).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        grad_down = grad_between.t() @ rows if ctx.needs_input_grad[2] else None
        grad_up = (between.t() @ flat).t() if ctx.needs_input_grad[3] else None
        return gradient, grad_x, grad_down, grad_up
