"""Gradient checkpointing: each layer runs again in the backward pass instead of keeping what it computed.

transformers does so in train mode alone, in which some layers also drop out by themselves. PPO's updates must drop
nothing, or the first ratio would not be 1; so here the two are told apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: Any) -> None:
    """Have every layer of a transformers model run again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in _layers(model):
        layer._gradient_checkpointing_func = partial(_recompute, layer, layer._gradient_checkpointing_func)


def set_dropout(model: nn.Module, dropout: bool) -> None:
    """Put the layers into train mode, in which they run again, and say whether they drop out meanwhile.

    Args:
        model: after `recompute_layers`.
        dropout: whether layers may drop out.
    """
    for layer in _layers(model):
        layer.training, layer.drops = True, dropout


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _recompute(layer: Any, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer under torch's `checkpoint`, in the mode that `set_dropout` named."""

    def run(*inputs: Any) -> Any:
        layer.training = layer.drops
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(run, *inputs)
