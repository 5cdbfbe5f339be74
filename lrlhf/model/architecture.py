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
"""Names under which decoders take and return their cache: key-value pairs, or a state of their own."""


def text_config(model: Any) -> Any:
    """The config of the language model.

    In models of text and images it lies inside the config of the whole.
    """
    return model.config.get_text_config(decoder=True)


def trunk(model: Any) -> Any:
    """The decoder: the module whose last hidden states the LM head turns into logits.

    Args:
        model: a causal language model of transformers.

    Raises:
        UserError: the architecture has no decoder apart from its head.
    """
    apart = (model, model.get_output_embeddings())
    for found in (model.get_decoder(), model.base_model, getattr(model, "model", model)):
        if found not in apart:
            return found
    raise UserError(f"{type(model).__name__}: this architecture has no decoder apart from its LM head.")


def carries_state(model: Any) -> bool:
    """Whether a layer passes a state from token to token (state-space models, convolutions, linear attention).

    No attention mask reaches such a state: padding, or another row in the same line, would change it.
    """
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    convolutions = any(isinstance(module, nn.Conv1d) for module in trunk(model).modules())
    return model._is_stateful or convolutions or not kinds <= ATTENDING


def supports_packing(model: Any) -> bool:
    """Whether rows may run packed, one behind the other in a single line of tokens.

    That needs full attention in every layer, by our kernel, which keeps the rows apart.
    """
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"moe", "mlp"}
    whole = kinds <= {"full_attention"} and not getattr(config, "sliding_window", None)
    return config._attn_implementation == ATTENTION and whole


@torch.no_grad()
def comes_out_alike(model: Any, *, packed: bool) -> bool:
    """Whether the decoder gives a row the hidden states that it has alone, when it is padded or packed.

    Tried on a row of five tokens, because some decoders count positions or build masks in ways that no config tells.

    Args:
        model: a causal language model of transformers; on the meta device nothing can be tried, and it counts as true.
        packed: try it packed behind another row, instead of padded on the left beside it.
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
    """An empty cache, as the keyword argument under which this decoder takes it and returns it.

    Returns:
        One entry; its value is None where the decoder makes its cache itself.

    Raises:
        UserError: the decoder keeps no cache.
    """
    taken = inspect.signature(trunk(model).forward).parameters
    name = next((name for name in CACHES if name in taken), None)
    if name is None:
        raise UserError(f"{type(model).__name__}: its decoder keeps no cache, so no response can be sampled.")
    usual = name == "past_key_values" and model._supports_default_dynamic_cache()
    return {name: DynamicCache(config=text_config(model)) if usual else None}


class FinalLogits:
    """From hidden states to logits as the model itself does it: its head, and what scales or caps after the head.

    The model's own forward pass runs, while its decoder is replaced by one that returns the given hidden states; so
    nothing of the model's last step has to be known here.
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
    """The output of the replaced decoder: hidden states, and None for anything else that the model reads from it."""

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
    """What maps hidden states to logits: the LM head if nothing follows it, else `FinalLogits`.

    Both are compared on eight tokens, and on states a hundred times as large, where a soft cap shows.

    Raises:
        UserError: the model's logits depend on more than its decoder's last hidden states.
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
