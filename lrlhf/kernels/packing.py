"""Rows of tokens without their padding, end to end behind one copy of what they all begin with: [prefix | 1 | 2 | ...].

All that treats tokens one by one (products, norms) runs over this line as over any other; attention takes it apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Maps query [B, H, T, D], key and value [B, K, S, D] and a mask [B, 1, T, S] (None: causal) to [B, T, H, D]."""


def pack(first: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """One line [1, P + N] of a prefix [P] and the N tokens of rows [B, T] that count, mask [B, T] bool.

    Args:
        first: [P], the prefix; may be empty.
        rows: [B, T].
        mask: [B, T] bool, the tokens that count.
    """
    return torch.cat([first, rows[mask]])[None]


def unpack(line: Tensor, prefix: int, mask: Tensor) -> Tensor:
    """The rows [B, T, ...] of a line [1, P + N, ...], 0 off the mask [B, T] bool.

    Args:
        line: [1, P + N, ...].
        prefix: P.
        mask: [B, T] bool, with N true.
    """
    return _spread(line[0, prefix:], mask)


def packed_mask(mask: Tensor, prefix: int) -> Tensor:
    """What each token of a row may look at: the whole prefix, and what its row has up to itself.

    Args:
        mask: [B, T] bool, the tokens of the rows behind the prefix.
        prefix: tokens before them.

    Returns:
        bool [B, 1, T, P + T].
    """
    rows, length = mask.shape
    keys = torch.cat([mask.new_ones(rows, prefix), mask], dim=1)[:, None, None]
    return keys & torch.ones(length, prefix + length, dtype=torch.bool, device=mask.device).tril(prefix)


def is_packed(query: Tensor, mask: Tensor) -> bool:
    """Whether queries [B, H, T, D] are such a line: their mask is one of other rows.

    Args:
        query: [B, H, T, D]; of a line B is 1.
        mask: [B, 1, T, S].
    """
    return len(mask) != len(query) or mask.shape[-2] != query.shape[2]


def attend_packed(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of a line: the prefix looks at itself, each row at the prefix and itself.

    Args:
        attend: attention of ordinary rows.
        query: [1, H, P + N, D].
        key: [1, K, P + N, D].
        value: [1, K, P + N, D].
        mask: bool [B, 1, T, P + T], of `packed_mask`.

    Returns:
        [1, P + N, H, D].
    """
    length, keys = mask.shape[2:]
    prefix = keys - length
    counts = mask[:, 0].diagonal(prefix, 1, 2)
    (first_q, q), (first_k, k), (first_v, v) = (
        (x[:, :, :prefix], _spread(x[0, :, prefix:].transpose(0, 1), counts).transpose(1, 2))
        for x in (query, key, value)
    )
    if prefix:
        k, v = (torch.cat([x.expand(len(mask), -1, -1, -1), y], dim=2) for x, y in ((first_k, k), (first_v, v)))
    behind = _gather(attend(q, k, v, mask), counts, query.shape[2] - prefix)[None]
    return torch.cat([attend(first_q, first_k, first_v, None), behind], dim=1) if prefix else behind


def _spread(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens [N, ...] to where they count in rows [B, T, ...], 0 elsewhere."""
    if len(tokens) < mask.numel():
        flat = mask.flatten()
        places = torch.where(flat, flat.cumsum(0) - 1, len(tokens))
        tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])]).index_select(0, places)
    return tokens.unflatten(0, mask.shape)


def _gather(rows: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` tokens [N, ...] of rows [B, T, ...] that count."""
    flat = rows.flatten(0, 1)
    return flat if count == len(flat) else flat.index_select(0, mask.flatten().nonzero_static(size=count)[:, 0])
