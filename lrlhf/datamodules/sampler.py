"""Which rows form a batch: a function of (seed, epoch) alone, the same for any number of processes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from lrlhf.functional.randomness import generator

WINDOW = 8
"""Batches among which rows are sorted by length: enough to halve the padding, few enough to stay random."""


class BatchSampler(Sampler[list[int]]):
    """Batches of row numbers, shuffled anew every epoch, each rank taking its own slice of every global batch.

    Args:
        lengths: tokens in each row.
        batch_size: rows in a global batch.
        seed: of the order.
        shuffle: False keeps the order of the rows.
        group_by_length: put rows of similar length together, which saves padding and compute.
        drop_last: leave out the rows that do not fill a batch.
        epoch: the epoch to begin with.
        start: batches of that epoch to leave out, because a run goes on from there.
        rank: of this process.
        world_size: number of processes; must divide batch_size.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        group_by_length: bool = False,
        drop_last: bool = False,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.group_by_length, self.drop_last = group_by_length, drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = epoch, start

    @property
    def sampler(self) -> "BatchSampler":
        """This object, since Lightning calls `set_epoch` on the sampler inside a batch sampler, never on itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole if self.drop_last else whole + bool(rest)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        for batch in self._batches()[start:]:
            yield batch[self.rank :: self.world_size].tolist()

    def _batches(self) -> list[torch.Tensor]:
        if not self.shuffle:
            batches = list(torch.arange(len(self.lengths)).split(self.batch_size))
            return batches[: len(self)]
        random = generator(self.seed, "order", self.epoch)
        order = torch.randperm(len(self.lengths), generator=random)[: len(self) * self.batch_size]
        if not self.group_by_length:
            return list(order.split(self.batch_size))
        windows = order.split(WINDOW * self.batch_size)
        batches = [b for w in windows for b in w[self.lengths[w].argsort(stable=True)].split(self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random)]
