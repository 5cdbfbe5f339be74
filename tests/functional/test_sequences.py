import pytest
import torch

from lrlhf.functional import append_end, last_true, position_ids, response_mask, shared_prefix

EOS = 2
T, F = True, False


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 6, EOS, 0], [T, T, T, F]),
        ([5, EOS, EOS, EOS], [T, T, F, F]),  # padded with EOS: the first one counts, the rest is padding
        ([EOS, 5, 6, 7], [T, F, F, F]),
        ([5, 6, 7, 8], [T, T, T, T]),
        ([5, 6, 7, EOS], [T, T, T, T]),
        ([0, 0, EOS, 0], [T, T, T, F]),  # a pad id that was sampled is a token like any other
        ([5, 9, 6, EOS], [T, T, F, F]),  # another stop token
    ],
)
def test_a_response_ends_with_its_first_stop_token(tokens, expected):
    assert response_mask(torch.tensor([tokens]), torch.tensor([EOS, 9])).tolist() == [expected]


def test_rows_end_independently():
    tokens = torch.tensor([[EOS, 5, 6], [5, 6, EOS], [5, 6, 7]])
    assert response_mask(tokens, torch.tensor([EOS])).sum(-1).tolist() == [1, 3, 3]


def test_without_stop_tokens_a_response_never_ends():
    assert response_mask(torch.tensor([[1, 2, 3]]), torch.tensor([], dtype=torch.long)).all()


def test_the_last_true_position_is_marked_and_a_row_without_one_stays_false():
    mask = torch.tensor([[T, T, F, F], [T, T, T, T], [T, F, F, F], [F, F, F, F]])
    expected = [[F, T, F, F], [F, F, F, T], [T, F, F, F], [F, F, F, F]]
    assert last_true(mask).tolist() == expected


def test_positions_count_from_the_first_true_token():
    mask = torch.tensor([[F, F, T, T, T], [T, T, T, T, T], [F, F, F, F, T]])
    positions = position_ids(mask)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


def test_left_padding_leaves_the_positions_of_tokens_alone():
    mask = torch.tensor([[T, T, T]])
    padded = torch.nn.functional.pad(mask, (4, 0))
    assert torch.equal(position_ids(padded)[:, 4:], position_ids(mask))


def test_the_end_is_appended_to_what_was_cut_off_and_to_nothing_else():
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [5, 6, 0, 0], [2, 0, 0, 0], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    ended, ended_mask = append_end(tokens, mask, torch.tensor([2, 3]))
    assert [row[keep].tolist() for row, keep in zip(ended, ended_mask, strict=True)] == [
        [5, 2], [5, 6, 7, 8, 2], [5, 6, 2], [2], [2]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], 3),
        ([[1, 2, 3, 4], [1, 2, 9]], 2),
        ([[1, 2, 3, 4], [1, 2, 3]], 2),
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[7], [7]], 0),
        ([[1, 2, 3]], 2),
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]], 3),
    ],
)
def test_shared_prefix_counts_common_first_tokens_and_leaves_each_row_one(rows, expected):
    width = 2 + max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    assert shared_prefix(ids, ids != 0) == expected
