"""What the architecture of a base asks of the passes over it: read from its config and modules, never from its name.

Three kinds of bases: rows are packed where every layer is full attention that runs through our kernels; padded where
layers are attention of another kind; and run by equal length, without padding, where a layer carries a state along the
sequence (state-space models, convolutions, linear attention), which padding and neighbours would leak into.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lrlhf.errors import UserError
from lrlhf.functional import position_ids
from lrlhf.kernels.install import ATTENTION
from lrlhf.kernels.packing import pack, packed_mask

ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp"}
"""Kinds of layers (`layer_types` of a config) that a mask keeps from looking at padding."""
CACHES = ("past_key_values", "cache_params", "state")
"""What a decoder calls the memory that it makes for itself."""


def text_config(model: Any) -> Any:
    """The config of the language model, also where it lies inside that of a model of text and images."""
    return model.config.get_text_config(decoder=True)


def trunk(model: Any) -> Any:
    """The module that makes the hidden states from which the LM head makes logits.

    Raises:
        UserError: there is none that can be told from the head.
    """
    apart = (model, model.get_output_embeddings())
    for found in (model.get_decoder(), model.base_model, getattr(model, "model", model)):
        if found not in apart:
            return found
    raise UserError(f"{type(model).__name__}: this architecture has no decoder apart from its LM head.")


def carries_state(model: Any) -> bool:
    """Whether a layer hands a state from token to token, so that padding and packed rows would leak into each other."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    convolutions = any(isinstance(module, nn.Conv1d) for module in trunk(model).modules())
    return model._is_stateful or convolutions or not kinds <= ATTENDING


def supports_packing(model: Any) -> bool:
    """Whether rows may run packed, in one line: all layers are full attention, and attention is our kernel."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"moe", "mlp"}
    whole = kinds <= {"full_attention"} and not getattr(config, "sliding_window", None)
    return config._attn_implementation == ATTENTION and whole


@torch.no_grad()
def comes_out_alike(model: Any, *, packed: bool) -> bool:
    """Whether a row of five tokens comes out of the decoder as it does alone: padded, or packed behind another row.

    Some decoders count positions or make masks in ways of their own, which no config tells.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return True
    ids = torch.arange(16, device=device).view(2, 8) % text_config(model).vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    inputs = {"input_ids": ids, "position_ids": position_ids(mask), "attention_mask": mask.long()}
    if packed:
        none = ids.new_zeros(0)
        inputs = {name: pack(none, inputs[name], mask) for name in ("input_ids", "position_ids")}
        inputs["attention_mask"] = packed_mask(mask, 0)
    decoder = trunk(model)
    alone = decoder(input_ids=ids[1:, 3:], use_cache=False).last_hidden_state[0].float()
    try:
        rows = decoder(**inputs, use_cache=False).last_hidden_state
    except (RuntimeError, TypeError, ValueError):
        return False
    rounding = 1e-3 if model.dtype == torch.float32 else 0.1  # what a few layers may round off, many times over
    return bool((rows[-1, -5:].float() - alone).norm() <= rounding * alone.norm())


def own_cache(model: Any) -> dict[str, Any]:
    """The argument by which a decoder takes its own cache and gives it back, empty: None lets the decoder make it."""
    taken = inspect.signature(trunk(model).forward).parameters
    name = next((name for name in CACHES if name in taken), None)
    if name is None:
        raise UserError(f"{type(model).__name__}: its decoder keeps no cache, so no response can be sampled.")
    usual = name == "past_key_values" and model._supports_default_dynamic_cache()
    return {name: DynamicCache(config=text_config(model)) if usual else None}


class FinalLogits:
    """The model's own way from hidden states to logits: its head, and whatever scales or caps after it.

    The model's forward pass runs with a decoder that answers with the states at hand.
    """

    def __init__(self, model: Any):
        self.model = model

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the head."""
        return self.model.get_output_embeddings().parameters()

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., V]."""
        line = hidden.reshape(1, -1, hidden.shape[-1])
        with _answering(trunk(self.model), line):
            logits = self.model(input_ids=torch.zeros(line.shape[:2], dtype=torch.long, device=line.device)).logits
        return logits.view(*hidden.shape[:-1], -1)


class _Answer(BaseModelOutputWithPast):
    """Hidden states, and None for whatever else a model asks its decoder for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    before = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: _Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


@torch.no_grad()
def logits_of(model: Any) -> nn.Module | FinalLogits:
    """What maps hidden states to logits: the LM head where that is all, else the model's own last step.

    Raises:
        UserError: the model's logits are not a function of its decoder's hidden states.
    """
    head, final = model.get_output_embeddings(), FinalLogits(model)
    weight = next(head.parameters())
    if weight.device.type == "meta":
        return head
    ids = torch.arange(8, device=weight.device)[None] % text_config(model).vocab_size
    hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(final(hidden), model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise UserError(f"{type(model).__name__}: its logits are made from more than its last hidden states.")
    large = torch.cat([hidden, 100 * hidden])  # a cap shows on large logits alone
    plain = hidden.dtype == weight.dtype and torch.equal(head(large).float(), final(large).float())
    return head if plain else final
