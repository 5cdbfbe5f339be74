"""The forms that a role leaves in: one peft adapter, a merged model, a GGUF file, a reward model of transformers.

Each is checked before it is written: its log-probs, or its scores, against those of the role that was trained.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrlhf.errors import UserError
from lrlhf.evaluation.system import System
from lrlhf.export.gguf_file import check_gguf, write_gguf
from lrlhf.export.templates import chat_template, write_modelfile
from lrlhf.model.adapters import CONFIG, concatenate, place
from lrlhf.model.pretrained import as_classifier
from lrlhf.modules.self_check import rounding
from lrlhf.run.handover import PROBE, score_probe

SHARD = "5GB"
"""Of weights in one file at most."""


def write_adapter(system: System, folder: Path, dtype: str) -> str:
    """The role's stack as ONE plain peft adapter, of the summed rank.

    Args:
        system: that was trained.
        folder: to write into.
        dtype: float32, in which adapters train.

    Returns:
        A sentence on what was checked.

    Raises:
        UserError: the role is a reward model, was trained without LoRA, or no single adapter can hold its stack.
    """
    handover = _trained(system, head=False)
    if not handover.stack:
        raise UserError(f"{system.source} was trained without LoRA and is no adapter; use --format merged.")
    concatenate([place(handover.folder, name) for name in handover.stack], folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": handover.base_model}, indent=2))
    backbone, ids = system.backbone, _probe(system)
    with backbone.role(system.role_name):
        expected = backbone.plain_logits(ids)
    backbone.load_role("exported", ("exported",), folder, head=False)
    with backbone.role("exported"):
        return _compare(system, expected, backbone.plain_logits(ids), "one adapter", system.dtype)


def write_merged(system: System, folder: Path, dtype: str) -> str:
    """The role as a plain model of transformers, in safetensors of at most 5 GB; arguments and errors as above."""
    model, checked = _merge(system, dtype)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return checked


def write_gguf_model(system: System, folder: Path, dtype: str) -> str:
    """The role as model.gguf for llama.cpp, and a Modelfile for Ollama; the tokenizer lies in `folder` already.

    Args:
        system: that was trained.
        folder: to write into.
        dtype: float32, float16, bfloat16 or q8_0, of the matrices in the file.
    """
    _trained(system, head=False)
    check_gguf(system.backbone.model.config, system)
    model, checked = _merge(system, system.dtype if dtype == "q8_0" else dtype)
    write_gguf(model.config, model.state_dict(), system, folder / "model.gguf", dtype)
    write_modelfile(system, folder)
    return checked


def write_reward(system: System, folder: Path, dtype: str) -> str:
    """The reward model as AutoModelForSequenceClassification with one label, read at the last token.

    Sequence classifiers of transformers find the last token by the padding token, so that token is made one that ends
    no response.
    """
    _trained(system, head=True)
    head: Any = system.backbone.heads[system.role_name]
    kind = getattr(torch, dtype)
    if getattr(head, "bias", None) is not None and float(head.bias) != 0:
        raise UserError(
            f"{system.source} has a head with a bias ({float(head.bias):.3g}), which no sequence classifier of "
            "transformers has; train the reward model again: heads have none any more."
        )
    expected = score_probe(system.backbone, system.role_name, system.tokenizer)
    model = as_classifier(system.backbone.merge(system.role_name, kind), head.weight.to(kind), _pad_token(system))
    ids = torch.tensor([system.tokenizer(PROBE)["input_ids"]], device=model.device)
    with torch.no_grad():
        score = float(model(input_ids=ids).logits)
    _refuse(system, abs(score - expected) / max(1.0, abs(expected)), "the score", dtype)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return f"The probe text scores {score:.6g} here and {expected:.6g} in the run."


def save_tokenizer(system: System, folder: Path, *, reward: bool) -> list[str]:
    """Tokenizer with a chat template that renders as the role was trained, and generation config with every stop token.

    Args:
        system: that was trained.
        folder: to write into.
        reward: whether the text ends at the end of the response, as reward models read it.

    Returns:
        What the reader of the export should know.
    """
    template, notes = chat_template(system, ends=reward)
    tokenizer = copy.deepcopy(system.tokenizer)
    tokenizer.chat_template = template
    if reward:
        tokenizer.pad_token_id = _pad_token(system)
    tokenizer.save_pretrained(folder)
    if not reward:
        generation_config(system).save_pretrained(folder)
    return notes


def generation_config(system: System) -> Any:
    """As the run sampled: temperature, top_k, top_p, and every token that ends a response."""
    config = copy.deepcopy(system.backbone.model.generation_config)
    sampling = system.sampling
    config.update(
        eos_token_id=system.stop_ids.tolist(),
        pad_token_id=system.tokenizer.pad_token_id,
        bos_token_id=system.tokenizer.bos_token_id,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=sampling.top_k if sampling.temperature else None,
        top_p=sampling.top_p if sampling.temperature else None,
    )
    config._from_model_config = False
    return config


def _merge(system: System, dtype: str) -> tuple[Any, str]:
    """The plain model, and what was checked."""
    _trained(system, head=False)
    backbone, ids = system.backbone, _probe(system)
    with backbone.role(system.role_name):
        expected = backbone.plain_logits(ids)
    generation = generation_config(system)
    model = backbone.merge(system.role_name, getattr(torch, dtype))
    model.generation_config = generation
    with torch.no_grad():
        found = model(input_ids=ids[None], use_cache=False).logits[0]
    return model, _compare(system, expected, found, "a merged model", dtype)


def _trained(system: System, *, head: bool) -> Any:
    """The hand-over, if it is of the kind that a format takes."""
    handover = system.handover
    if handover is None:
        raise UserError(f"{system.source} is no run and no hand-over; there is nothing to export.")
    if handover.head != head:
        right = "--format reward" if handover.head else "--format adapter, merged or gguf"
        kind = "a reward model" if handover.head else f"a {handover.role} model"
        raise UserError(f"{system.source} handed over {kind}; export it with {right}.")
    return handover


def _probe(system: System) -> Tensor:
    return torch.tensor(system.tokenizer(PROBE)["input_ids"], device=system.device)


def _compare(system: System, expected: Tensor, found: Tensor, what: str, dtype: str) -> str:
    """How far log-probs lie from the role's, in nats, on average over the tokens and what follows them."""
    before, after = (logits.float().log_softmax(-1) for logits in (expected, found))
    off = float((before.exp() * (before - after).abs()).sum(-1).mean())
    _refuse(system, off, "log-probs", dtype)
    return f"As {what} its log-probs are {off:.2g} nats a token from those of the run, on a fixed text."


def _refuse(system: System, off: float, what: str, dtype: str) -> None:
    allowed = max(rounding(name, system.quantize) for name in (dtype, system.dtype))
    if not off <= allowed:
        raise UserError(
            f"{system.source}: {what} of the export differ by {off:.2g} from the run's, more than rounding gives "
            f"({allowed}); nothing was written, report it."
        )


def _pad_token(system: System) -> int:
    """A token that pads and ends no response."""
    tokenizer, stops = system.tokenizer, system.stop_ids.tolist()
    special = [token for token, added in sorted(tokenizer.added_tokens_decoder.items()) if added.special]
    choice = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
    free = [token for token in choice if token is not None and token not in (*stops, tokenizer.bos_token_id)]
    if not free:
        raise UserError(f"{system.source}: its tokenizer has no token to pad with but those that end a response.")
    return free[0]


FORMATS: dict[str, Callable[..., str]] = {
    "adapter": write_adapter,
    "merged": write_merged,
    "gguf": write_gguf_model,
    "reward": write_reward,
}
"""By the name on the command line."""
