"""Quantised frozen bases: bitsandbytes' 8-bit and 4-bit linear layers under adapters in fp32.

The only file that knows bitsandbytes. peft's `prepare_model_for_kbit_training` is not used: it would turn the norms of
the base that all roles share into fp32, and the rest of what it does (freeze, checkpoint) is done here already.
"""

from typing import Any

import torch
from torch import nn

from lrlhf.config import Quantization
from lrlhf.errors import UserError


def quantization_config(quantize: Quantization, dtype: torch.dtype) -> Any:
    """The settings as transformers spells them; products are computed in `dtype` (int8: in 8 bits).

    Args:
        quantize: the settings.
        dtype: of the base.
    """
    from transformers import BitsAndBytesConfig

    if quantize.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize.kind,
        bnb_4bit_use_double_quant=quantize.double,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_gradients(model: nn.Module) -> None:
    """Switch off bitsandbytes' CPU kernel without gradient.

    On processors with AVX512-BF16 the first pass without gradient repacks 4-bit weights for it for good: after a
    rollout no adapter would get a gradient, without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def make_shardable(model: Any) -> None:
    """Let 4-bit weights be plain parameters in the model's type, as FSDP needs them; no bit of them changes.

    FSDP cuts a weight by rows and puts it together again as a tensor of its own kind. bitsandbytes then finds out from
    the layer how the weight is packed. The scales stay whole on every process.

    Args:
        model: quantised or not.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            module.quant_state = weight.quant_state
            module.weight = nn.Parameter(weight.data.flatten().view(model.dtype)[:, None], requires_grad=False)
            module.quant_storage = model.dtype


def refuse_paged(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Refuse a paged optimizer of bitsandbytes on a CPU, where it would silently be an unpaged one.

    Raises:
        UserError: naming the unpaged one.
    """
    if getattr(optimizer, "is_paged", False) and device.type == "cpu":
        name = type(optimizer).__name__
        raise UserError(f"model.optimizer: {name} pages to the CPU and needs a GPU; use {name.removeprefix('Paged')}.")
