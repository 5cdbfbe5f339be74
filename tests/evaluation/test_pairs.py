"""AlpacaEval's files: what is read, paired and refused, with the place."""

import json

import pytest

from lrlhf.errors import UserError
from lrlhf.evaluation.pairs import Annotation, Output, Pair, pair_up, read_annotations, read_outputs
from lrlhf.files import write_json


def write(path, rows) -> str:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(path)


def test_outputs_are_read_with_generator_and_dataset_and_the_file_name_stands_in(tmp_path):
    rows = [
        {"instruction": "a", "output": "1", "generator": "gpt", "dataset": "koala"},
        {"instruction": "b", "output": ""},
    ]
    source = write(tmp_path / "mine.json", rows)
    assert read_outputs(source) == [Output("a", "1", "gpt", "koala"), Output("b", "", "mine", "")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"output": "x"}]', "row 1: expected a text under 'instruction'; it has output"),
        ('[{"instruction": "a", "output": null}]', "row 1: expected a text under 'output'"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}]', "row 2: expected a text"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
        ("[1]", "row 1: expected keys and values, got int"),
        ("[{", "not valid JSON"),
    ],
)
def test_an_outputs_file_that_cannot_be_used_is_refused_with_its_place(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read_outputs(write(tmp_path / "o.json", text))
    assert "o.json" in str(caught.value)


def test_a_line_of_jsonl_that_is_no_json_is_named(tmp_path):
    with pytest.raises(UserError, match="row 2: not valid JSON"):
        read_outputs(write(tmp_path / "o.jsonl", '{"instruction": "a", "output": "b"}\n{"instruc\n'))


def test_two_systems_with_different_prompts_are_refused():
    with pytest.raises(UserError, match=r"different prompts: 1 of 2 are not in the model's outputs, the first 'b'"):
        pair_up([Output("a", "1", "r"), Output("b", "2", "r")], [Output("a", "1", "m")])
    with pytest.raises(UserError, match="1 of 1 are not in the reference's outputs, the first 'c'"):
        pair_up([Output("a", "1", "r")], [Output("c", "1", "m")])


def test_a_repeated_instruction_is_paired_in_its_order():
    reference = [Output("a", "r1", "r"), Output("b", "rb", "r"), Output("a", "r2", "r")]
    model = [Output("a", "m1", "m"), Output("a", "m2", "m"), Output("b", "mb", "m")]
    pairs = pair_up(reference, model)
    assert [(p.instruction, p.output_1, p.output_2) for p in pairs] == [
        ("a", "r1", "m1"),
        ("a", "r2", "m2"),
        ("b", "rb", "mb"),
    ]
    assert {(p.generator_1, p.generator_2) for p in pairs} == {("r", "m")}


def test_annotations_come_back_as_they_were_written(tmp_path):
    pair = Pair("a", "1", "2", "r", "m")
    rows = [Annotation(**vars(pair), annotator="j", preference=1.25), Annotation(**vars(pair), annotator="j")]
    write_json(tmp_path / "annotations.json", rows)
    assert read_annotations(str(tmp_path / "annotations.json")) == rows
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("preference", [3, "2", -1, 0.5])
def test_a_preference_outside_its_range_is_refused(tmp_path, preference):
    row = {"instruction": "a", "output_1": "1", "output_2": "2", "preference": preference}
    with pytest.raises(UserError, match="row 1: expected a preference from 1 to 2"):
        read_annotations(write(tmp_path / "a.json", [row]))


def test_alpaca_evals_zero_is_a_tie_and_nan_is_no_answer(tmp_path):
    text = '[{"instruction": "a", "output_1": "1", "output_2": "2", "preference": %s}]'
    assert read_annotations(write(tmp_path / "a.json", text % "0"))[0].preference == 1.5
    assert read_annotations(write(tmp_path / "a.json", text % "NaN"))[0].preference is None
