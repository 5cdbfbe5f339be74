"""Which type of weights a device multiplies fast."""

from typing import Any

import torch

from lrlhf.config import DType

BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
"""What PyTorch calls the instructions of a processor that multiplies bfloat16: x86, x86 and Arm."""


def processor() -> dict[str, Any]:
    """What PyTorch knows of the processor: its name and instructions; empty where it cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def fast_dtype(device: str) -> DType:
    """bfloat16 where the device multiplies it in hardware, else float32.

    A processor without such instructions takes up to 80 times as long for a product in bfloat16 as for one in float32
    (measured on one with AVX2 alone).

    Args:
        device: cuda, or any other for the processor. A GPU that is not in this machine is taken for one that does.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return "bfloat16"
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = processor()
    fast = torch.backends.mkldnn.is_available() and any(has.get(name) for name in BF16_PRODUCTS)
    return "bfloat16" if fast else "float32"


def auto_dtype(device: str, *, whole: bool) -> DType:
    """What `dtype: auto` means for a base.

    Args:
        device: cuda, or any other for the processor.
        whole: whether full models train, which is done in fp32.
    """
    return "float32" if whole else fast_dtype(device)
