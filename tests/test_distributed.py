"""Sums and agreements of two processes that gloo joins, and of one alone."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lrlhf import distributed
from tests.integration.processes import start, wait


def parameter(values, gradient=None) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.as_tensor(values))
    if gradient is not None:
        made.grad = torch.as_tensor(gradient, dtype=made.dtype)
    return made


def gradients_of(rank: int) -> list[torch.nn.Parameter]:
    """Of both processes, of the second alone, of none, in bf16, and of a number."""
    return [
        parameter([[1.0, 2.0]], [[1.0 + 10 * rank, 2.0 + 20 * rank]]),
        parameter([3.0], [5.0] if rank == 1 else None),
        parameter([4.0, 4.0, 4.0]),
        parameter(torch.ones(2, 2, dtype=torch.bfloat16), torch.full((2, 2), 0.5 + rank)),
        parameter(0.0, -1.0),
    ]


def ask(rank: int) -> dict:
    """Everything that `lrlhf.distributed` says to this process."""
    given, summed = torch.tensor([1.0 + rank, -2.0]), gradients_of(rank)
    weights = [parameter([float(rank), 7.0 + rank]), parameter([[9.0 + rank]]).requires_grad_(False)]
    found = {
        "world_size": distributed.world_size(),
        "rank": distributed.rank(),
        "total": distributed.total(given),
        "given": given,
        "total of a value with a gradient": distributed.total(parameter([2.0]) * 3).requires_grad,
        "total of truths": distributed.total(torch.tensor(3, dtype=torch.int64)),
        "number": distributed.total_number(2**24 + 1 + rank),
        "largest": [distributed.largest(n) for n in (5 - rank, 2**40 + rank, -3 - rank, 0)],
        "any": [distributed.any_process(flag) for flag in (rank == 0, rank == 1, False, True)],
        "objects": distributed.gather_objects({"rank": rank, "text": "x" * rank}),
    }
    distributed.sum_gradients(summed)
    distributed.broadcast(weights)
    if distributed.world_size() > 1:
        mesh = init_device_mesh("cpu", (2,))
        found["whole"] = distributed.whole(distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)]))
    return found | {"gradients": [p.grad for p in summed], "weights": [p.data for p in weights]}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What both of two processes found."""
    folder = tmp_path_factory.mktemp("two")

    def work() -> None:
        dist.init_process_group("gloo")
        torch.save(ask(dist.get_rank()), folder / f"{dist.get_rank()}.pt")
        dist.destroy_process_group()

    codes = wait(start(work, folder / "log", 2), 60)
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict:
    return ask(0)


def test_each_process_knows_its_number_and_how_many_there_are(two, alone):
    assert [(found["rank"], found["world_size"]) for found in (*two, alone)] == [(0, 2), (1, 2), (0, 1)]


def test_a_total_is_the_sum_over_processes_and_leaves_what_was_given(two):
    for rank, found in enumerate(two):
        assert found["total"].tolist() == [1 + 2, -4]
        assert found["given"].tolist() == [1 + rank, -2]
        assert found["total of truths"].item() == 6
        assert found["total of truths"].dtype == torch.int64
        assert not found["total of a value with a gradient"]


def test_a_total_of_numbers_keeps_the_digits_that_fp32_has_not(two):
    assert [found["number"] for found in two] == [2**25 + 3] * 2


def test_the_largest_is_the_same_everywhere_and_exact(two):
    assert [found["largest"] for found in two] == [[5, 2**40 + 1, -3, 0]] * 2


def test_what_any_process_says_all_hear(two):
    assert [found["any"] for found in two] == [[True, True, False, True]] * 2


def test_objects_come_in_the_order_of_ranks(two):
    assert [found["objects"] for found in two] == [[{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]] * 2


def test_gradients_are_summed_in_their_shape_and_type(two):
    for found in two:
        both, _, _, half, number = found["gradients"]
        assert both.tolist() == [[12, 24]]
        assert (half.dtype, half.tolist()) == (torch.bfloat16, [[2.0, 2.0], [2.0, 2.0]])
        assert (number.shape, number.item()) == ((), -2)


def test_a_gradient_that_one_process_lacks_is_the_others_and_one_that_all_lack_stays_away(two):
    """An optimizer moves what has a gradient of 0, by its moments and its weight decay; it skips what has none."""
    for found in two:
        _, of_the_second, of_none, *_ = found["gradients"]
        assert of_the_second.tolist() == [5]
        assert of_none is None


def test_all_get_the_parameters_of_the_first_trained_or_not(two):
    for found in two:
        assert [weight.tolist() for weight in found["weights"]] == [[0, 7], [[9]]]


def test_a_sharded_tensor_is_whole_in_the_first_process_alone(two):
    torch.testing.assert_close(two[0]["whole"], torch.arange(10.0).view(5, 2))
    assert two[1]["whole"].numel() == 0


def test_one_process_gets_back_what_it_gave(alone):
    assert alone["total"] is alone["given"]
    assert alone["number"] == 2**24 + 1
    assert alone["largest"] == [5, 2**40, -3, 0]
    assert alone["any"] == [True, False, False, True]
    assert alone["objects"] == [{"rank": 0, "text": ""}]
    assert alone["weights"][0].tolist() == [0, 7]
    for found, given in zip(alone["gradients"], gradients_of(0), strict=True):
        assert found is None if given.grad is None else torch.equal(found, given.grad)
