"""One frozen causal language model, and the roles that live on it.

A role is a stack of LoRA adapters, and perhaps a scalar head:

    reference [sft]    policy [sft, policy]    reward [sft, reward] + head    critic [sft, reward, critic] + head

A new adapter starts with B = 0, so a role starts out as the stack below it, bit for bit. Without LoRA a trainable role
is a full model: the base itself, or a copy of what lies below it, with the adapters that are there in its weights.

Run forward and backward of one role inside one `with backbone.role(...)`.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from lrlhf.config import DType, Gather, LoRA, Quantization
from lrlhf.distributed import whole
from lrlhf.errors import UserError
from lrlhf.functional import equal_prompts, equally_long, last_true, position_ids, shared_prefix
from lrlhf.kernels.packing import pack, packed_mask, unpack
from lrlhf.model.adapters import Adapters, fold, place
from lrlhf.model.architecture import (
    FinalLogits,
    carries_state,
    comes_out_alike,
    logits_of,
    own_cache,
    supports_packing,
    text_config,
    trunk,
)
from lrlhf.model.pretrained import fingerprint_model, first_line, load_model
from lrlhf.model.recompute import recompute_layers, set_dropout
from lrlhf.types import Sequences

WORTH_SHARING = 64
"""Tokens that sharing a prefix must save."""


class Backbone(nn.Module):
    """The base model and its roles.

    Args:
        base_model: a hub id, a folder, a GGUF file, or a short name (see `lrlhf.model.pretrained`).
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
        if quantize is not None and bool(getattr(text_config(self.model), "rescale_every", 0)):
            raise UserError(
                f"base_model={base_model} rescales its own weights, which {quantize.kind} cannot; quantize: null."
            )
        self.fingerprint = (f"{quantize.kind}-" if quantize else "") + fingerprint_model(self.model)
        try:
            self.by_length = carries_state(self.model) or not comes_out_alike(self.model, packed=False)
            """Whether rows run in groups of equal length, without padding, which would change them."""
            self._stays_packed = not self.by_length and (
                not supports_packing(self.model) or comes_out_alike(self.model, packed=True)
            )
            self._plain_head = isinstance(logits_of(self.model), nn.Module)
        except (RuntimeError, TypeError, KeyError, IndexError) as error:
            kind = quantize.kind if quantize else dtype
            raise UserError(f"base_model={base_model} does not run in {kind} ({first_line(error)}).") from error
        self.copies = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.stacks: dict[str, tuple[str, ...]] = {}
        self._trainable: dict[str, list[tuple[nn.Module, str]]] = {}
        """Where the parameters that train in a role lie: a module and a name in it, so that they may be exchanged."""
        self._adapters = Adapters(self.model)
        self._role: str | None = None
        self.probe_logits: Tensor | None = self._probe()
        self.synchronised = False
        """Whether every pass is a collective: the base is sharded, and processes must make equally many passes."""
        self.gather: Gather = "rollout"
        self.sharded = False
        """Whether FSDP holds the models; what requires a gradient must then stay as it was."""
        self._recomputes = gradient_checkpointing
        if gradient_checkpointing:
            recompute_layers(self.model)

    # Roles

    def add_role(
        self,
        role: str,
        stack: tuple[str, ...] = (),
        *,
        trainable: bool | Literal["head"] = False,
        head: Literal["random", "zero"] | None = None,
        own_copy: bool = True,
        like: str | None = None,
    ) -> None:
        """Define a role. Adapters of the stack that do not exist yet are created; so is the head.

        Args:
            role: its name.
            stack: adapters, base side first; the last one trains if the role is trainable.
            trainable: whether the role's last adapter (without LoRA: its model) and head train, or its head alone.
            head: None, or how a scalar head starts: small random weights and no bias, as sequence classifiers of
                transformers have none (a reward model), or zero with a bias (a critic).
            own_copy: without LoRA, whether a trainable role gets a copy of the base or trains the base itself.
            like: without LoRA, the role whose model is copied instead of the base, if it has one of its own.
        """
        parameters: list[nn.Parameter] = []
        if self.lora is not None:
            for adapter in stack:
                if adapter not in self.adapters:
                    self._adapters.add(adapter, self.lora)
            parameters += self._adapters.parameters(stack[-1]) if trainable is True else []
        elif trainable is True:
            if own_copy:
                self.copies[role] = copy.deepcopy(self.copies[like] if like and like in self.copies else self.model)
                fold(self.copies[role], [a for a in stack if a in self.adapters], self.model.dtype)
            parameters += list(self.copies[role].parameters() if own_copy else self.model.parameters())
        if head is not None:
            self.heads[role] = self._new_head(head)
            parameters += list(self.heads[role].parameters()) if trainable else []
        self.stacks[role] = tuple(a for a in stack if a in self.adapters)
        if trainable:
            ids = {id(p) for p in parameters}
            paths = [name.rpartition(".") for name, p in self.named_parameters() if id(p) in ids]
            self._trainable[role] = [(self.get_submodule(owner), name) for owner, _, name in paths]
        self._activate(self._role)

    @contextmanager
    def role(self, name: str) -> Iterator["Backbone"]:
        """Run as `name`: its stack is active and exactly its parameters require gradients, until the block ends.

        In a block that is entered without gradients the weights must stay as they are.
        """
        if name not in self.stacks:
            raise ValueError(f"there is no role {name!r}, only {', '.join(self.stacks)}")
        before, self._role = self._role, name
        self._activate(name, cache_factors=not torch.is_grad_enabled())
        try:
            yield self
        finally:
            self._role = before
            self._activate(before)

    def trainable(self, role: str | None = None) -> list[nn.Parameter]:
        """The parameters that train in a role, or in any role.

        Args:
            role: its name; None for all roles together.

        Returns:
            Each parameter once.
        """
        if role is not None:
            return [getattr(module, name) for module, name in self._trainable.get(role, ())]
        places = dict.fromkeys(place for places in self._trainable.values() for place in places)
        return [getattr(module, name) for module, name in places]

    def _activate(self, role: str | None, *, cache_factors: bool = False) -> None:
        """Switch the adapters and gradients of a role on and all others off.

        Outside any role (None) no adapter is active, and the parameters of every trainable role require gradients, so
        that an optimizer and a checkpoint see them all.
        """
        self._adapters.activate(self.stacks[role] if role else (), cache_factors=cache_factors)
        if self.sharded and self.lora is None:
            return  # every role that trains has a model of its own, so none gets another's gradient
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
        """Hidden states [B, R, H] in the current role, at the position BEFORE each response token.

        The LM head turns them into the distribution of that token, a scalar head into the value before it. The last
        token of a row does not run, because nothing is predicted from it. States off the mask are undefined.
        """
        ids, mask = sequences.response_ids[:, :-1], sequences.response_mask
        states = self._states(sequences, ids, (mask & ~last_true(mask))[:, :-1])
        return states[:, : mask.shape[1]]

    def encode_padded(self, sequences: Sequences, pad_id: int) -> Tensor:
        """Hidden states [B, R, H] as of `encode`, off the mask too: padding runs, and only padding looks at itself.

        For replicas of code that lets padding count.

        Args:
            sequences: prompts with their responses.
            pad_id: the token that stands at padding.
        """
        mask = sequences.mask[:, :-1]
        ids = sequences.ids[:, :-1].masked_fill(~mask, pad_id)
        with self._compute_type():
            output = trunk(self._current())(
                input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
            )
        return output.last_hidden_state[:, sequences.prompt_ids.shape[1] - 1 :]

    def _states(self, sequences: Sequences, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """Hidden states [B, N + 1, H] from the last prompt token on, of prompts [B, P] and responses [B, N].

        Where rows run packed, no padding runs, and what all prompts begin with runs once for all of them: the decoder
        sees one line of tokens, [prefix | row 1 | row 2 | ...], and a mask that keeps the rows apart.
        """
        pieces = self._by_prompt(sequences.prompt_ids, sequences.prompt_mask)
        if len(pieces) > 1:
            states = [self._states(sequences.at_full_width(i), response_ids[i], response_mask[i]) for i in pieces]
            return torch.cat(states)[torch.cat(pieces).argsort()]
        ids = torch.cat([sequences.prompt_ids, response_ids], dim=1)  # [B, P + N]
        mask = torch.cat([sequences.prompt_mask, response_mask], dim=1)
        positions, last_prompt = position_ids(mask), sequences.prompt_ids.shape[1] - 1
        prefix = self._worth_sharing(sequences.prompt_ids, sequences.prompt_mask)
        decoder = trunk(self._current())
        with self._compute_type():
            if self.by_length:
                return _states_by_length(decoder, ids, mask)[:, last_prompt:]
            if not self.packs() or (not prefix and mask.all()):
                output = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
                return output.last_hidden_state[:, last_prompt:]
            begin = _first_column(sequences.prompt_mask) + prefix  # no row has anything but prefix and padding before
            first = sequences.prompt_mask[0].nonzero()[:prefix, 0]  # [prefix], where the prefix stands in the first row
            behind = (mask & (positions >= prefix))[:, begin:]  # [B, T], the tokens of each row that are its own
            output = decoder(
                input_ids=pack(ids[0, first], ids[:, begin:], behind),
                position_ids=pack(positions[0, first], positions[:, begin:], behind),
                attention_mask=packed_mask(behind, prefix),
                use_cache=False,
            )
        return unpack(output.last_hidden_state, prefix, behind)[:, last_prompt - begin :]

    def packs(self) -> bool:
        """Whether rows run packed in the current role: full attention in every layer, by our kernel."""
        return self._stays_packed and supports_packing(self._current())

    def _worth_sharing(self, prompt_ids: Tensor, prompt_mask: Tensor) -> int:
        """How many tokens, common to the beginning of all prompts, to run once instead of once a row.

        0 if that saves fewer than WORTH_SHARING tokens, and in train mode, where dropout differs from row to row.
        """
        if self.training or not self.packs():
            return 0
        prefix = shared_prefix(prompt_ids, prompt_mask)
        return prefix if prefix * (len(prompt_ids) - 1) >= WORTH_SHARING else 0

    def _by_prompt(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[Tensor]:
        """Rows [N] int64 of one pass each: those of one prompt, if it is worth running once, and all others.

        One piece where what all prompts share saves more, and over a sharded base, whose processes make equally many
        passes.
        """
        everything = torch.arange(len(prompt_ids), device=prompt_ids.device)
        if self.synchronised or self.training or len(prompt_ids) < 2 or not self.packs():
            return [everything]
        prompts, lengths = equal_prompts(prompt_ids, prompt_mask), prompt_mask.sum(1)
        groups = [rows for number in range(int(prompts.max()) + 1) for rows in [everything[prompts == number]]]
        saved = {i: int(lengths[rows[0]] - 1) * (len(rows) - 1) for i, rows in enumerate(groups)}
        alone = [rows for i, rows in enumerate(groups) if saved[i] >= WORTH_SHARING]
        if sum(saved.values()) <= shared_prefix(prompt_ids, prompt_mask) * (len(prompt_ids) - 1) or not alone:
            return [everything]
        rest = [rows for i, rows in enumerate(groups) if saved[i] < WORTH_SHARING]
        return [*alone, torch.cat(rest)] if rest else alone

    def prefill(self, ids: Tensor, mask: Tensor, group_size: int = 1) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Begin to sample: run what prompts share into a cache, once, and say what is left to run.

        The prefix of all prompts runs once for all of them; then, of each group, all but the last token of its prompt.

        Args:
            ids: [B, P] int64, left-padded prompts.
            mask: [B, P] bool.
            group_size: rows next to each other that hold one prompt.

        Returns:
            For `next_token_logits`: ids [B, N] that have not run, mask [B, S] over cached and new tokens, positions
            [B, N], and the cache, which holds S - N tokens. A base that runs by length has its own kind of cache.
        """
        if self.by_length:
            return ids, mask, position_ids(mask), own_cache(self._current())
        if group_size > 1 and ids.shape[1] > 1:
            first_of_each = slice(None, None, group_size)
            left = self.prefill(ids[first_of_each, :-1], mask[first_of_each, :-1])
            self.next_token_logits(*left)
            _, seen, _, cache = left
            cache.batch_repeat_interleave(group_size)
            seen = torch.cat([seen.repeat_interleave(group_size, 0), mask[:, -1:]], dim=1)
            return ids[:, -1:], seen, position_ids(mask)[:, -1:], cache
        positions, cache = position_ids(mask), DynamicCache()
        prefix = 0 if self.synchronised else self._worth_sharing(ids, mask)  # a pass more, which others may not make
        if not prefix:
            return ids, mask, positions, cache
        cut = _first_column(mask) + prefix
        first = ids[:1, mask[0].nonzero()[:prefix, 0]]
        with self._compute_type():
            trunk(self._current())(input_ids=first, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
        behind = torch.cat([mask.new_ones(len(mask), prefix), (mask & (positions >= prefix))[:, cut:]], dim=1)
        return ids[:, cut:], behind, positions[:, cut:], cache

    @property
    def lm_head(self) -> nn.Module | FinalLogits:
        """Maps hidden states [..., H] to logits [..., V], in the current role; scales and caps as the model does."""
        model = self._current()
        return model.get_output_embeddings() if self._plain_head else FinalLogits(model)

    def next_token_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Run new tokens behind what the cache holds, add them to it, and predict the next.

        Args:
            ids: [B, N] int64, new tokens.
            mask: [B, S] bool, over cached and new tokens; or [B, 1, N, S] bool, which token may look at which.
            positions: [B, N] int64, of the new tokens.
            cache: of `prefill`; changed in place.

        Returns:
            Logits [B, V] after the last new token.
        """
        decoder = trunk(self._current())
        with self._compute_type():
            if self.by_length:
                output = decoder(input_ids=ids, position_ids=positions, use_cache=True, **cache)
                cache.update({name: getattr(output, name, before) for name, before in cache.items()})
                return self.lm_head(output.last_hidden_state[:, -1])
            output = decoder(
                input_ids=ids,
                attention_mask=mask.long() if mask.ndim == 2 else mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return self.lm_head(output.last_hidden_state[:, -1])

    def values(self, hidden: Tensor) -> Tensor:
        """The scalar head of the current role: hidden states [..., H] to fp32 [...], one number a position."""
        return self.heads[str(self._role)](hidden.float()).squeeze(-1)

    def scores(self, sequences: Sequences) -> Tensor:
        """One score a row, fp32 [B]: the scalar head of the current role at the last response token.

        An empty response is scored at the last prompt token.
        """
        hidden = self._states(sequences, sequences.response_ids, sequences.response_mask)
        return self.values(hidden[torch.arange(len(sequences), device=hidden.device), sequences.lengths])

    @contextmanager
    def training_pass(self, *, dropout: bool) -> Iterator[None]:
        """The mode of a forward and backward pass, until the block ends.

        Args:
            dropout: train mode, as SFT and the reward model train. PPO passes False: its new log-probs must be computed
                as the old ones were. Gradient checkpointing, which works in train mode alone, is served either way.
        """
        self.train(dropout)
        if self._recomputes:
            set_dropout(self, dropout)
        try:
            yield
        finally:
            self.eval()

    def _probe(self) -> Tensor | None:
        """Logits of eight fixed tokens by the base without adapters; None on the meta device."""
        if next(self.model.parameters()).device.type == "meta":
            return None
        return self._whole_pass(torch.arange(8) % text_config(self.model).vocab_size)

    @torch.no_grad()
    def plain_logits(self, ids: Tensor) -> Tensor:
        """Logits [N, V] of the tokens [N] of one row by the model's own forward pass, in the current role.

        Args:
            ids: [N] int64.
        """
        with self._compute_type():
            return self._whole_pass(ids)

    @torch.no_grad()
    def _whole_pass(self, ids: Tensor) -> Tensor:
        model = self._current()
        return model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]

    @torch.no_grad()
    def drift_of_base(self) -> float:
        """Largest absolute difference between the base's probe logits now and when it was loaded, adapters off.

        Exactly 0 unless something has written to the frozen base.
        """
        assert self.probe_logits is not None
        before, self._role = self._role, None
        self._activate(None)
        logits = self._probe()
        self._role = before
        self._activate(before)
        assert logits is not None
        return float((logits - self.probe_logits.to(logits.device)).abs().max())

    # Adapters and heads

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that exist."""
        return self._adapters.names

    def summary(self) -> str:
        """What trains, of how much, in which roles."""

        def millions(parameters: Iterable[nn.Parameter]) -> str:
            return f"{sum(p.numel() for p in parameters) / 1e6:,.2f} M"

        roles = " and ".join(f"{role} ({millions(self.trainable(role))})" for role in self._trainable)
        still = ", ".join(role for role in self.stacks if role not in self._trainable)
        lora = f", LoRA of rank {self.lora.r} on {self._adapters.layers}" if self.lora and self.adapters else ""
        return (
            f"Training {roles} of {millions(self.parameters())} on {self.base_model} in {self.model.dtype}{lora}"
            + (f"; frozen: {still}" if still else "")
            + ("; rows run by equal length" if self.by_length else "")
        ).replace("torch.", "")

    def _new_head(self, start: Literal["random", "zero"]) -> nn.Linear:
        width = self.model.get_output_embeddings().in_features
        head = nn.Linear(width, 1, dtype=torch.float32, device=next(self.model.parameters()).device)
        nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1) if start == "random" else 0.0)
        nn.init.zeros_(head.bias)
        if start == "random":
            head.register_parameter("bias", None)
        return head

    def own_model(self, role: str) -> Any:
        """The model that trains in a role without LoRA; None for any other role."""
        if self.stacks[role] or role not in self._trainable:
            return None
        return self.copies[role] if role in self.copies else self.model

    def whole_weights(self, role: str) -> dict[str, Tensor] | None:
        """For `save_role`: the weights of a sharded model that trains, by name. Collective; whole in the first process.

        Args:
            role: to save.
        """
        model = self.own_model(role) if self.sharded else None
        return None if model is None else {name: whole(p.detach()) for name, p in model.named_parameters()}

    def save_role(self, role: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the stack of a role as ordinary peft folders (without LoRA: its model) and its head as safetensors.

        Args:
            role: to save.
            folder: to write into; it exists.
            weights: of `whole_weights`, where the models are sharded.
        """
        if self.stacks[role]:
            self._adapters.save(self.stacks[role], folder)
        elif (model := self.own_model(role)) is not None:
            model.save_pretrained(folder / "model", state_dict=weights)
        if role in self.heads:
            save_file(dict(self.heads[role].state_dict()), folder / "head.safetensors")

    def load_role(self, role: str, stack: tuple[str, ...], folder: Path, *, head: bool) -> None:
        """Define a frozen role from what `save_role` wrote; adapters that exist already are shared, not loaded twice.

        Args:
            role: its name here.
            stack: its adapters, base side first.
            folder: that `save_role` wrote.
            head: whether it has a scalar head.

        Raises:
            UserError: a file is missing or does not fit the base.
        """
        for adapter in stack:
            if adapter not in self.adapters:
                self._adapters.load(adapter, place(folder, adapter))
        if not stack and (folder / "model").is_dir():
            self.copies[role] = load_model(str(folder / "model"), self.model.dtype).eval()
        if head:
            path = folder / "head.safetensors"
            if not path.is_file():
                raise UserError(f"{folder} holds no head.safetensors: without its head a reward model scores noise.")
            try:
                weights = load_file(path)
                self.heads[role] = self._new_head("zero" if "bias" in weights else "random")
                self.heads[role].load_state_dict(weights)
            except (SafetensorError, RuntimeError) as error:
                raise UserError(f"{path} is damaged or of another base; run its stage again.") from error
        self.stacks[role] = stack
        self._activate(self._role)

    @torch.no_grad()
    def merge(self, role: str, dtype: torch.dtype | None = None) -> Any:
        """A role as a plain model of transformers, its adapters folded into its weights; the backbone is used up by it.

        A quantised base is dequantised: the weights are those that the adapters were trained on.

        Args:
            role: without its head.
            dtype: of all weights, in one rounding; None leaves them in that of the base.
        """
        dtype = dtype or self.model.dtype
        if getattr(self.model, "is_quantized", False):
            self.model.dequantize(self.model.dtype)
        if self.stacks[role]:
            self._adapters.merge(self.stacks[role], dtype)
        return (self.copies[role] if role in self.copies else self.model).to(dtype)


def _states_by_length(decoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, T, H] of rows [B, T], 0 off the mask [B, T]: rows of equal length run together, unpadded."""
    groups = equally_long(mask)
    lines = [
        decoder(input_ids=ids[rows][mask[rows]].view(len(rows), -1), use_cache=False).last_hidden_state.flatten(0, 1)
        for rows in groups
    ]
    order = torch.cat(groups)
    return unpack(torch.cat(lines)[None], 0, mask[order])[order.argsort()]


def _first_column(mask: Tensor) -> int:
    """Where the longest of left-padded rows [B, T] begins."""
    return int(mask.any(0).int().argmax())
