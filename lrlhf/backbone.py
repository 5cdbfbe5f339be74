"""One frozen causal language model, and the roles that live on it.

A role is a stack of LoRA adapters, and perhaps a scalar head:

    reference [sft]    policy [sft, policy]    reward [sft, reward] + head    critic [sft, reward, critic] + head

A new adapter starts with B = 0, so a role starts out as the stack below it, bit for bit. Without LoRA a trainable role
is a full model: the base itself, or a copy of it.

The only file that imports peft. `set_adapter` there switches gradients behind one's back, so every switch is followed
at once by the trainable set of the role. Run forward and backward of one role inside one `with backbone.role(...)`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lrlhf.errors import UserError
from lrlhf.functional import last_true, position_ids, shared_prefix
from lrlhf.functional.low_rank import add_low_rank
from lrlhf.functional.packing import pack, packed_mask, unpack
from lrlhf.pretrained import fingerprint_model, load_model
from lrlhf.quantization import Quantization
from lrlhf.types import Sequences

WORTH_SHARING = 64
"""Tokens that sharing a prefix must save."""

DType = Literal["float32", "bfloat16", "float16"]
Gather = Literal["rollout", "layer"]
"""When passes without gradient get the parts of a sharded base (see `lrlhf.fsdp`)."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685): W x + (alpha / r) B A x, with A and B in fp32."""

    r: int = 8
    """Rank. Larger can move further and costs more; 4 to 64 is usual, 8 in the paper."""
    alpha: float = 64.0
    """Scale numerator: the update is multiplied by alpha / r, 8 in the paper."""
    dropout: float = 0.0
    """Dropout on the adapter's input while SFT or the reward model trains (0.1 in the paper). PPO runs without."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of the linear layers that get an adapter."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other field of peft.LoraConfig, e.g. use_rslora or use_dora."""

    def __post_init__(self):
        if self.r < 1:
            raise UserError(f"lora.r={self.r} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must lie in [0, 1).")
        if not self.targets:
            raise UserError("lora.targets is empty; name the linear layers to adapt, e.g. [q_proj, v_proj].")
        if self.options.get("init_lora_weights", True) not in (True, "gaussian"):
            raise UserError(
                "lora.options.init_lora_weights must be true or gaussian: any other start changes the shared base "
                "or makes the policy differ from its reference at step 0."
            )

    def peft_config(self) -> LoraConfig:
        """The same settings as peft spells them."""
        own: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
        }
        twice = sorted(own.keys() & self.options.keys())
        if twice:
            raise UserError(f"lora.options.{twice[0]}: set r, alpha, dropout or targets of lora itself instead.")
        try:
            return LoraConfig(task_type="CAUSAL_LM", **own, **self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"lora.options: {error}; see the fields of peft.LoraConfig.") from error


class AdaptedLinear(LoraLinear):
    """peft's linear layer under plain adapters, in fewer passes over memory; peft does DoRA, dropout and biases."""

    held: list[tuple[Tensor, Tensor]] | None = None
    """The factors in the base's type while a role runs without gradients: sampling would make them for each token."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]: the layer beneath, and W x + (alpha / r) B A x for each active adapter in turn."""
        factors = self.factors() if self.held is None or torch.is_grad_enabled() else self.held
        if factors is None:
            return super().forward(x)
        result = self.base_layer(x)
        x = x.to(result.dtype)
        for down, up in factors:
            result = add_low_rank(result, x, down.to(x.dtype), up.to(x.dtype))
        return result

    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """A [R, I] and (alpha / r) B [O, R], fp32, of each active adapter; None where they are not all there is."""
        names: Any = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or not all(map(self._is_plain, names)):
            return None
        layers: Any = [(self.lora_A[name], self.lora_B[name], self.scaling[name]) for name in names]
        return [(down.weight, up.weight * scale) for down, up, scale in layers]

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keep the factors in `dtype` until the next call, which must come before they change; None keeps none."""
        factors = self.factors() if dtype else None
        self.held = factors and [(down.to(dtype), up.to(dtype)) for down, up in factors]

    def _is_plain(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        return name not in self.lora_variant and self.lora_B[name].bias is None and not drops


class Backbone(nn.Module):
    """The base model and its roles.

    Args:
        base_model: a hub id, a folder, a GGUF file, or a short name (see `lrlhf.pretrained`).
        lora: settings for new adapters; None trains full models.
        dtype: of the base. Adapters and heads are fp32 always.
        quantize: how the linear layers of the base are stored; None as `dtype`.
        gradient_checkpointing: recompute each layer in the backward pass: less memory, a third more time.
    """

    def __init__(
        self,
        base_model: str,
        *,
        lora: LoRA | None = None,
        dtype: DType = "float32",
        quantize: Quantization | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.base_model = base_model
        self.lora = lora
        self.model: Any = load_model(base_model, getattr(torch, dtype), quantize).requires_grad_(False).eval()
        self.fingerprint = (f"{quantize.kind}-" if quantize else "") + fingerprint_model(self.model)
        self.probe_logits: Tensor | None = self._probe()
        self.copies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.stacks: dict[str, tuple[str, ...]] = {}
        self._trainable: dict[str, list[nn.Parameter]] = {}
        self._peft: list[PeftModel] = []
        self._role: str | None = None
        self.lockstep = False
        """Whether every pass is a message: the base is sharded, and processes must make equally many passes."""
        self.gather: Gather = "rollout"
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    # Roles

    def add_role(
        self,
        role: str,
        stack: tuple[str, ...] = (),
        *,
        trainable: bool = False,
        head: Literal["random", "zero"] | None = None,
        own_copy: bool = True,
    ) -> None:
        """Define a role. Adapters of the stack that do not exist yet are created; so is the head.

        Args:
            role: its name.
            stack: adapters, base side first; the last one trains if the role is trainable.
            trainable: whether the role's last adapter (without LoRA: its model) and head train.
            head: None, or how a scalar head starts: small random weights (a reward model), or zero (a critic).
            own_copy: without LoRA, whether a trainable role gets a copy of the base or trains the base itself.
        """
        parameters: list[nn.Parameter] = []
        if self.lora is not None:
            for adapter in stack:
                if adapter not in self.adapters:
                    self._add_adapter(adapter, self.lora.peft_config())
            parameters += self._adapter_parameters(stack[-1]) if trainable else []
        elif trainable:
            if own_copy:
                self.copies[role] = copy.deepcopy(self.model)
            parameters += list(self.copies[role].parameters() if own_copy else self.model.parameters())
        if head is not None:
            self.heads[role] = self._new_head(head)
            parameters += list(self.heads[role].parameters()) if trainable else []
        self.stacks[role] = tuple(a for a in stack if a in self.adapters)
        if trainable:
            self._trainable[role] = parameters
        self._activate(self._role)

    @contextmanager
    def role(self, name: str) -> Iterator["Backbone"]:
        """Run as `name`: its stack is active and exactly its parameters require gradients, until the block ends.

        In a block that is entered without gradients the weights must stay as they are.
        """
        if name not in self.stacks:
            raise ValueError(f"there is no role {name!r}, only {', '.join(self.stacks)}")
        before, self._role = self._role, name
        self._activate(name, hold=not torch.is_grad_enabled())
        try:
            yield self
        finally:
            self._role = before
            self._activate(before)

    def trainable(self, role: str | None = None) -> list[nn.Parameter]:
        """The parameters that train in a role, or in any role."""
        if role is not None:
            return self._trainable.get(role, [])
        unique = {id(p): p for parameters in self._trainable.values() for p in parameters}
        return list(unique.values())

    def _activate(self, role: str | None, *, hold: bool = False) -> None:
        """At rest (None) no adapter is active and the parameters of every trainable role require gradients."""
        stack = list(self.stacks[role]) if role else []
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = False
                layer.enable_adapters(bool(stack))
                if stack:
                    layer.set_adapter(stack)
            if isinstance(layer, AdaptedLinear):
                layer.hold(self.model.dtype if hold else None)
        self.requires_grad_(False)
        for parameter in self.trainable(role):
            parameter.requires_grad_(True)

    # Passes

    def _current(self) -> Any:
        role = str(self._role)
        return self.copies[role] if role in self.copies else self.model

    def _compute_type(self) -> torch.autocast:
        """Adapters are fp32 and multiply in the base's type, as its layers do."""
        dtype = self.model.dtype
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)

    def encode(self, sequences: Sequences) -> Tensor:
        """Hidden states [B, R, H] before each response token, in the current role: they predict it and carry its value.

        No row's last token runs: nothing comes after it. What lies off the mask means nothing.
        """
        ids, mask = sequences.response_ids[:, :-1], sequences.response_mask
        states = self._states(sequences, ids, (mask & ~last_true(mask))[:, :-1])
        return states[:, : mask.shape[1]]

    def _states(self, sequences: Sequences, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """Hidden states [B, N + 1, H] from the last prompt token on, of prompts and responses [B, N]."""
        ids = torch.cat([sequences.prompt_ids, response_ids], dim=1)
        mask = torch.cat([sequences.prompt_mask, response_mask], dim=1)
        positions, last = position_ids(mask), sequences.prompt_ids.shape[1] - 1
        prefix = self._worth_sharing(sequences.prompt_ids, sequences.prompt_mask)
        decoder = self._current().get_decoder()
        with self._compute_type():
            if not self._takes_apart() or (not prefix and mask.all()):
                output = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
                return output.last_hidden_state[:, last:]
            cut = _first_column(sequences.prompt_mask) + prefix
            first = sequences.prompt_mask[0].nonzero()[:prefix, 0]
            behind = (mask & (positions >= prefix))[:, cut:]
            output = decoder(
                input_ids=pack(ids[0, first], ids[:, cut:], behind),
                position_ids=pack(positions[0, first], positions[:, cut:], behind),
                attention_mask=packed_mask(behind, prefix),
                use_cache=False,
            )
        return unpack(output.last_hidden_state, prefix, behind)[:, last - cut :]

    def _takes_apart(self) -> bool:
        """Whether attention is ours to take apart, and reaches back as far as there are tokens."""
        config = self._current().config
        return config._attn_implementation == "lrlhf" and not getattr(config, "sliding_window", None)

    def _worth_sharing(self, prompt_ids: Tensor, prompt_mask: Tensor) -> int:
        """How many first tokens, the same in all prompts, to run once for all rows: 0 if they are few.

        Never under dropout, which differs by row.
        """
        if self.training or not self._takes_apart():
            return 0
        prefix = shared_prefix(prompt_ids, prompt_mask)
        return prefix if prefix * (len(prompt_ids) - 1) >= WORTH_SHARING else 0

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, DynamicCache]:
        """Prompts [B, P] made ready for `next_token_logits`: what a shared prefix leaves of them to be run.

        Returns:
            ids [B, N], mask [B, S], positions [B, N] and a cache of S - N tokens.
        """
        positions, cache = position_ids(mask), DynamicCache()
        prefix = 0 if self.lockstep else self._worth_sharing(ids, mask)  # a pass more, which others may not make
        if not prefix:
            return ids, mask, positions, cache
        cut = _first_column(mask) + prefix
        first = ids[:1, mask[0].nonzero()[:prefix, 0]]
        with self._compute_type():
            self._current().get_decoder()(input_ids=first, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
        behind = torch.cat([mask.new_ones(len(mask), prefix), (mask & (positions >= prefix))[:, cut:]], dim=1)
        return ids[:, cut:], behind, positions[:, cut:], cache

    @property
    def lm_head(self) -> nn.Module:
        """Maps hidden states [..., H] to logits [..., V], in the current role."""
        return self._current().get_output_embeddings()

    def next_token_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] after the last of the new tokens `ids` [B, N]; the cache holds what came before."""
        with self._compute_type():
            output = self._current().get_decoder()(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return self.lm_head(output.last_hidden_state[:, -1])

    def values(self, hidden: Tensor) -> Tensor:
        """The scalar head of the current role on hidden states: fp32 [..., H] to [...]."""
        return self.heads[str(self._role)](hidden.float()).squeeze(-1)

    def scores(self, sequences: Sequences) -> Tensor:
        """fp32 [B]: the scalar head on the last response token (the last prompt token of an empty response)."""
        hidden = self._states(sequences, sequences.response_ids, sequences.response_mask)
        return self.values(hidden[torch.arange(len(sequences), device=hidden.device), sequences.lengths])

    @contextmanager
    def training_pass(self, *, dropout: bool) -> Iterator[None]:
        """Train mode for a forward and backward pass; without dropout only what gradient checkpointing looks at."""
        for module in self.modules():
            module.training = dropout or isinstance(module, GradientCheckpointingLayer)
        try:
            yield
        finally:
            self.eval()

    @torch.no_grad()
    def _probe(self) -> Tensor | None:
        """Logits of eight tokens from the untouched base, and a check that its head is a plain product."""
        if next(self.model.parameters()).device.type == "meta":
            return None
        ids = torch.arange(8)[None] % self.model.config.vocab_size
        logits = self.model(input_ids=ids.to(self.model.device)).logits
        hidden = self.model.get_decoder()(input_ids=ids.to(self.model.device)).last_hidden_state
        if not torch.allclose(self.model.get_output_embeddings()(hidden), logits, atol=1e-3, rtol=1e-3):
            raise UserError(
                f"base_model={self.base_model}: this architecture scales or caps its logits, which is not supported."
            )
        return logits

    @torch.no_grad()
    def drift_of_base(self) -> float:
        """Largest absolute change of the adapters-off probe logits since loading; 0 unless the base was written to."""
        assert self.probe_logits is not None
        before, self._role = self._role, None
        self._activate(None)
        ids = torch.arange(8)[None] % self.model.config.vocab_size
        logits = self.model(input_ids=ids.to(self.model.device)).logits
        self._role = before
        self._activate(before)
        return float((logits - self.probe_logits.to(logits.device)).abs().max())

    # Adapters and heads

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that exist."""
        return list(self._peft[0].peft_config) if self._peft else []

    def _add_adapter(self, name: str, config: LoraConfig) -> None:
        try:
            if self._peft:
                self._peft[0].add_adapter(name, config)
            else:
                self._peft.append(PeftModel(self.model, config, adapter_name=name))
                self._fuse_adapters()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"lora: {error}") from error

    def _fuse_adapters(self) -> None:
        for module in self.model.modules():
            if type(module) is LoraLinear:
                module.__class__ = AdaptedLinear

    def _adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [p for key, p in self.model.named_parameters() if "lora_" in key and name in key.split(".")]

    def _new_head(self, start: Literal["random", "zero"]) -> nn.Linear:
        width = self.model.get_output_embeddings().in_features
        head = nn.Linear(width, 1, dtype=torch.float32, device=next(self.model.parameters()).device)
        nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1) if start == "random" else 0.0)
        nn.init.zeros_(head.bias)
        return head

    def save_role(self, role: str, folder: Path) -> None:
        """Write the stack of a role as ordinary peft folders (without LoRA: its model) and its head as safetensors."""
        if self.stacks[role]:
            self._peft[0].save_pretrained(
                str(folder), selected_adapters=list(self.stacks[role]), save_embedding_layers=False
            )
        elif role in self._trainable:
            model: Any = self.copies[role] if role in self.copies else self.model
            model.save_pretrained(folder / "model")
        if role in self.heads:
            save_file(dict(self.heads[role].state_dict()), folder / "head.safetensors")

    def load_role(self, role: str, stack: tuple[str, ...], folder: Path, *, head: bool) -> None:
        """Define a frozen role from what `save_role` wrote; adapters that exist already are shared, not loaded twice.

        Raises:
            UserError: a file is missing or does not fit the base.
        """
        for adapter in stack:
            if adapter not in self.adapters:
                self._load_adapter(adapter, folder / adapter)
        if not stack and (folder / "model").is_dir():
            self.copies[role] = load_model(str(folder / "model"), self.model.dtype).eval()
        if head:
            path = folder / "head.safetensors"
            if not path.is_file():
                raise UserError(f"{folder} holds no head.safetensors: without its head a reward model scores noise.")
            self.heads[role] = self._new_head("zero")
            try:
                self.heads[role].load_state_dict(load_file(path))
            except (SafetensorError, RuntimeError) as error:
                raise UserError(f"{path} is damaged or of another base; run its stage again.") from error
        self.stacks[role] = stack
        self._activate(self._role)

    def _load_adapter(self, name: str, folder: Path) -> None:
        try:
            if self._peft:
                self._peft[0].load_adapter(str(folder), adapter_name=name)
            else:
                self._peft.append(PeftModel.from_pretrained(self.model, str(folder), adapter_name=name))
                self._fuse_adapters()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: this adapter cannot be loaded on {self.base_model} ({error}).") from error

    def copy_head(self, source: str, target: str) -> None:
        """Start the head of `target` as a copy of the head of `source`."""
        self.heads[target].load_state_dict(self.heads[source].state_dict())

    def export_adapter(self, role: str, folder: Path) -> None:
        """Write the stack of a role as ONE peft adapter, folder/adapter, of rank the sum of the stack's ranks.

        Nothing is written for DoRA, whose stack is no single adapter.
        """
        stack = list(self.stacks[role])
        model: Any = self._peft[0]
        configs = [model.peft_config[adapter] for adapter in stack]
        if any(config.use_dora for config in configs):
            return  # DoRA's magnitudes do not concatenate
        weight = sum(config.r for config in configs) ** -0.5 if configs[0].use_rslora else 1.0
        model.base_model.add_weighted_adapter(stack, [weight] * len(stack), "adapter", combination_type="cat")
        try:
            model.save_pretrained(str(folder), selected_adapters=["adapter"], save_embedding_layers=False)
        finally:
            model.delete_adapter("adapter")
            self._activate(self._role)


def _first_column(mask: Tensor) -> int:
    """Where the longest of left-padded rows [B, T] begins."""
    return int(mask.any(0).int().argmax())
