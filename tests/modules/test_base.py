"""Passes over a batch, whatever its pieces are and whoever else must pass equally often."""

from types import SimpleNamespace

import pytest
import torch

from lrlhf import SFT, distributed
from lrlhf.types import Sequences


@pytest.fixture
def batch() -> Sequences:
    """Five rows of unequal length."""
    prompt_mask = torch.arange(4) >= torch.tensor([0, 2, 1, 3, 0])[:, None]
    response_mask = torch.arange(6) < torch.tensor([6, 1, 3, 2, 5])[:, None]
    ids = torch.arange(1, 51).view(5, 10)
    return Sequences(ids[:, :4] * prompt_mask, prompt_mask, ids[:, 4:] * response_mask, response_mask)


def module(size: int, synchronised: bool = False) -> SFT:
    made = SFT(micro_batch_size=size)
    made.backbone = SimpleNamespace(synchronised=synchronised)
    return made


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("missing", [None, 0, 2])
def test_what_is_said_of_a_row_lies_in_its_place_however_the_batch_is_cut(monkeypatch, batch, size, missing):
    """Squares of token ids, and lengths: of every row by hand, with and without passes that fill up."""
    monkeypatch.setattr(distributed, "missing_passes", lambda passes: missing)
    made = module(size, missing is not None)
    squares = made.per_row(batch, batch.response_mask.shape, lambda rows: rows.response_ids.float() ** 2)
    assert squares.tolist() == (batch.response_ids**2).tolist()
    both = made.per_row(
        batch, [5, 2], lambda rows: torch.stack([rows.lengths, len(rows) - rows.lengths * 0], 1).float()
    )
    assert both[:, 0].tolist() == [6, 1, 3, 2, 5]
    assert both[:, 1].min() >= 1


@pytest.mark.parametrize("missing", [0, 3])
def test_rows_that_fill_up_are_passed_over_and_weigh_nothing(monkeypatch, batch, missing):
    monkeypatch.setattr(distributed, "missing_passes", lambda passes: missing)
    seen, weight = [], torch.ones((), requires_grad=True)

    def loss(rows: Sequences) -> torch.Tensor:
        seen.append(len(rows))
        return weight * (rows.lengths.sum() + 7)

    losses = list(module(2, synchronised=True).losses_of(batch, loss))
    torch.stack(losses).sum().backward()
    assert seen == [2, 2, 1] + [1] * missing
    assert [float(value) for value in losses[3:]] == [0.0] * missing
    assert float(weight.grad) == 17 + 3 * 7


def test_alone_no_pass_is_added(monkeypatch, batch):
    monkeypatch.setattr(distributed, "missing_passes", lambda passes: pytest.fail("a collective of one process"))
    assert [len(index) for index, _ in module(2).micro_batches(batch)] == [2, 2, 1]
