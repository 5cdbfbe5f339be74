"""A study small enough for many seeds: a 260,000-parameter LLaMA that tells children's stories, and data of its own.

    python -m bench.stories.prepare ../shared/data/models/stories260K runs/stories

Writes, into the second folder, the model in the form of transformers (llama2.c's stories260K, MIT: 64 wide, 5 layers,
512 tokens), prompts (openings of its own stories), demonstrations (stories it told) and pairs (the happier
and more varied of two continuations, with one verdict in five turned round).
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.stories.gold import happy_and_varied

OPENING, STORY = 12, 40
"""Tokens of a prompt and of a response."""
COUNTS = {"sft": 512, "pairs": 3000, "prompts": 2048, "val": 128}
TURNED = 0.2
"""Share of verdicts that are turned round."""


def read_model(path: Path) -> LlamaForCausalLM:
    """llama2.c's checkpoint, version 0: seven integers, then fp32 matrices by kind, each over all layers."""
    raw = path.read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", raw[:28])
    numbers, place = np.frombuffer(raw[28:], dtype=np.float32), 0
    kv = width // heads * kv_heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return torch.from_numpy(numbers[place - size : place].reshape(shape).copy())

    embedding, norm_1 = take(abs(vocabulary), width), take(layers, width)
    q, k, v, o = (
        take(layers, width, width),
        take(layers, kv, width),
        take(layers, kv, width),
        take(layers, width, width),
    )
    norm_2, gate = take(layers, width), take(layers, hidden, width)
    down, up, norm = take(layers, width, hidden), take(layers, hidden, width), take(width)

    def by_halves(matrix: torch.Tensor, count: int) -> torch.Tensor:
        """llama2.c rotates pairs of neighbours, transformers the two halves of a head."""
        return matrix.view(count, width // heads // 2, 2, width).transpose(1, 2).reshape(matrix.shape)

    config = LlamaConfig(
        vocab_size=abs(vocabulary), hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, rope_theta=10000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": embedding}
    for i in range(layers):
        layer = f"model.layers.{i}."
        weights |= {
            f"{layer}input_layernorm.weight": norm_1[i], f"{layer}post_attention_layernorm.weight": norm_2[i],
            f"{layer}self_attn.q_proj.weight": by_halves(q[i], heads), f"{layer}self_attn.o_proj.weight": o[i],
            f"{layer}self_attn.k_proj.weight": by_halves(k[i], kv_heads), f"{layer}self_attn.v_proj.weight": v[i],
            f"{layer}mlp.gate_proj.weight": gate[i], f"{layer}mlp.up_proj.weight": up[i],
            f"{layer}mlp.down_proj.weight": down[i],
        }  # fmt: skip
    model.load_state_dict(weights)
    return model.eval()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """llama2.c's tokenizer file: the longest token, then score, length and bytes of each; merged by score as BPE."""
    raw, place, tokens, scores = path.read_bytes(), 4, [], []
    while place < len(raw):
        score, length = struct.unpack("fi", raw[place : place + 8])
        tokens.append(raw[place + 8 : place + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        place += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in sorted(zip(tokens, scores, strict=True), key=lambda pair: -pair[1]):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [half for half in halves if half[0] in vocabulary and half[1] in vocabulary and score < 0]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@torch.no_grad()
def tell(model: LlamaForCausalLM, begin: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sampled continuations [B, tokens] of begin [B, N]."""
    # a story that ends is no opening, so the end is not sampled
    out = model.generate(begin, do_sample=True, max_new_tokens=tokens, top_k=0, suppress_tokens=[1, 2], pad_token_id=2)
    return out[:, begin.shape[1] :]


def main(source: str, target: str) -> None:
    """Write everything."""
    torch.manual_seed(0)
    draws, folder = np.random.default_rng(0), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    model = read_model(Path(source) / "stories260K.bin")
    tokenizer = read_tokenizer(Path(source) / "tok512.bin")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    greedy = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=60, pad_token_id=2)
    print("Greedy:", tokenizer.decode(greedy[0], skip_special_tokens=True))
    for name, count in COUNTS.items():
        starts = tell(model, torch.full((count, 1), 1), OPENING)
        begin = torch.cat([torch.full((count, 1), 1), starts], dim=1)
        sides = [tell(model, begin, STORY) for _ in range(2)] if name in ("sft", "pairs") else []
        rows = []
        for i, opening in enumerate(starts):
            row, told = {"instruction": tokenizer.decode(opening)}, [tokenizer.decode(side[i]) for side in sides]
            if name == "sft":
                row["output"] = told[0]
            if name == "pairs":
                gold = happy_and_varied([], told)
                if gold[0] == gold[1]:
                    continue
                better = 1 if gold[0] > gold[1] else 2
                row |= {"output_1": told[0], "output_2": told[1]}
                row["preference"] = 3 - better if draws.random() < TURNED else better
            rows.append(row)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} rows of {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
