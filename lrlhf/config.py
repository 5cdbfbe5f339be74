"""The settings of a run that are not a class of their own, as a user writes them. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lrlhf.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
Gather = Literal["rollout", "layer"]
"""When passes without gradient get the parts of a sharded base (see `lrlhf.model.sharding`)."""

OPTIONS = (
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
)
"""Fields of peft.LoraConfig, besides the settings of `LoRA`, that hold from training to hand-over and export."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685): W x + (alpha / r) B A x, with A and B in fp32."""

    r: int = 8
    """Rank. Larger can move further and costs more; 4 to 64 is usual, 8 in the paper."""
    alpha: float = 64.0
    """Scale numerator: the update is multiplied by alpha / r, 8 in the paper."""
    dropout: float = 0.0
    """Dropout on the adapter's input while SFT or the reward model trains (0.1 in the paper). PPO runs without."""
    targets: list[str] | str | None = None
    """Which linear layers get an adapter: their names, all-linear (of the decoder, fused experts left out), or a
    regular expression of whole layer names. null takes q_proj, k_proj, v_proj and o_proj, as in the paper, or what peft
    names for families that have no such four."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other fields of peft.LoraConfig: use_rslora, use_dora, init_lora_weights, layers_to_transform, layers_pattern,
    rank_pattern, alpha_pattern, exclude_modules."""

    def __post_init__(self):
        if self.r < 1:
            raise UserError(f"lora.r={self.r} must be at least 1.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha} must be positive and finite.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must lie in [0, 1).")
        if self.targets is not None and not self.targets:
            raise UserError("lora.targets is empty; name the linear layers to adapt, e.g. [q_proj, v_proj].")
        if self.options.get("init_lora_weights", True) not in (True, "gaussian"):
            raise UserError(
                "lora.options.init_lora_weights must be true or gaussian: any other start changes the shared base "
                "or makes the policy differ from its reference at step 0."
            )
        for name in {"r", "lora_alpha", "lora_dropout", "target_modules"} & self.options.keys():
            raise UserError(f"lora.options.{name}: set r, alpha, dropout or targets of lora itself instead.")
        for name in sorted(self.options.keys() - set(OPTIONS)):
            raise UserError(f"lora.options.{name} would not last to the hand-over; there are {', '.join(OPTIONS)}.")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of the frozen base are stored; embeddings, norms and LM head stay in `dtype`."""

    kind: Literal["int8", "nf4", "fp4"] = "nf4"
    """int8: 1 byte a weight (LLM.int8, arXiv 2208.07339). nf4: half a byte, the most exact of the 4-bit types
    (QLoRA, arXiv 2305.14314). fp4: half a byte."""
    double: bool = True
    """4-bit only: quantise the scales as well, which saves 0.4 bits a weight (QLoRA, section 3)."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int = 300
    """Tokens in a response at most, the end-of-sequence token included; 300 in the paper."""
    temperature: float = 1.0
    """Divides the logits; below 1 is more predictable, 0 takes the likeliest token. 1 in the paper."""
    top_k: int = 0
    """Draw from the k likeliest tokens alone; 0 from all. Not for PPO, whose ratio needs the whole distribution."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this probability, of all tokens. Not for PPO, for the same reason."""

    stop: list[str] | None = None
    """Tokens that end a response, by name, e.g. [<|eot_id|>]. null takes what the model's generation config, the
    tokenizer and its chat template end with. What the prompt template ends a response with always ends one."""
    batch_size: int = 64
    """Prompts answered together, per device. Memory only: the key-value cache grows with it."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"sampling.batch_size={self.batch_size} must be at least 1.")
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature < 0:
            raise UserError(f"sampling.temperature={self.temperature} must not be negative.")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k={self.top_k} must not be negative.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p} must lie in (0, 1].")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.temperature == 0


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves, one step per training batch (for PPO: per iteration)."""

    name: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape after the warm-up; linear in the paper."""
    warmup: int = 5
    """Batches of linear warm-up from 0; 5 in the paper."""

    def __post_init__(self):
        if self.warmup < 0:
            raise UserError(f"model.schedule.warmup={self.warmup} must not be negative.")
