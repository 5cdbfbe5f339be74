"""The gate of a SwiGLU layer (arXiv 2002.05202), which keeps its two inputs for the backward pass and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrlhf.kernels.operators import silu_backward


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, and its gradients, to the bit as PyTorch makes them from the two operations.

    Args:
        gate: [..., I].
        up: [..., I] of the same dtype.

    Returns:
        [..., I].
    """
    if torch.is_grad_enabled():
        return _GatedSilu.apply(gate, up)
    return torch.nn.functional.silu(gate).mul_(up)


class _GatedSilu(torch.autograd.Function):
    """The backward pass makes silu(gate) again: a third less is kept, for one pass over memory more."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = torch.nn.functional.silu(gate).mul_(gradient)
        return silu_backward(gradient * up, gate), grad_up
