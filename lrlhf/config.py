"""The settings of a run that are not a class of their own, as a user writes them. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from lrlhf.errors import UserError

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
UpToOne = restricted_number_type("UpToOne", float, [(">", 0), ("<=", 1)])
TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))

RANGES: dict[Any, type] = {
    **dict.fromkeys((PositiveInt, NonNegativeInt, TwoOrMore), int),
    **dict.fromkeys((PositiveFloat, NonNegativeFloat, ClosedUnitInterval, BelowOne, UpToOne), float),
}
"""Types of numbers with a range, each with the plain type of what lies in it."""

DType = Literal["float32", "bfloat16", "float16"]
Engine = Literal["dynamic", "static"]
"""How responses are sampled (see `lrlhf.model.decoding`)."""
Gather = Literal["rollout", "layer"]
"""When passes without gradient get the parts of a sharded base (see `lrlhf.model.sharding`)."""

LORA_OPTIONS = (
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


def check_ranges(made: Any) -> None:
    """Hold attributes to the ranges that the arguments of the same name are annotated with, also in plain code.

    jsonargparse does so for a config. The attributes become plain numbers, which a checkpoint may hold.

    Args:
        made: an object whose class keeps its arguments as attributes.

    Raises:
        UserError: the first that lies outside.
    """
    hints: dict[str, Any] = {}
    for owner in reversed(type(made).__mro__):
        hints |= get_type_hints(vars(owner)["__init__"]) if _is_ours(owner) else {}
    for name, hint in hints.items():
        value = getattr(made, name, None)
        kind = next((kind for kind in RANGES if kind is hint or kind in get_args(hint)), None)
        if kind is None or not isinstance(value, int | float):
            continue
        try:
            object.__setattr__(made, name, RANGES[kind](kind(value)))
        except ValueError as error:
            limits = str(error).partition("restriction ")[2].replace("v", "")
            raise UserError(f"{type(made).__name__}: {name}={value} must be {limits}.") from None


def _is_ours(kind: type) -> bool:
    """Whether lrlhf annotates the arguments of a class; a user's annotations may not be known when it runs."""
    return kind.__module__.startswith("lrlhf.") and "__init__" in vars(kind)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685): W x + (alpha / r) B A x, with A and B in fp32."""

    r: PositiveInt = 8
    """Rank. Larger can move further and costs more; 4 to 64 is usual, 8 in the paper."""
    alpha: PositiveFloat = 64.0
    """Scale numerator: the update is multiplied by alpha / r, 8 in the paper."""
    dropout: BelowOne = 0.0  # type: ignore[valid-type]
    """Dropout on the adapter's input while SFT or the reward model trains (0.1 in the paper). PPO runs without."""
    targets: list[str] | str | None = None
    """Which linear layers get an adapter: their names, all-linear (of the decoder, fused experts left out), or a
    regular expression of whole layer names. null takes q_proj, k_proj, v_proj and o_proj, as in the paper, or what peft
    names for families that have no such four."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other fields of peft.LoraConfig: use_rslora, use_dora, init_lora_weights, layers_to_transform, layers_pattern,
    rank_pattern, alpha_pattern, exclude_modules."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.alpha == float("inf"):
            raise UserError("lora.alpha=inf must be finite.")
        if self.targets is not None and not self.targets:
            raise UserError("lora.targets is empty; name the linear layers to adapt, e.g. [q_proj, v_proj].")
        if self.options.get("init_lora_weights", True) not in (True, "gaussian"):
            raise UserError(
                "lora.options.init_lora_weights must be true or gaussian: any other start changes the shared base "
                "or makes the policy differ from its reference at step 0."
            )
        for name in {"r", "lora_alpha", "lora_dropout", "target_modules"} & self.options.keys():
            raise UserError(f"lora.options.{name}: set r, alpha, dropout or targets of lora itself instead.")
        for name in sorted(self.options.keys() - set(LORA_OPTIONS)):
            raise UserError(
                f"lora.options.{name} would not last to the hand-over; there are {', '.join(LORA_OPTIONS)}."
            )


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

    max_new_tokens: PositiveInt = 300
    """Tokens in a response at most, the end-of-sequence token included; 300 in the paper."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; below 1 is more predictable, 0 takes the likeliest token. 1 in the paper."""
    top_k: NonNegativeInt = 0
    """Draw from the k likeliest tokens alone; 0 from all. Not for PPO, whose ratio needs the whole distribution."""
    top_p: UpToOne = 1.0  # type: ignore[valid-type]
    """Draw from the smallest set of tokens with this probability, of all tokens. Not for PPO, for the same reason."""
    stop: list[str] | None = None
    """Tokens that end a response, by name, e.g. [<|eot_id|>]. null takes what the model's generation config, the
    tokenizer and its chat template end with. What the prompt template ends a response with always ends one."""
    batch_size: PositiveInt = 64
    """Prompts answered together, per device. Memory only: the key-value cache grows with it."""
    engine: Engine = "dynamic"
    """dynamic: the cache grows, and rows leave when they have ended; least work. static: fixed shapes, captured once as
    a CUDA graph and replayed for every token, for GPUs that wait for launches. The same draws."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.temperature == 0


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves, one step per training batch (for PPO: per iteration)."""

    name: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape after the warm-up; linear in the paper."""
    warmup: NonNegativeInt = 5
    """Batches of linear warm-up from 0; 5 in the paper."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Updates:
    """How a policy learns from a rollout (arXiv 1707.06347; "the paper" is arXiv 2309.09055)."""

    minibatch_size: PositiveInt = 128
    """Responses of one optimizer step; divides data.batch_size. 128 in the paper."""
    inner_epochs: PositiveInt = 2
    """Passes over each rollout; 2 in the paper. More learns faster and drifts further."""
    clip_range: PositiveFloat = 0.2
    """PPO's clip of the ratio; 0.2 in the paper."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Bonus for entropy; 0 in the paper."""
    target_update_kl: PositiveFloat | None = None
    """Stop the inner epochs when the new policy is further than this from the one that sampled (KL per token); null
    never stops. 0.02 to 0.1 is usual."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class PPO(Updates):
    """How a policy and its critic learn from a rollout (arXiv 1707.06347; "the paper" is arXiv 2309.09055)."""

    value_clip_range: PositiveFloat = 0.2
    """Clip of the critic's move per rollout; 0.2 in the paper."""
    value_coefficient: NonNegativeFloat = 0.1
    """Weight of the value loss; 0.1 in the paper."""
    discount: ClosedUnitInterval = 1.0
    """Gamma of GAE; 1 in the paper."""
    trace_decay: ClosedUnitInterval = 0.95
    """Lambda of GAE; 0.95 in the paper, 1.0 in AlpacaFarm."""
    whiten_rewards: bool = True
    """Scale rewards to unit variance, keeping their mean, as in the paper."""
    critic_warmup: NonNegativeInt = 0
    """Iterations in which only the critic learns."""
    critic: Literal["adapter", "head"] = "adapter"
    """What of the critic learns: an adapter and a head, as in the paper; or a head alone, on the reward model's frozen
    states, which are kept from the rollout: its update runs no pass through the base."""
