"""Named shares of the training rows, which a stable hash of the prompt decides."""

import hashlib

import numpy as np

from lrlhf.datamodules.formats import Row
from lrlhf.errors import UserError


def split_key(row: Row) -> int:
    """The first 64 bits of a hash of a row's prompt."""
    return int.from_bytes(hashlib.sha256(repr(row.messages).encode()).digest()[:8], "big")


def take_split(keys: np.ndarray, splits: dict[str, int | None], name: str) -> np.ndarray:
    """The rows of one named split: prompts are ordered by their hash and dealt out in the order of `splits`.

    Rows with one prompt stay together, so a split may hold a few more than its size.

    Args:
        keys: [N] uint64, the `split_key` of every row of the training files.
        splits: sizes by name, in their order; one may be None, the rest.
        name: of the split.

    Returns:
        int64, numbers of rows from 0, in the order of the split.

    Raises:
        UserError: the rows do not suffice for all splits.
    """
    sizes = {name: size for name, size in splits.items() if size is not None}
    if len(splits) - len(sizes) > 1 or any(size < 1 for size in sizes.values()):
        raise UserError(f"data.splits={splits}: sizes must be at least 1, and at most one may be null (the rest).")
    if sum(sizes.values()) > len(keys):
        raise UserError(f"data.splits asks for {sum(sizes.values())} rows, data.train has {len(keys)}.")
    order = np.argsort(keys, kind="stable")
    start = 0
    for split, size in splits.items():
        end = start + (len(keys) - sum(sizes.values()) if size is None else size)
        while 0 < end < len(order) and keys[order[end]] == keys[order[end - 1]]:
            end += 1
        if split == name:
            if start >= end:
                raise UserError(f"data.splits={splits}: of {len(keys)} rows none is left for {name!r}.")
            return order[start:end]
        start = end
    raise UserError(f"data.splits has no {name!r}.")
