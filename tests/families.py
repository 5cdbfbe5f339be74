"""Tiny models of the families that people bring, from transformers' config classes, and the table of docs/models.md.

    python -m tests.families            # measures every family and writes the table

Two layers, width 48, random weights enlarged so that log-probs differ by more than noise.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lrlhf import LoRA, Quantization, Sampling, UserError
from lrlhf.datamodules.collate import pad
from lrlhf.functional import token_statistics
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import sample_responses
from lrlhf.model.quantization import keep_gradients
from lrlhf.types import Sequences
from tests.conftest import save_tokenizer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DEEPSEEK = EXPERTS | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

NO_USUAL_TARGETS = (
    "phi3",
    "persimmon",
    "deepseek_v2",
    "deepseek_v3",
    "minicpm3",
    "xglm",
    "biogpt",
    "modernbert-decoder",
    "lfm2",
)
"""Neither the paper's four projections nor an entry in peft's table."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE_TOKENS = {"mm_tokens_per_image": 4, "image_token_index": 263, "boi_token_index": 262, "eoi_token_index": 261}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral (sliding)": ("mistral", {"sliding_window": 8}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 12}),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 12, "sliding_window": 8}),
    "gemma3": ("gemma3", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", EXPERTS),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "olmoe": ("olmoe", EXPERTS),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", EXPERTS | {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    "glm": ("glm", {"head_dim": 12}),
    "glm4": ("glm4", {"head_dim": 12}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", {}),
    "helium": ("helium", {"head_dim": 12}),
    "exaone4": ("exaone4", {"sliding_window": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 12}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 12}),
    "seed_oss": ("seed_oss", {"head_dim": 12}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "persimmon": ("persimmon", {}),
    "gpt_oss": ("gpt_oss", EXPERTS | {"head_dim": 12, "sliding_window": 8}),
    "llama4_text": ("llama4_text", EXPERTS | {"head_dim": 12, "intermediate_size_mlp": 64, "attention_chunk_size": 8}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "minicpm3": ("minicpm3", DEEPSEEK | {"dim_model_base": 12, "scale_emb": 2}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "nanochat": ("nanochat", {}),
    "vaultgemma": ("vaultgemma", {"head_dim": 12, "sliding_window": 8}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 8},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {}),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "opt": ("opt", {"word_embed_proj_dim": 48, "ffn_dim": 64}),
    "xglm": ("xglm", {"d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "biogpt": ("biogpt", {}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 8}),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 24, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "falcon_h1": ("falcon_h1", MAMBA2 | {"mamba_d_ssm": 96, "head_dim": 12}),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    "jamba": (
        "jamba",
        EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS
        | {
            "head_dim": 12,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 12,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 48, "head_dim": 12, "num_hidden_layers": 3, "attention_window_size": 8},
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 48, "context_length": 256}),
    "minimax": (
        "minimax",
        EXPERTS | {"head_dim": 12, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        MAMBA2
        | {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 24,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
    ),
    "zamba2": ("zamba2", MAMBA2 | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1}),
    "bart": ("bart", {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}),
}


def build(name: str, folder: Path, *, scale: float = 8.0) -> str:
    """Write a tiny random model of a family and a byte-level tokenizer; returns the folder."""
    kind, settings = FAMILIES[name]
    if kind == "gemma3":
        text = SIZES | {"head_dim": 12, "sliding_window": 8}
        config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION, **IMAGE_TOKENS)
    else:
        config = AutoConfig.for_model(kind, **SIZES | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in key and "A_log" not in key:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def rows() -> Sequences:
    """Four rows of unequal length, longer than the windows."""
    random = torch.Generator().manual_seed(1)

    def draw(lengths: tuple[int, ...]) -> list[list[int]]:
        return [torch.randint(3, 259, (length,), generator=random).tolist() for length in lengths]

    return Sequences(*pad(draw((3, 14, 7, 10)), left=True), *pad(draw((9, 3, 12, 5)), left=False))


def targets_for(folder: str) -> str | list[str] | None:
    """None where a family has usual targets; what its user would have to say elsewhere."""
    kind = AutoConfig.from_pretrained(folder).model_type
    return {"mamba": ["in_proj", "x_proj"], "falcon_mamba": ["in_proj", "x_proj"], "mamba2": ["in_proj"]}.get(
        kind, "all-linear" if kind in NO_USUAL_TARGETS else None
    )


@dataclass
class Measured:
    """What the engine does with a family, beside plain transformers and peft."""

    difference: float
    """Largest of the log-probs of `rows` in nats, with a random adapter."""
    ratio: float
    """Largest log-ratio of an update's log-probs to the rollout's."""
    greedy: int
    """Answers of four that are token for token the plain model's."""
    runs: str
    """packed, padded or by length."""
    targets: int
    """Layers that an adapter was put on by default."""
    mean: float
    """Mean absolute difference of the log-probs, in nats a token: what the self-check before a stage bounds."""


def measure(folder: str, work: Path, dtype: str = "float32", quantize: Quantization | None = None) -> Measured:
    """Compare the engine with plain transformers and peft, which run each row alone."""
    text, length = rows(), 10
    backbone = Backbone(folder, lora=LoRA(r=2, alpha=4, targets=targets_for(folder)), dtype=dtype, quantize=quantize)
    backbone.eval().add_role("policy", ("policy",), trainable=True)
    layers = [p for p in backbone.trainable("policy") if torch.nn.init.normal_(p, std=0.05) is p]
    backbone.save_role("policy", work)

    def logprobs() -> torch.Tensor:
        return token_statistics(
            backbone.encode(text), backbone.lm_head, text.response_ids, text.response_mask
        ).logprobs.detach()

    with backbone.role("policy"), torch.no_grad():
        ours = logprobs()
        answers, ended = sample_responses(
            backbone,
            text.prompt_ids,
            text.prompt_mask,
            sampling=Sampling(max_new_tokens=length, temperature=0),
            stop_ids=torch.tensor([2]),
            uniforms=torch.zeros(4, length),
        )
    with backbone.role("policy"), backbone.training_pass(dropout=False):
        update = logprobs()
    options = {"quantization_config": quantize.config(getattr(torch, dtype))} if quantize else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    if quantize:
        keep_gradients(base)  # the kernel that it switches off takes widths of 64 and no others
    plain = PeftModel.from_pretrained(base, str(work / "policy")).eval()
    differences, greedy = [], 0
    for i in range(len(text)):
        prompt = text.prompt_ids[i][text.prompt_mask[i]]
        response = text.response_ids[i][text.response_mask[i]]
        theirs = plain_logprobs(plain, torch.cat([prompt, response]))[len(prompt) - 1 : -1]
        theirs = theirs.gather(-1, response[:, None])[:, 0]
        differences.append((ours[i][: len(response)] - theirs).abs())
        said = prompt
        while len(said) < len(prompt) + length and (len(said) == len(prompt) or said[-1] != 2):
            said = torch.cat([said, plain_logprobs(plain, said)[-1:].argmax(-1)])
        greedy += said[len(prompt) :].tolist() == answers[i][ended[i]].tolist()
    runs = "by length" if backbone.by_length else "packed" if backbone.packs() else "padded"
    off, ratio = torch.cat(differences), float((update - ours).abs().max())
    return Measured(float(off.max()), ratio, greedy, runs, len(layers) // 2, float(off.mean()))


@torch.no_grad()
def plain_logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[N, V] of one row [N], without a cache."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)


TABLE = Path(__file__).parent.parent / "docs/models.md"
MARK = "| family |"
"""Where the table of the page begins; what stands above it is written by hand."""
COLUMNS = f"{MARK} rows run | fp32 | answers | bf16 | nf4 | adapters |\n|---|---|---|---|---|---|---|\n"


def main() -> None:
    """Measure every family and write the table."""
    lines = []
    for name in FAMILIES:
        with TemporaryDirectory() as folder:
            model = build(name, Path(folder) / "model")
            found = measure(model, Path(folder))
            others = []
            for dtype, quantize in (("bfloat16", None), ("float32", Quantization("nf4"))):
                try:
                    others.append(f"{measure(model, Path(folder), dtype, quantize).difference:.2g}")
                except UserError:
                    others.append("refused")
            targets = targets_for(model)
            adapters = f"{found.targets} linear layers" if targets is None else f"set lora.targets, e.g. {targets}"
            cells = [name, found.runs, f"{found.difference:.0e}", f"{found.greedy}/4", *others, adapters]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    text = TABLE.read_text().partition(MARK)[0]
    TABLE.write_text(text + COLUMNS + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
