import torch

from lrlhf.datamodules.collate import Tokenized, collate_preferences, collate_prompts, collate_sequences, pad

ROWS = [
    Tokenized([5, 6, 7], ([1, 2], [3]), 0.5, "a b c", {"instruction": "a", "dataset": ""}),
    Tokenized([8], ([4], [9, 9, 2]), 0.0, "d", {"instruction": "d", "dataset": "x"}),
]


def test_prompts_are_padded_on_the_left():
    ids, mask = pad([[5, 6, 7], [8]], left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_responses_are_padded_on_the_right():
    ids, mask = pad([[1, 2], [4]], left=False)
    assert ids.tolist() == [[1, 2], [4, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_a_token_that_is_the_pad_id_counts():
    _, mask = pad([[0, 0], [0]], left=False)
    assert mask.tolist() == [[True, True], [True, False]]


def test_types_are_what_embeddings_and_masks_need():
    ids, mask = pad([[1]], left=True)
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


def test_sequences_hold_the_first_response():
    batch = collate_sequences(ROWS)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.response_ids.tolist() == [[1, 2], [4, 0]]
    assert batch.response_mask.sum(-1).tolist() == [2, 1]


def test_preferences_hold_chosen_rejected_and_margin():
    batch = collate_preferences(ROWS)
    assert batch.chosen.response_ids.tolist() == [[1, 2], [4, 0]]
    assert batch.rejected.response_ids.tolist() == [[3, 0, 0], [9, 9, 2]]
    assert torch.equal(batch.chosen.prompt_ids, batch.rejected.prompt_ids)
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.margin.dtype == torch.float32


def test_prompts_keep_their_texts_and_sources():
    batch = collate_prompts(ROWS)
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.texts == ("a b c", "d")
    assert batch.sources == ({"instruction": "a", "dataset": ""}, {"instruction": "d", "dataset": "x"})


def test_the_length_of_a_row_is_that_of_its_longest_response():
    assert [row.length for row in ROWS] == [5, 4]
    assert Tokenized([1, 2], (), 0.0, "", {}).length == 2
