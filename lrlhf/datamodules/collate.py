"""Tokenised rows into padded batches: prompts padded on the left, responses on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    return Preferences(collate_sequences(rows, 0), collate_sequences(rows, 1), margin)


def collate_prompts(rows: Sequence[Tokenized]) -> Prompts:
    """Prompts alone, with their texts, source rows and turns."""
    ids, mask = pad([row.prompt for row in rows], left=True)
    columns = ([getattr(row, name) for row in rows] for name in ("text", "source", "turns"))
    return Prompts(ids, mask, *map(tuple, columns))
