"""The batches that data modules hand to modules, and what PPO makes of them.

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
            if values.ndim == 1:
                return values
            return values[:, columns["prompt" if name.startswith("prompt") else "response"]]

        return replace(self, **{f.name: take(f.name) for f in fields(self)})

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Self]]:
        """Pieces of at most `size` rows of similar length, each with the index [N] of its rows. Saves memory only.

        Args:
            size: rows of a piece at most.
        """
        order = self.mask.sum(-1).argsort(descending=True, stable=True)
        for index in order.split(size) if len(self) else ():
            yield index, self.rows(index)

    def blank(self) -> Self:
        """A row that means nothing (a prompt token, a response token off the mask), for passes that only fill up."""
        first = {f.name: getattr(self, f.name).new_zeros((1, 1)[: getattr(self, f.name).ndim]) for f in fields(self)}
        return replace(self, **first | {"prompt_mask": ~first["prompt_mask"]})


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of responses to one prompt; the batch that a reward model trains on. margin [B] fp32, 0 where unknown."""

    chosen: Sequences
    rejected: Sequences
    margin: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device | str, **options: Any) -> Preferences:
        """All fields on `device`."""
        return Preferences(*(getattr(self, f.name).to(device, **options) for f in fields(self)))

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Preferences]]:
        """Pieces of at most `size` pairs, of similar length, with the index [N] of each. Saves memory only."""
        for index, chosen in self.chosen.micro_batches(size):
            yield index, Preferences(chosen, self.rejected.rows(index), self.margin[index])

    def blank(self) -> Preferences:
        """A pair that means nothing, for passes that only fill up."""
        return Preferences(self.chosen.blank(), self.rejected.blank(), self.margin.new_zeros(1))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to respond to. texts are the rendered prompts, sources the rows they came from, for reports.

    turns are the conversations as roles and contents, for reward models with a template of their own.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    texts: tuple[str, ...]
    sources: tuple[dict[str, str], ...]
    turns: tuple[tuple[dict[str, str], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids)

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

    logprobs [B, R] fp32 of the policy that sampled, values [B, R] fp32 before token t, scores [B] fp32 of the whole
    response.
    """

    logprobs: Tensor
    values: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Experience(Rollout):
    """A rollout with advantages and returns, both [B, R] fp32: what PPO learns from."""

    advantages: Tensor
    returns: Tensor

    def minibatches(self, size: int, generator: torch.Generator, rank: int = 0, world_size: int = 1) -> Iterator[Self]:
        """Shuffled pieces of `size` rows over all processes, one optimizer step each.

        Process `rank` holds every `world_size`-th row of the batch. Each piece takes one row from every residue class
        modulo `size`, so that all processes have equally many rows of it and it is the same piece for any `world_size`
        that divides `size`.

        Args:
            size: rows of a piece over all processes; divisible by `world_size`.
            generator: in the same state in all processes.
            rank: of this process.
            world_size: number of processes.
        """
        rows = len(self) * world_size
        # [pieces, size]: column r deals out the rows r, r + size, r + 2 size, ... at random, one to each piece (line).
        shuffled = torch.rand(-(-rows // size), size, generator=generator).argsort(0)
        for piece in shuffled * size + torch.arange(size):
            mine = piece[(piece % world_size == rank) & (piece < rows)] // world_size
            if len(mine):
                yield self.rows(mine.to(self.prompt_ids.device))
