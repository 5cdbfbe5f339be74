"""Tokenised rows into padded batches: prompts padded on the left, responses on the right."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrlhf.types import Preferences, Prompts, Sequences


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One row as token ids: its prompt, its responses (each with the end-of-sequence token), and where it came from."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    margin: float
    text: str
    source: dict[str, str]
    turns: tuple[dict[str, str], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    number: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt) + max(map(len, self.responses), default=0)


def pad(rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] int64, 0 on padding, and their mask [B, L] bool.

    Args:
        rows: token ids, of any lengths.
        left: pad on the left, else on the right.
    """
    width = max(map(len, rows), default=1)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return ids, mask


def collate_sequences(rows: Sequence[Tokenized], response: int = 0) -> Sequences:
    """Prompts with their first (or another) response."""
    prompts = pad([row.prompt for row in rows], left=True)
    return Sequences(*prompts, *pad([row.responses[response] for row in rows], left=False))


def collate_preferences(rows: Sequence[Tokenized]) -> Preferences:
    """Pairs: the first response is the chosen one."""
    margin = torch.tensor([row.margin for row in rows], dtype=torch.float32)
    numbers = torch.tensor([row.number for row in rows], dtype=torch.long)
    return Preferences(collate_sequences(rows, 0), collate_sequences(rows, 1), margin, numbers)


def collate_prompts(rows: Sequence[Tokenized]) -> Prompts:
    """Prompts alone, with their texts, source rows, turns, columns and places."""
    ids, mask = pad([row.prompt for row in rows], left=True)
    names = {"texts": "text", "sources": "source", "turns": "turns", "columns": "columns", "places": "place"}
    columns: Any = {theirs: tuple(getattr(row, ours) for row in rows) for theirs, ours in names.items()}
    return Prompts(ids, mask, **columns)


def collate_groups(rows: Sequence[Tokenized], times: int) -> Prompts:
    """Prompts alone, each `times` times, next to each other."""
    return collate_prompts(rows).repeat(times)
