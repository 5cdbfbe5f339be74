"""The inner half of a gated layer (arXiv 2002.05202) without gradients, its pointwise half inside oneDNN's products."""

import torch
from torch import Tensor

from lrlhf.functional.linear import AVAILABLE


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T).

    Args:
        x: [..., I].
        gate: G [O, I].
        up: U [O, I].

    Returns:
        [..., O] in the dtype of `x`.
    """
    types = (torch.float32, torch.bfloat16)
    ours = AVAILABLE and x.device.type == "cpu" and x.dtype == gate.dtype == up.dtype and x.dtype in types
    if not ours or x.numel() == 0:
        linear = torch.nn.functional.linear
        return torch.nn.functional.silu(linear(x, gate)) * linear(x, up)
    product = torch.ops.mkldnn._linear_pointwise
    return product.binary(x, product(x, gate, None, "swish", [], ""), up, None, "mul")
