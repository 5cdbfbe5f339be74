"""Rows that begin with the same tokens, laid end to end behind one copy of them: [prefix | row 1 | row 2 | ...].

All that treats tokens one by one (products, norms) runs over this line as over any other; attention takes it apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Maps query [B, H, T, D], key and value [B, K, S, D] and a mask [B, 1, T, S] (None: causal) to [B, T, H, D]."""


def join(first: Tensor, rows: Tensor) -> Tensor:
    """One line [1, P + B * T] of a prefix [P] and the rest of each row [B, T]."""
    return torch.cat([first, rows.flatten()])[None]


def split(line: Tensor, prefix: int, rows: int) -> Tensor:
    """The rows [B, T, ...] of a line [1, P + B * T, ...]."""
    return line[0, prefix:].unflatten(0, (rows, -1))


def prefix_mask(mask: Tensor, prefix: int) -> Tensor:
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


def is_joined(query: Tensor, mask: Tensor | None) -> bool:
    """Whether queries [B, H, T, D] are such a line: their mask is one of fewer queries."""
    return mask is not None and mask.shape[-2] != query.shape[2]


def attend_joined(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of a line: the prefix looks at itself, each row at the prefix and itself.

    Args:
        attend: attention of ordinary rows.
        query: [1, H, P + B * T, D].
        key: [1, K, P + B * T, D].
        value: [1, K, P + B * T, D].
        mask: bool [B, 1, T, P + T], of `prefix_mask`.

    Returns:
        [1, P + B * T, H, D].
    """
    rows, _, length, keys = mask.shape
    sizes = [keys - length, rows * length]
    (first_q, q), (first_k, k), (first_v, v) = (x.split(sizes, dim=2) for x in (query, key, value))
    q, k, v = (x[0].unflatten(1, (rows, length)).transpose(0, 1) for x in (q, k, v))
    k, v = (torch.cat([x.expand(rows, -1, -1, -1), y], dim=2) for x, y in ((first_k, k), (first_v, v)))
    behind = attend(q, k, v, mask)
    return torch.cat([attend(first_q, first_k, first_v, None), behind.flatten(0, 1)[None]], dim=1)
