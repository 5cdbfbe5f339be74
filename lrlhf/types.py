"""The batches that data modules hand to modules, and what rollouts make of them.

Axes everywhere: B sequences, P prompt tokens (left-padded), R response tokens (right-padded), H width, V vocabulary.
The mask is the truth about what counts, never the pad id; other fields are 0 off the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lrlhf.functional.sequences import by_prompt, equal_prompts


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompts and their responses; the batch that SFT trains on.

    prompt_ids [B, P] int64, prompt_mask [B, P] bool, response_ids [B, R] int64, response_mask [B, R] bool (true up to
    and including the first end-of-sequence token).
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor

    @classmethod
    def of(cls, other: Sequences, **more: Tensor) -> Self:
        """An object of this class with the fields of `other`, and `more`: fields that it lacks, or that replace its."""
        return cls(**{f.name: getattr(other, f.name) for f in fields(other)} | more)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def ids(self) -> Tensor:
        """[B, P + R] int64."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, P + R] bool."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens in each response."""
        return self.response_mask.sum(-1)

    def to(self, device: torch.device | str, **options: Any) -> Self:
        """All fields on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, **options) for f in fields(self)})

    def rows(self, index: Tensor) -> Self:
        """The rows of `index` [N] int64, cut to the columns that the longest of them needs."""
        prompts, responses = self.prompt_mask[index], self.response_mask[index]
        columns = {
            "prompt": slice(int(prompts.any(0).int().argmax()), None),
            "response": slice(0, int(responses.sum(-1).max()) if len(index) else 0),
        }

        def take(name: str) -> Tensor:
            values = getattr(self, name)[index]
            if values.ndim == 1 or name == "parts":
                return values
            return values[:, columns["prompt" if name.startswith("prompt") else "response"]]

        return replace(self, **{f.name: take(f.name) for f in fields(self)})

    def at_full_width(self, index: Tensor) -> Sequences:
        """The rows of `index` [N] int64 with all columns, as plain prompts and responses."""
        return Sequences(*(getattr(self, f.name)[index] for f in fields(Sequences)))

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Self]]:
        """Pieces of at most `size` rows of similar length, each with the index [N] of its rows. Saves memory only.

        Rows of one prompt stay together, so that a pass can run their prompt once.

        Args:
            size: rows of a piece at most.
        """
        if not len(self):
            return
        order = by_prompt(equal_prompts(self.prompt_ids, self.prompt_mask), self.mask.sum(-1))
        for index in order.split(size):
            yield index, self.rows(index)

    def blank(self) -> Self:
        """A row that means nothing (a prompt token, a response token off the mask), for passes that only fill up."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        first = {name: values.new_zeros((1, 1, *values.shape[2:])[: values.ndim]) for name, values in every.items()}
        return replace(self, **first | {"prompt_mask": ~first["prompt_mask"]})


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of responses to one prompt; the batch that a reward model and DPO train on.

    margin [B] fp32, 0 where unknown; numbers [B] int64, the place of each pair among the rows of its view.
    """

    chosen: Sequences
    rejected: Sequences
    margin: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device | str, **options: Any) -> Self:
        """All fields on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, **options) for f in fields(self)})

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Self]]:
        """Pieces of at most `size` pairs, of similar length, with the index [N] of each. Saves memory only."""
        beside = [f.name for f in fields(self)][2:]
        for index, chosen in self.chosen.micro_batches(size):
            rest = {name: getattr(self, name)[index] for name in beside}
            yield index, replace(self, chosen=chosen, rejected=self.rejected.rows(index), **rest)

    def blank(self) -> Self:
        """A pair that means nothing, for passes that only fill up."""
        beside = [f.name for f in fields(self)][2:]
        rest = {name: getattr(self, name).new_zeros(1, *getattr(self, name).shape[1:]) for name in beside}
        return replace(self, chosen=self.chosen.blank(), rejected=self.rejected.blank(), **rest)


@dataclass(frozen=True, slots=True)
class ReferencePreferences(Preferences):
    """Pairs with ref_logprobs [B, 2] fp32: of the chosen and the rejected response, each summed over its tokens."""

    ref_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to respond to. texts are the rendered prompts, sources the rows they came from, for reports.

    turns are the conversations as roles and contents, for reward models with a template of their own; columns what the
    data's files hold beside the prompt, for reward functions; places where each row stands (file and row). Rows come in
    groups of `group_size` with one prompt, next to each other.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    texts: tuple[str, ...]
    sources: tuple[dict[str, str], ...]
    turns: tuple[tuple[dict[str, str], ...], ...] = ()
    columns: tuple[dict[str, Any], ...] = ()
    places: tuple[str, ...] = ()
    group_size: int = 1

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def groups(self) -> Tensor:
        """[B] int64, the number of each row's group."""
        return torch.arange(len(self), device=self.prompt_ids.device) // self.group_size

    def repeat(self, times: int) -> Prompts:
        """Every prompt `times` times, next to each other: groups of `times` times the size."""
        fields: dict[str, Any] = {
            name: tuple(item for item in getattr(self, name) for _ in range(times))
            for name in ("texts", "sources", "turns", "columns", "places")
        }
        fields |= {name: getattr(self, name).repeat_interleave(times, 0) for name in ("prompt_ids", "prompt_mask")}
        return Prompts(**fields, group_size=times * self.group_size)

    def to(self, device: torch.device | str, **options: Any) -> Prompts:
        """Tensors on `device`."""
        return replace(
            self,
            prompt_ids=self.prompt_ids.to(device, **options),
            prompt_mask=self.prompt_mask.to(device, **options),
        )


@dataclass(frozen=True, slots=True)
class Rollout(Sequences):
    """What one sampling pass produced; every tensor without gradient.

    logprobs [B, R] fp32 of the policy that sampled, scores [B] fp32 of the whole response, parts [B, K] fp32: what the
    score is made of, for the log; groups [B] int64: rows of one number answer one prompt and lie next to each other.
    """

    logprobs: Tensor
    scores: Tensor
    parts: Tensor
    groups: Tensor

    @property
    def group_size(self) -> int:
        """Responses to one prompt."""
        return int((self.groups == self.groups[0]).long().cumprod(0).sum()) if len(self) else 1


@dataclass(frozen=True, slots=True)
class CriticRollout(Rollout):
    """A rollout with values [B, R] fp32: the critic's, before token t.

    states [B, R, H] fp32 are those that the critic's head reads, where it alone learns; else H is 0.
    """

    values: Tensor
    states: Tensor


@dataclass(frozen=True, slots=True)
class Experience(Rollout):
    """A rollout with advantages [B, R] fp32: what a policy learns from."""

    advantages: Tensor

    def minibatches(self, size: int, generator: torch.Generator, rank: int = 0, world_size: int = 1) -> Iterator[Self]:
        """Shuffled pieces of `size` rows over all processes, one optimizer step each.

        Process `rank` holds every `world_size`-th group of rows of the batch. Each piece takes one row from every
        residue class modulo `size`, so that all processes have equally many rows of it and it is the same piece for any
        `world_size` that divides `size` in whole groups, and for one process always.

        Args:
            size: rows of a piece over all processes.
            generator: in the same state in all processes.
            rank: of this process.
            world_size: number of processes.
        """
        rows, group_size = len(self) * world_size, self.group_size
        # [pieces, size]: column r deals out the rows r, r + size, r + 2 size, ... at random, one to each piece (line).
        shuffled = torch.rand(-(-rows // size), size, generator=generator).argsort(0)
        for piece in shuffled * size + torch.arange(size):
            group, within = piece // group_size, piece % group_size
            mine = ((group // world_size) * group_size + within)[(group % world_size == rank) & (piece < rows)]
            if len(mine):
                yield self.rows(mine.to(self.prompt_ids.device))


@dataclass(frozen=True, slots=True)
class CriticExperience(Experience):
    """With values, states (see CriticRollout) and returns [B, R] fp32: what a critic learns from as well."""

    values: Tensor
    states: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class ReferenceExperience(Experience):
    """With ref_logprobs [B, R] fp32 of the reference: for a divergence that is a term of the loss."""

    ref_logprobs: Tensor
