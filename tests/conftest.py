"""A tiny random LLaMA and a byte-level tokenizer, made once: most tests need a model, none needs a good one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrlhf.cli.start import quiet

quiet()
torch.set_num_threads(1)  # tiny tensors: one thread is faster, and leaves the machine to others


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def save_tokenizer(folder: Path, pad: str = "<pad>") -> int:
    """Bytes, <pad>, <s> and </s>; returns how many that are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_tiny_llama(folder: Path, *, seed: int = 0, pad: str = "<pad>", **config) -> Path:
    """A two-layer LLaMA over bytes, with <s>, </s> and <pad>."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": save_tokenizer(folder, pad),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ["sun", "rain", "tea", "cat", "road", "book", "song", "lake"]


@pytest.fixture(scope="session")
def data_files(tmp_path_factory) -> dict[str, str]:
    """Forty demonstrations, forty pairs and forty prompts of a few words."""
    folder = tmp_path_factory.mktemp("data")
    pick = [f"{WORDS[i % 8]} {WORDS[(i * 3) % 8]} {i}" for i in range(40)]
    return {
        "sft": write_jsonl(folder / "sft.jsonl", [{"instruction": p, "input": "", "output": p[:5]} for p in pick]),
        "pairs": write_jsonl(
            folder / "pairs.jsonl",
            [{"instruction": p, "output_1": "yes " + p[:3], "output_2": "no", "preference": 1 + i % 2}
             for i, p in enumerate(pick)],
        ),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"instruction": p} for p in pick]),
    }  # fmt: skip
