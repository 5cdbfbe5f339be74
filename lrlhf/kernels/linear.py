"""fp32 matrix products on CPUs by oneDNN, where PyTorch's own library runs half as fast on AMD processors.

With AVX-512 that is everywhere. With AVX2 it is where the weight does not fit the cache: the LM head, and the layers of
a 7B model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrlhf.kernels.operators import LINEAR

AVAILABLE = LINEAR is not None and torch.backends.mkldnn.is_available()
"""Whether there is oneDNN's product."""
EVERYWHERE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether this processor gains by it whatever the shape."""
LARGE = 2**22
"""Numbers in a weight, 16 MiB, from which others gain too, in the forward pass."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, equal to `torch.nn.functional.linear` up to the order of sums.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O] in the dtype of `x`.
    """
    ours = AVAILABLE and (EVERYWHERE or weight.numel() >= LARGE)
    ours = ours and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not ours or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, weight, bias)
    product = _Linear.apply(x, weight) if torch.is_grad_enabled() else _product(x, weight)
    return product if bias is None else product + bias


def _product(x: Tensor, weight: Tensor) -> Tensor:
    assert LINEAR is not None
    return LINEAR(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product = _product if EVERYWHERE else torch.nn.functional.linear
        grad_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        return grad_x, grad_weight
