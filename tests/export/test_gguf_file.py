"""Parts of the GGUF exporter against llama.cpp and transformers: how text is split, rotary scaling, what is refused."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrlhf import UserError
from lrlhf.export.command import export
from lrlhf.export.gguf_file import CONTRACTIONS, WORDS, _llama3_factors
from lrlhf.model.pretrained import load_tokenizer
from tests.export.test_formats import PROMPTS, build, by_llama_cpp, hand_over, ours, save_bpe, serve

__all__ = ["serve"]

TEXTS = (
    "It's 12345 o'clock,  déjà vu",
    "we'Ve\n\n\tend 🙂 x",
    "  two",
    "",
    "tea number 2024 isn't\r\n(rain)!",
    "Tell me about cats",
)


def split_by(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def save_sentencepiece(folder: Path, *, complete: bool = True) -> None:
    """LLaMA's kind of tokenizer: spaces are ▁, unknown characters are bytes, every possible pair is a merge."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        [f"▁{p}" for p in PROMPTS], trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    learned = json.loads(made.to_str())["model"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *(t for t in learned["vocab"] if t not in special)]
    vocab = {token: i for i, token in enumerate(tokens)}
    rank = {"".join(m): i for i, m in enumerate(learned["merges"])}
    pairs = [(t[:i], t[i:]) for t in rank for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    merges = sorted(pairs, key=lambda pair: rank["".join(pair)]) if complete else [tuple(m) for m in learned["merges"]]
    whole = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


SPLITS = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": split_by(CONTRACTIONS + WORDS % ""),
}


def export_with(tmp_path: Path, save) -> Path:
    base = build("llama", tmp_path / "base", vocab_size=400)
    save(tmp_path / "base")
    export(hand_over(base, tmp_path / "handover", "sft"), str(tmp_path / "out"), form="gguf", dtype="float16")
    return tmp_path / "out/model.gguf"


@pytest.mark.parametrize("kind", [*SPLITS, "sentencepiece"])
def test_llama_cpp_splits_text_as_each_kind_of_tokenizer_does(tmp_path, serve, kind):
    save = save_sentencepiece if kind == "sentencepiece" else lambda folder: save_bpe(folder, SPLITS[kind])
    post = serve(export_with(tmp_path, save))
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    longest, letters = 0, random.Random(0)
    jumbled = ["".join(letters.choices("telmabounrc s", k=14)).strip() for _ in range(40)]  # where merges compete
    for text in (*TEXTS, *jumbled):
        ids = tokenizer(text)["input_ids"]
        found = post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert found == ids, text
        longest = max(longest, len(text.encode()) - len(ids))
    assert longest > 3, "merges were used"


def test_byte_fallback_without_every_pair_is_refused(tmp_path):
    with pytest.raises(UserError, match="joins pieces otherwise"):
        export_with(tmp_path, lambda folder: save_sentencepiece(folder, complete=False))


def test_a_way_to_split_that_has_no_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no name for the way this tokenizer splits"):
        export_with(tmp_path, lambda folder: save_bpe(folder, split_by(r"\\p{L}+")))


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama_3_slows_frequencies_as_transformers_does():
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(ROPE)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500.0 ** (torch.arange(0, 64, 2).double() / 64)
    factors = _llama3_factors(config, 64)
    torch.testing.assert_close((plain / factors).float(), scaled, atol=0, rtol=1e-5)
    assert len(factors.unique()) > 3, "unchanged, in between and divided"


@pytest.mark.parametrize("rope", ["llama3", "linear"])
def test_llama_cpp_runs_scaled_rotary_embeddings_alike(tmp_path, serve, rope):
    parameters = dict(ROPE) if rope == "llama3" else {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    base = build("llama", tmp_path / "base", rope_parameters=parameters)
    source = hand_over(base, tmp_path / "handover", "sft", std=0.03)
    export(source, str(tmp_path / "out"), form="gguf", dtype="float32")
    prompts, logits, _ = ours(source)
    logprobs, _ = by_llama_cpp(serve(tmp_path / "out/model.gguf"), prompts[:1], logits.shape[-1])
    known = logprobs.isfinite()
    assert (logprobs - logits[-1].log_softmax(-1))[known].abs().max() < 0.01


def test_a_scaling_that_is_not_written_is_refused_by_name(tmp_path):
    parameters = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    base = build("llama", tmp_path / "base", rope_parameters=parameters)
    with pytest.raises(UserError, match="rotary scaling of type dynamic is not written"):
        export(hand_over(base, tmp_path / "handover", "sft"), str(tmp_path / "out"), form="gguf")
