"""Positions and masks of [prompt | response] rows: prompts padded on the left, responses on the right."""

import torch
from torch import Tensor


def position_ids(mask: Tensor) -> Tensor:
    """Position of each true token among the true tokens of its row; mask [B, T] bool to int64 [B, T].

    Padding holds 0 on the left and the last position on the right, where nothing looks at it.

    Given to the model always: without them left padding changes log-probabilities.
    """
    return (mask.cumsum(-1) - 1).clamp(min=0)


def equally_long(mask: Tensor) -> list[Tensor]:
    """The rows of a mask [B, T] bool in groups of equally many true tokens: row numbers [N] int64, shortest first."""
    lengths = mask.sum(-1)
    return [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]


def equal_prompts(ids: Tensor, mask: Tensor) -> Tensor:
    """Number of each row's prompt: equal prompts have one number; ids and mask [B, P] to int64 [B].

    Args:
        ids: [B, P] int64, left-padded.
        mask: [B, P] bool.
    """
    return ids.masked_fill(~mask, -1).unique(dim=0, return_inverse=True)[1]


def by_prompt(prompts: Tensor, lengths: Tensor) -> Tensor:
    """An order of rows [B] int64 that keeps equal prompts together, longest rows first; stable.

    Args:
        prompts: [B] int64 of `equal_prompts`.
        lengths: [B] int64, tokens of prompt and response.
    """
    rows = torch.arange(len(prompts), device=prompts.device)
    longest = torch.zeros_like(lengths).scatter_reduce(0, prompts, lengths, "amax")[prompts]
    first = torch.full_like(rows, len(rows)).scatter_reduce(0, prompts, rows, "amin")[prompts]
    order = lengths.argsort(descending=True, stable=True)
    order = order[first[order].argsort(stable=True)]
    return order[longest[order].argsort(descending=True, stable=True)]


def shared_prefix(ids: Tensor, mask: Tensor) -> int:
    """How many first tokens all rows have in common, at least one of each row left over.

    Args:
        ids: [B, P] int64, left-padded.
        mask: [B, P] bool.
    """
    lengths = mask.sum(-1)
    columns = (torch.arange(ids.shape[1], device=ids.device) - lengths[:, None]) % max(1, ids.shape[1])
    aligned = ids.gather(1, columns)
    same = (aligned == aligned[:1]).all(0).long().cumprod(0).sum()
    return max(0, min(int(same), int(lengths.min()) - 1)) if ids.numel() else 0


def response_mask(tokens: Tensor, stop_ids: Tensor) -> Tensor:
    """True up to and including the first stop token, all true without one; [B, R] int64 to bool [B, R].

    Call it once, on sampled tokens: afterwards the mask is the truth, never the token ids.
    """
    stops = torch.isin(tokens, stop_ids)
    return (stops.cumsum(-1) - stops.long()) == 0


def last_true(mask: Tensor) -> Tensor:
    """One-hot bool mask [B, R] of the last true position of each row; a row without one stays all false."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def append_end(tokens: Tensor, mask: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Responses that all end: the first stop token is appended to those that were cut off before one.

    Args:
        tokens: [B, R] int64.
        mask: [B, R] bool.
        stop_ids: [N] int64.

    Returns:
        Tokens and mask [B, R + 1].
    """
    ended = (torch.isin(tokens, stop_ids) & last_true(mask)).any(-1)
    place = torch.nn.functional.one_hot(mask.sum(-1), mask.shape[1] + 1).bool() & ~ended[:, None]
    tokens, mask = (torch.nn.functional.pad(x, (0, 1)) for x in (tokens, mask))
    return tokens.masked_fill(place, int(stop_ids[0])), mask | place
