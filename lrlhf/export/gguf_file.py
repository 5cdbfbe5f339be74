"""A model as a GGUF file for llama.cpp: names and settings of its families, rotated weights, and the tokenizer.

What llama.cpp would run otherwise than transformers does is refused by name: families, kinds of rotary scaling,
tokenizers whose way of splitting text it does not know.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrlhf.errors import UserError
from lrlhf.evaluation.system import System

FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA"}
"""Families of transformers, and llama.cpp's names for them."""
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
BLOCK = 32
"""Weights that share a scale in q8_0."""

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
SPLITS = {CONTRACTIONS + WORDS % "{1,3}": "llama-bpe", CONTRACTIONS + WORDS % "": "qwen2"}
"""Regular expressions by which byte-level tokenizers split text, and llama.cpp's names for them."""


def check_gguf(config: Any, system: System) -> None:
    """Refuse what `write_gguf` would refuse, before a model is merged.

    Args:
        config: of the model.
        system: whose tokenizer it has.

    Raises:
        UserError: a family, a setting or a tokenizer that llama.cpp does not run as transformers does.
    """
    _architecture(config)
    _vocabulary(system, config.vocab_size)


def write_gguf(config: Any, tensors: dict[str, Tensor], system: System, path: Path, dtype: str) -> None:
    """Write a model, tensor by tensor.

    Args:
        config: of the model.
        tensors: of the merged model, by name.
        system: whose tokenizer it has; saved in the folder of `path` before.
        path: of the file.
        dtype: of matrices: float32, float16, bfloat16 or q8_0 (8 bits and a scale for each 32 weights). Vectors are
            fp32, and so is in q8_0 what does not divide into blocks: fp16.

    Raises:
        UserError: a family, a setting or a tokenizer that llama.cpp does not run as transformers does.
    """
    import gguf

    arch = _architecture(config)
    kind, tokens, types, scores = _vocabulary(system, config.vocab_size)
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    writer.add_name(
        f"{Path(system.handover.base_model).name}, {system.role_name}" if system.handover else system.source
    )
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(TYPES[dtype], f"MOSTLY_{TYPES[dtype]}")])
    _add_vocabulary(writer, system, path.parent, kind, tokens, types, scores)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors = {"rope_freqs.weight": _llama3_factors(config, head_dim), **tensors}
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    stored = [(name, _gguf_name(names, name), *_kind(tensor, dtype)) for name, tensor in tensors.items()]
    for name, theirs, raw, size in stored:
        writer.add_tensor_info(theirs, tuple(tensors[name].shape), np.dtype(np.float32), size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, raw, _ in stored:
        tensor = _as_llama_cpp_has_it(name, tensors[name].float(), config)
        writer.write_tensor_data(gguf.quantize(tensor.cpu().numpy(), raw))
    writer.close()


def _architecture(config: Any) -> Any:
    """llama.cpp's name of the family, if it runs this config as transformers does."""
    try:
        import gguf
    except ImportError:
        raise UserError("export --format gguf needs the package gguf: pip install 'lrlhf[export]'.") from None
    family = config.model_type
    if family not in FAMILIES:
        raise UserError(
            f"GGUF: this exporter knows {', '.join(FAMILIES)}, not {family}; export it with --format merged, which "
            "llama.cpp's own converter may take."
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise UserError(f"GGUF: rotary scaling of type {rope} is not written; use --format merged.")
    activation = "gelu_pytorch_tanh" if family == "gemma" else "silu"
    if activation not in (config.hidden_act, getattr(config, "hidden_activation", None)):
        raise UserError(f"GGUF: llama.cpp runs {family} with {activation}, and this model has {config.hidden_act}.")
    return getattr(gguf.MODEL_ARCH, FAMILIES[family])


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _context(config: Any) -> int:
    """Tokens that llama.cpp runs as transformers does: it looks back over all of them, without a sliding window."""
    window = getattr(config, "sliding_window", None)
    used = window and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if used else config.max_position_embeddings


def _gguf_name(names: Any, name: str) -> str:
    if name == "rope_freqs.weight":
        return name
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"GGUF: llama.cpp has no place for {name} in this family; use --format merged.")
    return found


def _kind(tensor: Tensor, dtype: str) -> tuple[Any, int]:
    """How a tensor is stored, and its bytes: matrices as asked, vectors in fp32."""
    from gguf import GGMLQuantizationType as Kind

    if tensor.ndim == 1 or dtype == "float32":
        return Kind.F32, 4 * tensor.numel()
    if dtype == "q8_0" and tensor.shape[-1] % BLOCK == 0:
        return Kind.Q8_0, tensor.numel() // BLOCK * (BLOCK + 2)
    return (Kind.BF16 if dtype == "bfloat16" else Kind.F16), 2 * tensor.numel()


def _as_llama_cpp_has_it(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Its LLaMA rotates neighbours, where transformers rotates halves; its Gemma has the 1 of 1 + w in the norms."""
    if config.model_type == "gemma" and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or FAMILIES[config.model_type] != "LLAMA":
        return tensor
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _llama3_factors(config: Any, head_dim: int) -> Tensor:
    """By how much LLaMA 3 slows each frequency [head_dim / 2]: not at all, by `factor`, or in between."""
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = original * frequencies / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _vocabulary(system: System, size: int) -> tuple[str, list[bytes], list[int], list[float]]:
    """llama.cpp's name for the way text is split (spm, or that of a byte-level BPE), tokens, their types and scores."""
    from gguf import TokenType

    system.backbone  # noqa: B018 loads the tokenizer
    made = _tokenizer_json(system)
    kind = _kind_of_tokenizer(made)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in made["model"]["merges"]]
    ranks = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
    if kind == "spm":
        _refuse_incomplete(merges, ranks, made["model"]["vocab"])
    by_id = {number: token for token, number in system.tokenizer.get_vocab().items()}
    added = system.tokenizer.added_tokens_decoder
    tokens, types, scores = [], [], []
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        what = TokenType.NORMAL if number in by_id else TokenType.UNUSED
        if number in added:
            what = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            what = TokenType.UNKNOWN if token == system.tokenizer.unk_token and kind == "spm" else what
        elif kind == "spm" and len(token) == 6 and token.startswith("<0x"):
            what = TokenType.BYTE
        tokens.append(token.encode("utf-8"))
        types.append(int(what))
        scores.append(ranks.get(token, -float(len(merges)) if what == TokenType.NORMAL else 0.0))
    return kind, tokens, types, scores


def _refuse_incomplete(merges: list[tuple[str, ...]], ranks: dict[str, float], vocab: dict[str, int]) -> None:
    """SentencePiece joins any two neighbours whose union is a token, the best token first; merges must say the same."""
    pairs = {(token[:i], token[i:]) for token in ranks for i in range(1, len(token))}
    joined = {pair for pair in pairs if pair[0] in vocab and pair[1] in vocab}
    order = [ranks["".join(merge)] for merge in merges]
    if joined != set(merges) or order != sorted(order, reverse=True):
        raise UserError(
            "GGUF: this tokenizer falls back to bytes as SentencePiece does, and joins pieces otherwise; llama.cpp "
            "would split text in another way. Use --format merged."
        )


def _tokenizer_json(system: System) -> dict[str, Any]:
    backend = getattr(system.tokenizer, "backend_tokenizer", None)
    made = json.loads(backend.to_str()) if backend else {"model": {"type": "unknown"}}
    if made["model"]["type"] != "BPE" or not made["model"]["merges"]:
        raise UserError(
            f"GGUF: of tokenizers llama.cpp gets BPE with merges here, not {made['model']['type']} with "
            f"{len(made['model'].get('merges') or ())}; use --format merged."
        )
    return made


def _kind_of_tokenizer(made: dict[str, Any]) -> str:
    """llama.cpp's name, found by what the tokenizer does, so that text is split there as it is here."""
    model, split = made["model"], made.get("pre_tokenizer") or {}
    steps = list(_steps(split))
    if model.get("byte_fallback"):
        return "spm"
    kinds = [step["type"] for step in steps]
    whole = model.get("ignore_merges", False)
    bytes_last = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if bytes_last and kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not whole:
        return "gpt-2"
    if bytes_last and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and not whole:
        return "smollm"
    if bytes_last and kinds == ["Split", "ByteLevel"]:
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name and whole == (name == "llama-bpe"):
            return name
    raise UserError("GGUF: llama.cpp has no name for the way this tokenizer splits text; use --format merged.")


def _steps(split: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if split.get("type") == "Sequence":
        for step in split["pretokenizers"]:
            yield from _steps(step)
    elif split:
        yield split


def _add_vocabulary(
    writer: Any, system: System, folder: Path, kind: str, tokens: list[bytes], types: list[int], scores: list[float]
) -> None:
    import gguf

    tokenizer = system.tokenizer
    if kind == "spm":
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(tokenizer.tokenize("x")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=kind != "spm", n_vocab=len(tokens))
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": begins, "eos": False}
    stops = system.stop_ids.tolist()
    special.special_token_ids |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    special.add_to_gguf(writer, quiet=True)
