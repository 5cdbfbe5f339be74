import lightning as L
import pytest
import torch

from lrlhf.datamodules.sampler import WINDOW, BatchSampler

LENGTHS = torch.randint(1, 200, (103,), generator=torch.Generator().manual_seed(0)).tolist()
MODES = [{"shuffle": False}, {"shuffle": True}, {"shuffle": True, "group_by_length": True}]


def batches(epoch: int = 0, seed: int = 0, size: int = 8, **options) -> list[list[int]]:
    sampler = BatchSampler(LENGTHS, size, seed=seed, **options)
    sampler.set_epoch(epoch)
    got = list(sampler)
    assert len(sampler) == len(got)
    return got


def padding(epoch: list[list[int]]) -> int:
    """Positions that hold no token."""
    return sum(len(b) * max(LENGTHS[i] for i in b) - sum(LENGTHS[i] for i in b) for b in epoch)


@pytest.mark.parametrize("size", [1, 8, 103, 200])
@pytest.mark.parametrize("mode", MODES)
def test_every_row_comes_once_in_an_epoch(mode, size):
    epoch = batches(size=size, **mode)
    assert sorted(sum(epoch, [])) == list(range(103))
    assert sorted(map(len, epoch), reverse=True)[:-1] == [size] * (len(epoch) - 1)


@pytest.mark.parametrize("mode", MODES)
def test_without_the_last_batch_all_batches_are_full_and_no_row_comes_twice(mode):
    epoch = batches(drop_last=True, **mode)
    assert [len(b) for b in epoch] == [8] * (103 // 8)
    assert len(set(sum(epoch, []))) == 96


def test_rows_that_are_left_out_differ_from_epoch_to_epoch():
    lost = [set(range(103)) - set(sum(batches(epoch, shuffle=True, drop_last=True), [])) for epoch in range(2)]
    assert lost[0] != lost[1]


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_order_depends_on_seed_and_epoch_alone(mode):
    first = batches(epoch=3, seed=5, **mode)
    torch.manual_seed(99)
    assert batches(epoch=3, seed=5, **mode) == first
    assert batches(epoch=4, seed=5, **mode) != first
    assert batches(epoch=3, seed=6, **mode) != first


def test_without_shuffling_the_order_is_that_of_the_file_in_every_epoch():
    assert sum(batches(epoch=2, shuffle=False), []) == list(range(103))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_share_out_the_same_global_batches(mode, world_size):
    whole = batches(epoch=1, drop_last=True, **mode)
    ranks = [batches(epoch=1, drop_last=True, rank=r, world_size=world_size, **mode) for r in range(world_size)]
    for batch, slices in zip(whole, zip(*ranks, strict=True), strict=True):
        assert {len(x) for x in slices} == {8 // world_size}
        assert sorted(sum(slices, [])) == sorted(batch)


def test_grouping_by_length_halves_the_padding():
    assert padding(batches(shuffle=True, group_by_length=True)) < 0.5 * padding(batches(shuffle=True))


def test_grouped_batches_do_not_come_in_order_of_length():
    longest = [max(LENGTHS[i] for i in b) for b in batches(shuffle=True, group_by_length=True)]
    assert longest[:WINDOW] != sorted(longest[:WINDOW])


def test_grouped_rows_meet_other_rows_in_every_epoch():
    first, second = ({frozenset(b) for b in batches(epoch, shuffle=True, group_by_length=True)} for epoch in range(2))
    assert not first & second


def test_lightning_moves_the_epoch_so_that_every_epoch_has_another_order(tmp_path, tiny_llama, data_files):
    from tests.modules.helpers import ppo, prompt_data, trainer

    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(tuple(batch.texts))

    runner = trainer(tmp_path, callbacks=[Watch()], max_epochs=2, limit_train_batches=1, enable_checkpointing=False)
    runner.fit(ppo(tiny_llama), prompt_data(tiny_llama, data_files))
    assert len(seen) == 2
    assert set(seen[0]) != set(seen[1])
