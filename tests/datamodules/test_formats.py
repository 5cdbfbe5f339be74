import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrlhf.datamodules.formats import Reading, read_rows
from lrlhf.errors import UserError
from tests.conftest import write_jsonl

DATA = Path(__file__).parents[3] / "shared" / "data"
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIR = {"instruction": "Add.", "input": "1 and 2", "output_1": "3", "output_2": "12"}
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
ANSWER = {"role": "assistant", "content": "see you"}
SIDES = {"chosen": [TALK[0], ANSWER], "rejected": [TALK[0], TALK[1]]}
TURNS = (("user", "hi"), ("assistant", "hello"), ("user", "bye"))


@pytest.fixture
def read(tmp_path):
    """Read records through a .jsonl file: the rows, and the number of ties."""

    def through_a_file(*records):
        ties: Counter[str] = Counter()
        rows = list(read_rows(write_jsonl(tmp_path / "rows.jsonl", list(records)), ties))
        return rows, sum(ties.values())

    return through_a_file


@pytest.fixture
def reason(tmp_path):
    """Why a record is refused, without the place, which must be row 1."""

    def of(record):
        path = write_jsonl(tmp_path / "rows.jsonl", [record])
        with pytest.raises(UserError) as error:
            list(read_rows(path))
        assert str(error.value).startswith(f"{path}, row 1: ")
        return str(error.value).removeprefix(f"{path}, row 1: ")

    return of


# Files


def save(path: Path, records: list[dict]) -> str:
    if path.suffix == ".jsonl":
        return write_jsonl(path, records)
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=4, ensure_ascii=False))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "records",
    [[ALPACA] * 3, [{**PAIR, "preference": 2}], [{"messages": [*TALK, ANSWER]}], [{"instruction": "Grüß 你好"}]],
    ids=["alpaca", "pairs", "messages", "unicode"],
)
def test_json_lines_and_parquet_say_the_same(tmp_path, ending, records):
    rows = list(read_rows(save(tmp_path / f"rows{ending}", records)))
    reference = list(read_rows(save(tmp_path / "reference.jsonl", records)))
    assert [(r.messages, r.responses) for r in rows] == [(r.messages, r.responses) for r in reference]
    assert [r.place for r in rows] == [f"{tmp_path}/rows{ending}, row {i + 1}" for i in range(len(records))]


def test_reading_is_lazy_so_that_a_late_fault_names_its_row(tmp_path):
    rows = read_rows(write_jsonl(tmp_path / "rows.jsonl", [ALPACA, ALPACA, {"output": "no instruction"}]))
    assert next(rows).instruction == "Add." == next(rows).instruction
    with pytest.raises(UserError, match="row 3: no instruction, prompt, messages or conversations column"):
        next(rows)


def test_a_hub_name_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(UserError, match="data set nobody/nothing is no local file and could not be loaded"):
        list(read_rows("nobody/nothing"))


# Demonstrations


def test_alpaca(read):
    (row,), _ = read(ALPACA)
    assert (row.instruction, row.input, row.responses) == ("Add.", "1 and 2", ("3",))
    assert row.messages == (("user", "Add.\n\n1 and 2"),)
    assert row.margin == 0


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(read, context):
    (row,), _ = read({"instruction": "Say hi.", "output": "hi", **context})
    assert (row.input, row.messages) == ("", (("user", "Say hi."),))


def test_a_prompt_alone_has_no_response_and_keeps_its_data_set(read):
    (row,), _ = read({"instruction": "Say hi.", "dataset": "vicuna"})
    assert (row.responses, row.dataset) == ((), "vicuna")


TURN = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("prompt", ["hi", TURN])
@pytest.mark.parametrize("turns", [lambda text: text, lambda text: [{"role": "assistant", "content": text}]])
def test_rewardbenchs_columns_with_the_subset_as_data_set(read, prompt, turns):
    models = {"chosen_model": "gpt-4", "rejected_model": "alpaca-7b"}
    record = {"id": 3, "prompt": prompt, "chosen": turns("good"), "rejected": turns("bad"), "subset": "alpacaeval-easy"}
    (row,), _ = read({**record, **models})
    assert (row.messages, row.responses, row.dataset) == ((("user", "hi"),), ("good", "bad"), "alpacaeval-easy")


def test_dataset_goes_before_subset(read):
    (row,), _ = read({"instruction": "Say hi.", "dataset": "vicuna", "subset": "easy"})
    assert row.dataset == "vicuna"


@pytest.mark.parametrize("column", ["output", "response", "completion"])
@pytest.mark.parametrize("prompt", ["instruction", "prompt", "input"])
def test_other_names_of_the_columns(read, prompt, column):
    (row,), _ = read({prompt: "Say hi.", column: "hi"})
    assert (row.instruction, row.responses) == ("Say hi.", ("hi",))


def test_messages_end_with_what_is_imitated(read):
    (row,), _ = read({"messages": [*TALK, ANSWER]})
    assert (row.messages, row.responses, row.instruction) == (TURNS, ("see you",), "bye")


def test_messages_that_end_with_the_user_are_a_prompt(read):
    (row,), _ = read({"messages": TALK})
    assert (row.messages, row.responses) == (TURNS, ())


def test_a_system_message_is_kept(read):
    (row,), _ = read({"messages": [{"role": "system", "content": "Be brief."}, *TALK]})
    assert row.messages == (("system", "Be brief."), *TURNS)


def test_sharegpt(read):
    said = [("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "see you")]
    (row,), _ = read({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert (row.messages, row.responses) == (TURNS, ("see you",))


def test_sharegpt_with_a_function_call(read):
    said = [("human", "1+1?"), ("function_call", "add(1,1)"), ("observation", "2"), ("gpt", "two")]
    (row,), _ = read({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert row.messages == (("user", "1+1?"), ("assistant", "add(1,1)"), ("tool", "2"))
    assert row.responses == ("two",)


# Pairs


@pytest.mark.parametrize("name", ["preference", "label"])
@pytest.mark.parametrize("verdict", [1, "1", 1.0])
def test_a_verdict_of_one_prefers_the_first(read, name, verdict):
    (row,), ties = read({**PAIR, name: verdict})
    assert (row.responses, ties) == (("3", "12"), 0)


@pytest.mark.parametrize("name", ["preference", "label"])
@pytest.mark.parametrize("verdict", [2, "2", 2.0])
def test_a_verdict_of_two_prefers_the_second(read, name, verdict):
    (row,), ties = read({**PAIR, name: verdict})
    assert (row.responses, ties) == (("12", "3"), 0)


@pytest.mark.parametrize("verdict", [0, 1.5, "0", "1.5", "tie"])
def test_a_tie_is_dropped_and_counted(read, verdict):
    rows, ties = read({**PAIR, "preference": verdict}, {**PAIR, "preference": 2}, {**PAIR, "preference": verdict})
    assert (len(rows), ties) == (1, 2)
    assert rows[0].place.endswith("row 2")


@pytest.mark.parametrize(
    ("words", "responses"),
    [
        ("a-is-better", ("x", "y")),
        ("a-is-slightly-better", ("x", "y")),
        ("b-is-better", ("y", "x")),
        ("b-is-slightly-better", ("y", "x")),
    ],
)
def test_verdicts_in_words(read, words, responses):
    (row,), _ = read({"prompt": "p", "completion_a": "x", "completion_b": "y", "preference": words})
    assert row.responses == responses


@pytest.mark.parametrize(
    ("votes", "responses"),
    [((1, 1, 2), ("3", "12")), ((2, 1, 2), ("12", "3")), ((0, 2, 2), ("12", "3")), ((2, 2, 2), ("12", "3"))],
)
def test_the_majority_of_annotators_decides(read, votes, responses):
    (row,), _ = read({**PAIR, **{f"annotator{i + 1}": vote for i, vote in enumerate(votes)}})
    assert row.responses == responses


@pytest.mark.parametrize("votes", [(0, 0, 1), (1, 2), (0, 1, 2), (0, 0, 0)])
def test_no_majority_is_a_tie(read, votes):
    assert read({**PAIR, **{f"annotator{i + 1}": vote for i, vote in enumerate(votes)}}) == ([], 1)


def test_chosen_and_rejected_need_no_verdict(read):
    (row,), _ = read({"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 0.5})
    assert (row.messages, row.responses, row.margin) == ((("user", "p"),), ("good", "bad"), 0.5)


def test_chosen_and_rejected_after_messages(read):
    (row,), _ = read({"messages": TALK, "chosen": "good", "rejected": "bad"})
    assert (row.messages, row.responses) == (TURNS, ("good", "bad"))


def test_chosen_and_rejected_as_lists_of_turns_give_their_last(read):
    sides = {name: [TALK[0], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (row,), _ = read({"prompt": "hi", **sides})
    assert (row.messages, row.responses) == ((("user", "hi"),), ("chosen", "rejected"))


def test_whole_dialogues(read):
    said = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    (row,), _ = read({"chosen": f"{said} see you", "rejected": f"{said} go away\n\nnow"})
    assert (row.messages, row.responses) == (TURNS, ("see you", "go away\n\nnow"))


def test_an_assistant_that_spoke_for_the_human_keeps_what_it_said(read):
    said = "\n\nHuman: hi\n\nAssistant:"
    (row,), _ = read({"chosen": f"{said} hello", "rejected": f"{said} a\n\nHuman: b\n\nAssistant: c"})
    assert row.messages == (("user", "hi"),)
    assert row.responses == ("hello", "a\n\nHuman: b\n\nAssistant: c")


def test_two_equal_dialogues_are_a_tie(read):
    said = "\n\nHuman: hi\n\nAssistant: hello"
    assert read({"chosen": said, "rejected": said}) == ([], 1)


HI = "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("a text", "expected an object with named columns, got str"),
        ({"instruction": ""}, "no instruction, prompt, messages or conversations column, or it is empty"),
        ({"instruction": 5}, "instruction must be text, got int"),
        ({**ALPACA, "output": None}, "output must be text, got NoneType"),
        ({**ALPACA, "input": {}, "prompt": 1, "instruction": None}, "prompt must be text, got int"),
        ({**PAIR, "preference": 3}, "preference must be 1 or 2 (0 or 1.5 for a tie), got 3"),
        ({**PAIR, "preference": None}, "preference must be 1 or 2 (0 or 1.5 for a tie), got None"),
        ({**PAIR, "preference": True}, "preference must be 1 or 2 (0 or 1.5 for a tie), got True"),
        ({**PAIR, "preference": [1]}, "preference must be 1 or 2 (0 or 1.5 for a tie), got [1]"),
        ({**PAIR, "annotator1": [1]}, "annotators' votes must be numbers, got [[1]]"),
        (PAIR, "a pair needs a preference (1 or 2)"),
        ({"instruction": "i", "output_1": "x", "preference": 1}, "a pair needs both output_1 and output_2"),
        ({"prompt": "p", "rejected": "x"}, "a pair needs both chosen and rejected"),
        ({"prompt": "p", "chosen": "x", "rejected": 1}, "rejected must be text, got int"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": "wide"}, "margin must be a number, got 'wide'"),
        ({"messages": []}, "messages must be a non-empty list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 of messages must have role and content as text"),
        ({"messages": [{"role": "poet", "content": "o"}]}, "turn 1 of messages has the unknown role 'poet'"),
        ({"messages": [ANSWER, ANSWER]}, "the turn before the response must be the user's or a tool's"),
        ({"conversations": [{"value": "c"}]}, "turn 1 of conversations must have from and value"),
        ({"chosen": HI + "a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, "must be one dialogue"),
        ({"chosen": HI + "a\n\nHuman: b\n\nAssistant: c", "rejected": HI + "d\n\nHuman: b\n\nAssistant: c"}, "must"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "must be one dialogue"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_reason(reason, record, words):
    assert words in reason(record)
    assert reason(record).endswith(".")


# Context is used, or its row is refused


@pytest.mark.parametrize(
    ("record", "messages", "responses"),
    [
        ({"prompt": [{"role": "system", "content": "S"}, *TALK]}, (("system", "S"), *TURNS), ()),
        ({"prompt": TALK, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]}, TURNS, ("see you", "no")),
        ({"prompt": TALK, "completion": [ANSWER]}, TURNS, ("see you",)),
        (
            {"chosen": [*TALK, ANSWER], "rejected": [*TALK, {**ANSWER, "content": "no"}]},
            TURNS,
            ("see you", "no"),
        ),
        (
            {"prompt": "bye", "chosen": [*TALK, ANSWER], "rejected": [*TALK, {**ANSWER, "content": "no"}]},
            TURNS,
            ("see you", "no"),
        ),
        (
            {"instruction": "bye", "output": "see you", "history": [["hi", "hello"]], "system": "S"},
            (("system", "S"), *TURNS),
            ("see you",),
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            (("system", "S"), ("user", "hi")),
            ("hello",),
        ),
        ({"question": "hi?", "answer": "hello", "context": "a door"}, (("user", "hi?\n\na door"),), ("hello",)),
        ({"query": "hi?", "response": "hello"}, (("user", "hi?"),), ("hello",)),
        ({"problem": "1+1", "solution": "2"}, (("user", "1+1"),), ("2",)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}]}, (("user", "hi"),), ()),
        ({"conversations": [{"role": "user", "content": "hi"}]}, (("user", "hi"),), ()),
        ({**ALPACA, "prompt": "### Instruction: Add. ### Input: 1 and 2"}, (("user", "Add.\n\n1 and 2"),), ("3",)),
        ({"messages": [TALK[0], ANSWER], "prompt": "hi", **SIDES}, (("user", "hi"),), ("see you", "hello")),
    ],
)  # fmt: skip
def test_no_turn_and_no_context_is_lost(read, record, messages, responses):
    (row,), _ = read(record)
    assert (row.messages, row.responses) == (messages, responses)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**ALPACA, "prompt": "quite another"}, "prompt could be context and has no place beside the others"),
        ({**ALPACA, "context": "a passage"}, "context could be context"),
        ({"messages": TALK, "instruction": "Be brief."}, "instruction could be context"),
        ({"messages": TALK, "tools": "[add]"}, "tools is no valid JSON"),
        ({"messages": TALK, "tools": ["add"]}, "tools must be a list of descriptions"),
        ({"messages": [{"role": "system", "content": "A"}, *TALK], "system": "B"}, "a system message must come first"),
        ({"instruction": "i", "history": "hello"}, "history must be a list of [question, answer] texts"),
        ({"prompt": "ho", **SIDES}, "are not those of the prompt"),
        ({"chosen": [*TALK, ANSWER], "rejected": [TALK[0], TALK[1]]}, "one conversation with two different last turns"),
        ({"prompt": "hi", "chosen": [TALK[0], TALK[0]], "rejected": [TALK[0], TALK[1]]}, "one turn of the assistant"),
        ({**ALPACA, "prompt": "this is another, and a 3"}, "prompt could be context"),
        ({"prompt": "p", "chosen": "x", "rejected": [ANSWER]}, "must both be texts, or both lists of turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "turn 2 of messages must have role and"),
        ({"text": "all in one"}, "text alone does not say where a response begins"),
        ({"prompt": "p", "completion": "c", "label": False}, "label judges one completion, which is no demonstration"),
        ({"instruction": "\ud800x", "output": "y"}, "half of a surrogate pair"),
        ({"instruction": "x", "output": "y\udfff"}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(reason, record, words):
    assert words in reason(record)


def test_a_tool_call_without_text_stays_what_it_is(read):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    (row,), _ = read({"messages": [TALK[0], call, {"role": "tool", "content": "5"}, ANSWER]})
    assert row.messages[1] == ("assistant", "", {"tool_calls": call["tool_calls"]})
    assert row.messages[2] == ("tool", "5")


def test_columns_that_were_not_used_are_named_once(tmp_path):
    said = []
    path = write_jsonl(tmp_path / "rows.jsonl", [{**ALPACA, "id": i, "kind": "sum", "empty": None} for i in range(3)])
    list(read_rows(path, say=said.append))
    assert said == [f"{path}: columns not used: id, kind"]


def test_columns_of_other_names_are_named_by_the_user(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"frage": "1+1?", "antwort": "2"}])
    (row,) = read_rows(path, reading=Reading(columns={"instruction": "frage", "output": "antwort"}))
    assert (row.instruction, row.responses) == ("1+1?", ("2",))
    with pytest.raises(UserError, match=r"data\.columns\.output: there is no column reply, only frage, antwort"):
        list(read_rows(path, reading=Reading(columns={"output": "reply"})))


# Verdicts


@pytest.mark.parametrize("name", ["preference", "label"])
@pytest.mark.parametrize(
    ("verdicts", "setting", "first", "ties", "told"),
    [
        ((0, 1, 0), None, ["3", "12", "3"], 0, "0 the first, 1 the second"),
        (("0", "1"), None, ["3", "12"], 0, "0 the first, 1 the second"),
        ((0, 1, 2), None, ["3", "12"], 1, "1 the first, 2 the second, 0 a tie"),
        ((0, 1, 2), "from_zero", ["3", "12"], 1, "0 the first, 1 the second"),
        ((0, 1), "from_one", ["3"], 1, "1 the first, 2 the second, 0 a tie"),
        ((0, 1, 1.5), None, ["3"], 2, "1 the first"),
        ((1, 2), None, ["3", "12"], 0, None),
        ((1, 1), "from_zero", ["12", "12"], 0, None),
    ],
)
def test_verdicts_are_read_over_the_whole_file_and_that_is_said(tmp_path, name, verdicts, setting, first, ties, told):
    said, counts = [], Counter()
    path = write_jsonl(tmp_path / "rows.jsonl", [{**PAIR, name: verdict} for verdict in verdicts])
    rows = list(read_rows(path, counts, Reading(verdicts=setting), say=said.append))
    assert ([row.responses[0] for row in rows], counts[path, "ties"]) == (first, ties)
    assert (told in said[0]) if told else not said


def test_scores_are_margins_when_asked(tmp_path):
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    path = write_jsonl(tmp_path / "rows.jsonl", [{**pair, "score_chosen": 8, "score_rejected": 6.5}])
    assert next(read_rows(path)).margin == 0
    assert next(read_rows(path, reading=Reading(margin_from_scores=True))).margin == 1.5
    path = write_jsonl(tmp_path / "rows.jsonl", [pair])
    with pytest.raises(UserError, match="data.margin_from_scores needs numbers"):
        next(read_rows(path, reading=Reading(margin_from_scores=True)))


def test_of_answers_that_are_judged_the_good_ones_are_taken_when_asked(tmp_path):
    rows = [{"prompt": "p", "completion": c, "label": good} for c, good in (("a", True), ("b", False))]
    path, counts = write_jsonl(tmp_path / "rows.jsonl", rows), Counter()
    (row,) = read_rows(path, counts, Reading(good_only=True))
    assert row.responses == ("a",)
    assert counts == {(path, "responses judged bad"): 1}


def test_equal_responses_are_dropped_and_counted(tmp_path):
    path, counts = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}]), Counter()
    assert list(read_rows(path, counts)) == []
    assert counts == {(path, "pairs of equal responses"): 1}


# The real files: the numbers of rows and of ties, counted once more with pandas


def table(name: str) -> pd.DataFrame:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True)


def read_real(name: str) -> tuple[list, int]:
    ties: Counter[str] = Counter()
    return list(read_rows(str(DATA / name), ties)), sum(ties.values())


@pytest.mark.parametrize(
    "name",
    ["alpaca_52k.parquet", "alpaca_gpt4_en_999.jsonl", "dolly_2k.jsonl", "lima_1k.jsonl", "code_alpaca_2k.jsonl"],
)
def test_real_demonstrations(name):
    frame = table(f"sft/{name}")
    rows, _ = read_real(f"sft/{name}")
    columns = [[row.instruction for row in rows], [row.input for row in rows], [row.responses[0] for row in rows]]
    assert columns == [frame[column].tolist() for column in ("instruction", "input", "output")]


@pytest.mark.parametrize("name", ["chat_362.jsonl", "sharegpt_sample.jsonl"])
def test_real_chats(name):
    frame = table(f"sft/{name}")
    rows, _ = read_real(f"sft/{name}")
    texts = [[turn["content"] for turn in turns] for turns in frame.messages]
    assert [[content for _, content in row.messages] + [*row.responses] for row in rows] == texts


def test_real_pairs_with_a_preference():
    frame = table("preference/alpaca_eval_pairs_short_6k.jsonl")
    rows, ties = read_real("preference/alpaca_eval_pairs_short_6k.jsonl")
    first = frame.output_1.where(frame.preference == 1, frame.output_2)
    assert ([row.responses[0] for row in rows], ties) == (first.tolist(), 0)
    assert {row.responses[0] for row in rows} != {row.responses[1] for row in rows}


def test_real_pairs_with_a_label():
    frame = table("preference/llmbar_885.jsonl")
    rows, ties = read_real("preference/llmbar_885.jsonl")
    frame = frame[frame.output_1 != frame.output_2]
    assert (len(rows), ties) == (len(frame), 1)
    assert [row.instruction for row in rows] == frame.input.tolist()
    assert [row.responses[0] for row in rows] == frame.output_1.where(frame.label == 1, frame.output_2).tolist()


def test_real_pairs_with_three_annotators():
    frame = table("preference/pandalm_human_999.jsonl")
    rows, ties = read_real("preference/pandalm_human_999.jsonl")
    votes = frame[["annotator1", "annotator2", "annotator3"]]
    ones, twos = (votes == 1).sum(axis=1) >= 2, (votes == 2).sum(axis=1) >= 2
    assert (len(rows), ties) == ((ones | twos).sum(), (~(ones | twos)).sum())
    assert [row.responses[0] for row in rows] == frame.output_1.where(ones, frame.output_2)[ones | twos].tolist()


def test_real_pairs_with_a_verdict_in_words():
    frame = table("preference/tulu1_human_1150.jsonl")
    rows, ties = read_real("preference/tulu1_human_1150.jsonl")
    equal = frame.completion_a == frame.completion_b
    assert ties == ((frame.preference == "tie") | equal).sum()
    decided = frame[(frame.preference != "tie") & ~equal]
    first = decided.completion_a.where(decided.preference.str.startswith("a"), decided.completion_b)
    assert [row.responses[0] for row in rows] == first.tolist()


def test_real_chosen_and_rejected_after_messages():
    frame = table("preference/dpo_en_300.jsonl")
    rows, ties = read_real("preference/dpo_en_300.jsonl")
    assert ties == 0
    assert [row.responses for row in rows] == list(zip(frame.chosen, frame.rejected, strict=True))
    assert [len(row.messages) for row in rows] == frame.messages.map(len).tolist()


def test_real_whole_dialogues():
    frame = table("preference/hh_harmless_test_2312.parquet")
    rows, ties = read_real("preference/hh_harmless_test_2312.parquet")
    equal = (frame.chosen == frame.rejected).sum()
    assert (len(rows), ties) == (len(frame) - equal, equal)
    for row, chosen, rejected in zip(rows, frame.chosen, frame.rejected, strict=True):
        words = [" ".join(text.split()) for text in (chosen, rejected, *row.responses)]
        assert words[0].endswith(words[2])
        assert words[1].endswith(words[3])
        assert words[0] == " ".join(
            word
            for who, what in [*row.messages, ("assistant", row.responses[0])]
            for word in ({"user": "Human:", "assistant": "Assistant:"}[who], *what.split())
        )
