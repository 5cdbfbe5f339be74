import json
import random
import shutil
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lrlhf import AlpacaDataModule, ChatTemplate, TextTemplate
from lrlhf.datamodules import splits
from lrlhf.datamodules.formats import Row, read_rows
from lrlhf.errors import UserError
from lrlhf.types import Preferences, Prompts, Sequences
from tests.conftest import write_jsonl

EOS = 2
BARE = TextTemplate("{instruction}")


def load(stage: str = "fit", world: tuple[int, int] | None = None, **settings) -> AlpacaDataModule:
    """A data module after setup, as (rank, world size) sees it."""
    data = AlpacaDataModule(
        template=settings.pop("template", BARE), batch_size=settings.pop("batch_size", 8), **settings
    )
    if world is not None:
        data.trainer = SimpleNamespace(global_rank=world[0], world_size=world[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup(stage)
    return data


def text(ids: torch.Tensor, mask: torch.Tensor, tokenizer) -> list[str]:
    return [tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def save(tmp_path):
    return lambda rows, name="rows.jsonl": write_jsonl(tmp_path / name, rows)


# Rows to tokens


def test_a_demonstration_becomes_prompt_response_and_end_of_sequence(tiny_llama, tokenizer, save):
    data = load(train=save([{"instruction": "sun", "output": "tea"}]), tokenizer=tiny_llama)
    (row,) = data.rows["train"]
    assert tokenizer.decode(row.prompt) == "sun"
    assert (tokenizer.decode(row.responses[0][:-1]), row.responses[0][-1]) == ("tea", EOS)
    assert len(row.responses[0]) == 4  # one token a byte, and the end


def test_both_responses_of_a_pair_end(tiny_llama, data_files):
    data = load(train=data_files["pairs"], tokenizer=tiny_llama, task="preference")
    assert all(side[-1] == EOS and EOS not in side[:-1] for row in data.rows["train"] for side in row.responses)


@pytest.mark.parametrize(
    ("task", "name", "kind"),
    [("sft", "sft", Sequences), ("preference", "pairs", Preferences), ("prompts", "prompts", Prompts)],
)
def test_every_task_has_its_batch(tiny_llama, data_files, task, name, kind):
    data = load(train=data_files[name], val=data_files[name], tokenizer=tiny_llama, task=task)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        assert {type(batch) for batch in batches} == {kind}
        assert sum(map(len, batches)) == 40


def test_a_batch_holds_the_rows_of_the_file(tiny_llama, data_files, tokenizer):
    data = load("validate", val=data_files["pairs"], tokenizer=tiny_llama, task="preference", val_batch_size=40)
    (batch,) = data.val_dataloader()
    rows = list(read_rows(data_files["pairs"]))
    assert text(batch.chosen.prompt_ids, batch.chosen.prompt_mask, tokenizer) == [row.instruction for row in rows]
    for i, side in enumerate((batch.chosen, batch.rejected)):
        assert text(side.response_ids, side.response_mask, tokenizer) == [row.responses[i] + "</s>" for row in rows]


def test_chat_prompts_are_tokenised_as_the_tokenizer_itself_would(tiny_llama, tokenizer, save):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    path = save([{"messages": [*turns, {"role": "assistant", "content": "c"}]}])
    (row,) = load(train=path, tokenizer=tiny_llama, template=ChatTemplate()).rows["train"]
    assert row.prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert row.responses == ([*tokenizer("c")["input_ids"], EOS],)


@pytest.mark.parametrize(("template", "starts"), [(BARE, [1]), (ChatTemplate(), [])])
def test_the_chat_template_alone_writes_begin_of_sequence_tokens(tiny_llama, tmp_path, save, template, starts):
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    path = save([{"instruction": "sun", "output": "tea"}])
    (row,) = load(train=path, tokenizer=str(folder), template=template).rows["train"]
    assert [token for token in row.prompt if token == 1] == starts == row.prompt[: len(starts)]
    assert 1 not in row.responses[0]


# What is left out


def test_long_rows_are_dropped_and_counted_never_cut(tiny_llama, save):
    sizes = [(10, 4), (11, 4), (10, 5), (11, 5), (3, 1)]
    path = save([{"instruction": "i" * p, "output": "o" * r} for p, r in sizes])
    data = load(train=path, tokenizer=tiny_llama, max_prompt_tokens=10, max_response_tokens=5)
    assert [(len(row.prompt), len(row.responses[0])) for row in data.rows["train"]] == [(10, 5), (3, 2)]
    assert data.dropped == {"prompts over 10 tokens": 2, "responses over 5 tokens": 1}


def test_one_long_response_drops_the_pair(tiny_llama, save):
    pair = {"instruction": "i", "output_1": "o", "output_2": "o" * 9, "preference": 1}
    path = save([pair, {**pair, "preference": 2}, {**pair, "output_2": "p"}])
    data = load(train=path, tokenizer=tiny_llama, task="preference", max_response_tokens=5)
    assert len(data.rows["train"]) == 1
    assert data.dropped == {"responses over 5 tokens": 2}


def test_a_prompt_to_answer_may_have_had_a_long_response(tiny_llama, save):
    path = save([{"instruction": "i", "output": "o" * 99}])
    assert (
        len(load(train=path, tokenizer=tiny_llama, task="prompts", max_response_tokens=5, batch_size=1).rows["train"])
        == 1
    )


def test_ties_are_counted_over_all_files(tiny_llama, save):
    pair = {"instruction": "i", "output_1": "x", "output_2": "y"}
    first = save([{**pair, "preference": p} for p in (0, 1, 0, 2)], "first.jsonl")
    second = save([{**pair, "preference": p} for p in (0, 2)], "second.jsonl")
    third = save([{**pair, "preference": p} for p in (2, 0)], "third.jsonl")
    data = load(train=[first, second], val=third, tokenizer=tiny_llama, task="preference")
    assert (len(data.rows["train"]), len(data.rows["val"]), data.dropped) == (3, 1, {"ties": 4})


def test_ties_of_one_file_are_counted_once_however_many_views_it_has(tiny_llama, save):
    pair = {"instruction": "i", "output_1": "x", "output_2": "y"}
    path = save([{**pair, "instruction": f"i{i}", "preference": i % 3} for i in range(9)])
    splits = {"splits": {"val": 2, "train": None}, "train_split": "train", "val_split": "val"}
    assert load(train=path, tokenizer=tiny_llama, task="preference", **splits).dropped == {"ties": 3}


def test_what_was_left_out_is_told(tiny_llama, save):
    data = AlpacaDataModule(
        train=save([{"instruction": "i" * n, "output": "o"} for n in (1, 30)]),
        tokenizer=tiny_llama,
        template=BARE,
        max_prompt_tokens=20,
    )
    with pytest.warns(UserWarning, match="data: left out 1 prompts over 20 tokens"):
        data.setup("fit")


def test_no_row_left_is_refused_with_the_counts(tiny_llama, data_files):
    with pytest.raises(UserError, match=r"no row is left to train on \(40 prompts over 2 tokens\)"):
        load(train=data_files["sft"], tokenizer=tiny_llama, max_prompt_tokens=2)


def test_limits_keep_the_first_rows(tiny_llama, data_files):
    settings = {"train": data_files["sft"], "val": data_files["sft"], "tokenizer": tiny_llama}
    every = load(**settings)
    few = load(**settings, limit=5, val_limit=3)
    assert (few.rows["train"][:], few.rows["val"][:]) == (every.rows["train"][:5], every.rows["val"][:3])


def test_several_files_follow_each_other(tiny_llama, data_files, save):
    more = save([{"instruction": "new", "output": "o"}])
    data = load(train=[data_files["sft"], more], tokenizer=tiny_llama)
    assert [row.text for row in data.rows["train"]][38:] == ["song tea 38", "lake book 39", "new"]
    assert len(data.rows["train"]) == 41


# Splits


def row(name: object, place: int) -> Row:
    return Row((("user", str(name)),), str(name), "", ("o",), 0.0, f"file, row {place}")


def take_split(rows: list[Row], sizes: dict, name: str) -> list[Row]:
    keys = np.array([splits.split_key(row) for row in rows], dtype=np.uint64)
    return [rows[place] for place in splits.take_split(keys, sizes, name)]


ROWS = [row(i, i) for i in range(100)]
SPLITS = {"a": 10, "b": 30, "rest": None}


def names(rows) -> list[str]:
    return [row.instruction for row in rows]


def test_splits_have_their_sizes_are_disjoint_and_hold_everything():
    parts = [names(take_split(ROWS, SPLITS, name)) for name in SPLITS]
    assert [len(part) for part in parts] == [10, 30, 60]
    assert sorted(sum(parts, [])) == sorted(names(ROWS))


def test_splits_do_not_take_the_order_of_the_file():
    assert set(names(take_split(ROWS, SPLITS, "a"))) != set(names(ROWS[:10]))


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_stable_under_shuffling_the_file(seed):
    shuffled = random.Random(seed).sample(range(100), 100)
    moved = [row(name, place) for place, name in enumerate(shuffled)]
    for name in SPLITS:
        assert names(take_split(moved, SPLITS, name)) == names(take_split(ROWS, SPLITS, name))


def test_the_rest_may_stand_anywhere():
    splits = {"a": 10, "rest": None, "b": 30}
    parts = {name: names(take_split(ROWS, splits, name)) for name in splits}
    assert {name: len(part) for name, part in parts.items()} == {"a": 10, "rest": 60, "b": 30}
    assert len(set(sum(parts.values(), []))) == 100


def test_without_a_rest_some_rows_are_in_no_split():
    assert [len(take_split(ROWS, {"a": 10, "b": 30}, name)) for name in "ab"] == [10, 30]


@pytest.mark.parametrize("copies", [2, 7])
def test_rows_of_one_prompt_stay_in_one_split(copies):
    rows = [row(i % (100 // copies), i) for i in range(100)]
    parts = [set(names(take_split(rows, SPLITS, name))) for name in SPLITS]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert sum(len(take_split(rows, SPLITS, name)) for name in SPLITS) == 100
    assert 10 <= len(take_split(rows, SPLITS, "a")) < 10 + copies


def test_more_rows_do_not_scatter_a_split():
    """The prompts with the smallest hashes stay in the first split unless smaller ones arrive."""
    before = set(names(take_split(ROWS, {"a": 10, "rest": None}, "a")))
    after = set(names(take_split([*ROWS, row("one more", 100)], {"a": 10, "rest": None}, "a")))
    assert len(before & after) >= 9


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"a": 60, "b": 50}, "asks for 110 rows, data.train has 100"),
        ({"a": None, "b": None}, "at most one may be null"),
        ({"a": 0, "b": None}, "sizes must be at least 1"),
        ({"b": 100, "a": None}, "none is left for 'a'"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(splits, words):
    with pytest.raises(UserError, match=words):
        take_split(ROWS, splits, "a")


def test_the_data_module_trains_on_one_split_and_validates_on_another(tiny_llama, data_files):
    settings = {"train": data_files["sft"], "tokenizer": tiny_llama, "splits": {"held_out": 10, "main": None}}
    data = load(**settings, train_split="main", val_split="held_out")
    train, val = ([row.text for row in data.rows[name]] for name in ("train", "val"))
    assert (len(train), len(val)) == (30, 10)
    assert not set(train) & set(val)
    assert [row.text for row in load("test", **settings, train_split="main", val_split="held_out").rows["test"]] == val


@pytest.mark.parametrize(
    "settings",
    [
        {"val_split": "a"},
        {"train_split": "a", "val_split": "a"},
        {"train_split": "b"},
        {"splits": None, "train_split": "a"},
    ],
)
def test_validating_on_training_rows_or_on_an_unknown_split_is_refused(settings):
    with pytest.raises(UserError, match="data"):
        AlpacaDataModule(**{"splits": {"a": 10, "rest": None}, **settings})


# Views


def test_predict_gives_prompts_even_where_rows_have_no_output(tiny_llama, data_files):
    data = load("predict", val=data_files["prompts"], tokenizer=tiny_llama)
    batches = list(data.predict_dataloader())
    assert {type(batch) for batch in batches} == {Prompts}
    wanted = [row.instruction for row in read_rows(data_files["prompts"])]
    assert [source["instruction"] for batch in batches for source in batch.sources] == wanted
    assert [text for batch in batches for text in batch.texts] == wanted


def test_predict_of_a_reward_model_gives_pairs(tiny_llama, data_files):
    data = load("predict", predict=data_files["pairs"], tokenizer=tiny_llama, task="preference")
    assert {type(batch) for batch in data.predict_dataloader()} == {Preferences}


def test_each_view_has_its_own_files(tiny_llama, save):
    views = ("train", "val", "test", "predict")
    files = {name: save([{"instruction": name, "output": "o"}], f"{name}.jsonl") for name in views}
    data = load(**files, tokenizer=tiny_llama)
    for stage in ("test", "predict"):
        data.setup(stage)
    assert {name: [row.text for row in rows] for name, rows in data.rows.items()} == {name: [name] for name in files}


def test_no_validation_rows_no_loader(tiny_llama, data_files):
    assert load(train=data_files["sft"], tokenizer=tiny_llama).val_dataloader() == []


def test_validation_keeps_the_order_of_the_file(tiny_llama, data_files):
    data = load("validate", val=data_files["prompts"], tokenizer=tiny_llama, task="prompts", val_batch_size=7)
    texts = [text for batch in data.val_dataloader() for text in batch.texts]
    assert texts == [row.instruction for row in read_rows(data_files["prompts"])]


# Batches of several processes


@pytest.mark.parametrize("task", ["prompts", "sft"])
def test_two_processes_share_out_the_batches_of_one(tiny_llama, data_files, tokenizer, task):
    settings = {"train": data_files["sft"], "tokenizer": tiny_llama, "task": task, "batch_size": 8}

    def batches(rank: int, world: int) -> list[list[str]]:
        loader = load(**settings, world=(rank, world)).train_dataloader()
        loader.batch_sampler.set_epoch(3)
        return [text(batch.prompt_ids, batch.prompt_mask, tokenizer) for batch in loader]

    one, first, second = batches(0, 1), batches(0, 2), batches(1, 2)
    assert [len(batch) for batch in first + second] == [4] * 10
    assert [Counter(a + b) for a, b in zip(first, second, strict=True)] == [Counter(batch) for batch in one]
    assert Counter(sum(one, [])) == Counter(row.instruction for row in read_rows(data_files["sft"]))


def test_a_batch_that_does_not_divide_among_processes_is_refused(tiny_llama, data_files):
    with pytest.raises(UserError, match="data.batch_size=9 does not divide among 2 processes"):
        load(train=data_files["sft"], tokenizer=tiny_llama, batch_size=9, world=(0, 2)).train_dataloader()


def test_ppo_gets_full_batches_only(tiny_llama, data_files):
    data = load(train=data_files["prompts"], tokenizer=tiny_llama, task="prompts", batch_size=16)
    assert [len(batch) for batch in data.train_dataloader()] == [16, 16]


def test_a_batch_of_more_prompts_than_there_are_is_refused(tiny_llama, data_files):
    data = load(train=data_files["prompts"], tokenizer=tiny_llama, task="prompts", batch_size=41)
    with pytest.raises(UserError, match="data.batch_size=41 is more than the 40 prompts"):
        data.train_dataloader()


# Rows that cannot be used, or hardly


def test_a_response_that_spells_a_special_token_is_text(tiny_llama, tokenizer, save):
    (row,) = load(train=save([{"instruction": "i", "output": "a</s>b"}]), tokenizer=tiny_llama).rows["train"]
    assert row.responses[0].count(EOS) == 1
    assert tokenizer.decode(row.responses[0][:-1]) == "a</s>b"


@pytest.mark.parametrize("bad", [{"output": "alone"}, {"instruction": 5, "output": "x"}, "no object", "{oops"])
def test_a_bad_row_stops_or_is_skipped_counted_and_written_down(tiny_llama, tmp_path, bad):
    good = json.dumps({"instruction": "i", "output": "x"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, bad if bad == "{oops" else json.dumps(bad), good + "\n"]))
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: "):
        load(train=str(path), tokenizer=tiny_llama)
    data = AlpacaDataModule(train=str(path), tokenizer=tiny_llama, template=BARE, batch_size=2, on_bad_row="skip")
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, default_root_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="left out 1 bad rows"):
        data.setup("fit")
    assert len(data.rows["train"]) == 2
    (written,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert written["row"] == f"{path}, row 2"
    assert written["reason"]


def test_a_row_that_the_template_refuses_is_skipped_too(tiny_llama, save):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = save([{"messages": turns, "output": "d"}, {"instruction": "i", "output": "x"}])
    assert load(train=path, tokenizer=tiny_llama, on_bad_row="skip").dropped == {"bad rows": 1}


def test_empty_outputs_are_left_out_and_odd_rows_are_told(tiny_llama, save, caplog):
    rows = [("i", " "), ("i", "x"), ("i", "x"), ("echo", "echo")]
    path = save([{"instruction": instruction, "output": output} for instruction, output in rows])
    with caplog.at_level("INFO"):
        data = load(train=path, tokenizer=tiny_llama)
    assert (len(data.rows["train"]), data.dropped) == (3, {"empty outputs": 1})
    assert f"data: {path}: kept 1 rows twice, 1 responses that repeat the prompt" in caplog.text


def test_pairs_scored_against_their_verdict_are_told(tiny_llama, save, caplog):
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    path = save([{**pair, "score_chosen": a, "score_rejected": b} for a, b in ((2, 1), (1, 2))])
    with caplog.at_level("INFO"):
        data = load(train=path, tokenizer=tiny_llama, task="preference", margin_from_scores=True)
    assert [row.margin for row in data.rows["train"]] == [1.0, -1.0]
    assert "1 pairs scored against" in caplog.text


def test_splits_of_earlier_runs_stay_what_they_were():
    """The order depends on the hash of ("user", text) turns, whatever else a turn can hold today."""
    rows = [Row((("user", f"prompt {i}"),), f"prompt {i}", "", (), 0.0, f"row {i}") for i in range(12)]
    assert [row.place for row in take_split(rows, {"a": 5, "b": None}, "a")] == [
        "row 10",
        "row 6",
        "row 2",
        "row 0",
        "row 7",
    ]


# Conversations

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "sun"},
    {"role": "assistant", "content": "rain"},
    {"role": "user", "content": "tea"},
    {"role": "assistant", "content": "cat"},
]


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("last", [("<system>be brief\n<user>sun\n<assistant>rain\n<user>tea\n<assistant>", "cat</s>")]),
        (
            "all",
            [
                ("<system>be brief\n<user>sun\n<assistant>", "rain</s>"),
                ("<system>be brief\n<user>sun\n<assistant>rain\n<user>tea\n<assistant>", "cat</s>"),
            ],
        ),
    ],
)
def test_sft_trains_the_last_turn_or_each_behind_the_turns_before_it(tiny_llama, tokenizer, save, train_on, wanted):
    data = load(train=save([{"messages": TALK}]), tokenizer=tiny_llama, template=ChatTemplate(), train_on=train_on)
    found = [(tokenizer.decode(row.prompt), tokenizer.decode(row.responses[0])) for row in data.rows["train"]]
    assert found == wanted
    assert [row.number for row in data.rows["train"]] == list(range(len(wanted)))


def test_a_turn_that_calls_a_tool_is_context_and_its_result_too(tiny_llama, tokenizer, save):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    talk = [*TALK[:2], call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]
    data = load(train=save([{"messages": talk}]), tokenizer=tiny_llama, template=ChatTemplate(), train_on="all")
    (row,) = data.rows["train"]
    assert tokenizer.decode(row.prompt).endswith("<tool>3\n<assistant>")
    assert tokenizer.decode(row.responses[0]) == "three</s>"


def test_tools_reach_the_template_and_one_without_a_place_for_them_refuses_the_row(tiny_llama, tmp_path, save):
    rows = save([{"messages": TALK, "tools": [{"name": "add"}]}])
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: the chat template .* says nothing of tools"):
        load(train=rows, tokenizer=tiny_llama, template=ChatTemplate())
    shutil.copytree(tiny_llama, tmp_path / "able")
    able = AutoTokenizer.from_pretrained(tmp_path / "able")
    able.chat_template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + able.chat_template
    able.save_pretrained(tmp_path / "able")
    data = load(train=rows, tokenizer=str(tmp_path / "able"), template=ChatTemplate())
    assert able.decode(data.rows["train"][0].prompt).startswith("[add]<system>")


def test_pairs_and_prompts_take_conversations_as_prompts(tiny_llama, tokenizer, save):
    pair = {"chosen": TALK, "rejected": [*TALK[:4], {"role": "assistant", "content": "dog"}]}
    before = "<system>be brief\n<user>sun\n<assistant>rain\n<user>tea\n<assistant>"
    pairs = load(train=save([pair]), task="preference", tokenizer=tiny_llama, template=ChatTemplate())
    (row,) = pairs.rows["train"]
    assert [tokenizer.decode(ids) for ids in (row.prompt, *row.responses)] == [before, "cat</s>", "dog</s>"]
    prompts = load(
        train=save([{"messages": TALK}], "prompts.jsonl"), task="prompts", tokenizer=tiny_llama, template=ChatTemplate()
    )
    assert tokenizer.decode(prompts.rows["train"][0].prompt) == before


def test_all_turns_are_for_sft(tiny_llama, save):
    with pytest.raises(UserError, match="data.train_on=all is for SFT"):
        load(train=save([{"messages": TALK}]), task="prompts", tokenizer=tiny_llama, train_on="all")
