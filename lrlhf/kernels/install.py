"""Exchanges layers of a transformers model for ours, and its attention: the one place where that happens.

LRLHF_KERNELS=0 in the environment leaves models, and the adapters on them, as transformers and peft make them.
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrlhf.kernels.attention import attention
from lrlhf.kernels.gate import gated_silu
from lrlhf.kernels.linear import linear
from lrlhf.kernels.norm import rms_norm
from lrlhf.kernels.packing import attend_packed, is_packed

ATTENTION = "lrlhf"
"""The name of our attention among those that transformers knows."""
RMS_NORM = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")
"""Classes of transformers that are x / rms(x) * weight."""
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers that are down_proj(activation(gate_proj(x)) * up_proj(x))."""


def enabled() -> bool:
    """Whether layers are exchanged at all."""
    return os.environ.get("LRLHF_KERNELS", "1") != "0"


def install(model: Any) -> Any:
    """Let a model use our gates, products, norms and attention; each runs where it is faster, and else gives way.

    Returns:
        The model, changed in place.
    """
    if not enabled():
        return model
    for module in model.modules():
        kind: Any = type(module)
        if kind is nn.Linear:
            module.__class__ = Linear
        elif kind.__name__ in RMS_NORM:
            module.__class__ = _norm(kind)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    return install_gates(model)


def install_gates(model: Any) -> Any:
    """Let a model's gated layers keep less for their backward pass, on any device.

    Returns:
        The model, changed in place.
    """
    for module in model.modules() if enabled() else ():
        if type(module).__name__ in GATED and getattr(model.config, "hidden_act", "silu") == "silu":
            kind: Any = type(module)
            module.__class__ = _gated(kind)
    return model


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: of rows, or of a packed line (`lrlhf.kernels.packing`).

    Args:
        module: the layer.
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, E].
        attention_mask: [B, 1, T, S] bool; None is causal.
        options: scaling, dropout and others of PyTorch's attention.

    Returns:
        [B, T, H, E], and no weights.
    """
    mask, scaling = attention_mask, options.pop("scaling", None) or query.shape[-1] ** -0.5
    plain = not options.get("dropout") and options.get("position_bias") is None
    plain = plain and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
    ours = plain and query.device.type == "cpu" and query.dtype == torch.bfloat16

    def rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if ours:
            return attention(query, key, value, mask, scaling).transpose(1, 2)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)[0]

    if mask is not None and is_packed(query, mask):
        return attend_packed(rows, query, key, value, mask).contiguous(), None
    return rows(query, key, value, mask).contiguous(), None


class Linear(nn.Linear):
    """A linear layer with our product where it is faster: fp32 on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return linear(input, self.weight, self.bias)


@cache
def _norm(kind: type[nn.Module]) -> type[nn.Module]:
    """A root-mean-square norm of transformers with our kernel on a CPU."""

    class RMSNorm(kind):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.device.type != "cpu":
                return super().forward(hidden_states)
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return RMSNorm


@cache
def _gated(kind: type[nn.Module]) -> type[nn.Module]:
    """A gated layer of transformers with our gate."""

    class GatedMLP(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))

    return GatedMLP
