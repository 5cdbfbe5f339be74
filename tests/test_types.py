from dataclasses import fields, replace

import pytest
import torch

from lrlhf.types import CriticExperience, Experience, Preferences, Prompts, Rollout, Sequences

PROMPTS, RESPONSES = torch.tensor([2, 4, 1, 3, 4]), torch.tensor([3, 1, 6, 2, 6])
P, R = 6, 8


def experience() -> Experience:
    """Five ragged rows, wider than any needs; every number says which field, row and column it is from."""
    prompt_mask = torch.arange(P) >= P - PROMPTS[:, None]
    response_mask = torch.arange(R) < RESPONSES[:, None]

    def numbered(mask, start):
        return (start + torch.arange(mask.numel()).view(mask.shape)).masked_fill(~mask, 0)

    floats = [numbered(response_mask, 1000 * i).float() for i in (3, 4, 5, 6)]
    return CriticExperience(
        numbered(prompt_mask, 1000),
        prompt_mask,
        numbered(response_mask, 2000),
        response_mask,
        logprobs=floats[0],
        values=floats[1],
        states=torch.stack([floats[1], -floats[1]], dim=-1),
        scores=torch.arange(5.0),
        parts=torch.arange(5.0)[:, None],
        groups=torch.arange(5),
        advantages=floats[2],
        returns=floats[3],
    )


def content(batch: Experience, row: int) -> list:
    """What a row says, without its padding."""
    prompt, response = batch.prompt_mask[row], batch.response_mask[row]
    out = [batch.prompt_ids[row][prompt].tolist(), batch.scores[row].item(), batch.parts[row].tolist()]
    names = ["response_ids", "logprobs", "values", "states", "advantages", "returns"]
    return out + [getattr(batch, name)[row][response].tolist() for name in names]


@pytest.mark.parametrize("index", [[0], [3, 0], [4, 1, 2], [2, 2], [0, 1, 2, 3, 4]])
def test_rows_keep_their_content_and_only_the_padding_that_one_of_them_needs(index):
    whole = experience()
    part = whole.rows(torch.tensor(index))
    assert [content(part, i) for i in range(len(index))] == [content(whole, i) for i in index]
    assert part.prompt_ids.shape == part.prompt_mask.shape == (len(index), PROMPTS[index].max())
    for name in ["response_ids", "response_mask", "logprobs", "values", "states", "advantages", "returns"]:
        assert getattr(part, name).shape[:2] == (len(index), RESPONSES[index].max())
    assert part.prompt_mask[:, -1].all(), "the prompt ends where the response begins"
    assert torch.equal(part.lengths, RESPONSES[index])


def test_no_rows_are_a_batch_of_length_zero():
    assert len(experience().rows(torch.tensor([], dtype=torch.long))) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_micro_batches_cover_every_row_once_with_the_index_of_each(size):
    whole = experience()
    pieces = list(whole.micro_batches(size))
    assert sorted(torch.cat([index for index, _ in pieces]).tolist()) == [0, 1, 2, 3, 4]
    for index, piece in pieces:
        assert len(piece) == len(index) <= size
        assert [content(piece, i) for i in range(len(index))] == [content(whole, i) for i in index.tolist()]


def test_micro_batches_hold_rows_of_similar_length_the_longest_first():
    lengths = [(PROMPTS + RESPONSES)[index].tolist() for index, _ in experience().micro_batches(2)]
    assert lengths == [[10, 7], [5, 5], [5]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_minibatches_cut_the_rows_in_pieces_that_the_generator_decides(size):
    def cut(seed: int) -> list[list[float]]:
        pieces = experience().minibatches(size, torch.Generator().manual_seed(seed))
        return [sorted(x.scores.tolist()) for x in pieces]

    assert sorted(sum(cut(0), [])) == [0, 1, 2, 3, 4]
    assert sorted(map(len, cut(0))) == {1: [1] * 5, 2: [1, 2, 2], 5: [5]}[size]
    assert cut(0) == cut(0)
    assert (len({str(cut(seed)) for seed in range(5)}) > 1) == (size < 5)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_minibatches_are_the_same_rows_for_any_number_of_processes(size):
    """Of 16 rows, process r of w holds r, r + w, ...; each has equally many rows of each minibatch."""
    rows = [i % 5 for i in range(16)]
    batch = replace(experience().rows(torch.tensor(rows)), scores=torch.arange(16.0))

    def pieces(world_size: int) -> list[set[float]]:
        found: list[set[float]] = [set() for _ in range(16 // size)]
        for rank in range(world_size):
            local = batch.rows(torch.arange(rank, 16, world_size))
            minibatches = list(local.minibatches(size, torch.Generator().manual_seed(3), rank, world_size))
            assert [len(x) for x in minibatches] == [size // world_size] * (16 // size)
            for piece, minibatch in zip(found, minibatches, strict=True):
                piece |= set(minibatch.scores.tolist())
        return found

    assert sorted(number for piece in pieces(1) for number in piece) == list(range(16))
    assert pieces(1) == pieces(2) == pieces(4)


def test_a_blank_row_has_one_prompt_token_and_no_response():
    blank = experience().blank()
    assert (len(blank), blank.prompt_mask.tolist(), blank.response_mask.tolist()) == (1, [[True]], [[False]])
    assert blank.scores.shape == (1,)


def test_ids_and_mask_join_prompt_and_response():
    batch = experience()
    assert batch.ids.shape == batch.mask.shape == (5, P + R)
    assert torch.equal(batch.mask.sum(-1), PROMPTS + RESPONSES)
    assert torch.equal(batch.ids != 0, batch.mask)


def test_pairs_stay_together_in_micro_batches():
    batch = experience()
    sequences = [
        Sequences(ids, mask, x, y)
        for ids, mask, x, y in [
            (batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask),
            (batch.prompt_ids, batch.prompt_mask, batch.response_ids.flip(0), batch.response_mask.flip(0)),
        ]
    ]
    pairs = Preferences(*sequences, margin=torch.arange(5.0), numbers=torch.arange(5))
    seen = []
    for index, piece in pairs.micro_batches(2):
        assert index.tolist() == piece.margin.long().tolist()
        for i, row in enumerate(piece.margin.long().tolist()):
            seen.append(row)
            for side, whole in zip((piece.chosen, piece.rejected), sequences, strict=True):
                assert side.ids[i][side.mask[i]].tolist() == whole.ids[row][whole.mask[row]].tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [Sequences, Rollout, Experience])
def test_to_moves_every_tensor_and_keeps_the_kind(kind):
    whole = experience()
    batch = kind(*(getattr(whole, f.name) for f in fields(kind)))
    moved = batch.to("meta")
    assert type(moved) is kind
    assert all(getattr(moved, f.name).device.type == "meta" for f in fields(kind))
    assert batch.ids.device.type == "cpu"


def test_to_moves_both_sides_of_a_preference_and_the_tensors_of_prompts():
    batch = experience()
    sequences = Sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask)
    pairs = Preferences(sequences, sequences, torch.zeros(5), torch.arange(5)).to("meta")
    assert {x.device.type for x in (pairs.chosen.ids, pairs.rejected.ids, pairs.margin)} == {"meta"}
    prompts = Prompts(batch.prompt_ids, batch.prompt_mask, ("a",) * 5, ({},) * 5).to("meta")
    assert {prompts.prompt_ids.device.type, prompts.prompt_mask.device.type} == {"meta"}
    assert prompts.texts == ("a",) * 5
