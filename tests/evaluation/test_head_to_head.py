"""`lrlhf evaluate` of two systems: outputs from files and from runs, what is written, printed and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lrlhf.__main__ import main
from lrlhf.errors import UserError
from lrlhf.evaluation import FunctionJudge, HeadToHead, Leaderboard
from lrlhf.evaluation.head_to_head import summary
from lrlhf.evaluation.pairs import Annotation
from tests.modules.helpers import count_vowels, ppo, prompt_data, train_sft, trainer


def shorter(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([-float(len(response)) for response in responses])


def outputs(path, texts, generator="g") -> str:
    rows = [{"instruction": f"ask {i}", "output": text, "generator": generator} for i, text in enumerate(texts)]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny_llama, data_files, tmp_path_factory):
    """A PPO run on top of an SFT run, both with hand-overs."""
    folder = tmp_path_factory.mktemp("runs")
    train_sft(tiny_llama, data_files, folder / "sft", lr=5e-2)
    module = ppo(tiny_llama, lr=5e-2, sft=str(folder / "sft/handover"))
    trainer(folder / "ppo", enable_checkpointing=False, limit_train_batches=2).fit(
        module, prompt_data(tiny_llama, data_files)
    )
    return folder, module


def test_two_files_of_outputs_are_compared_and_everything_is_written(tmp_path, capsys):
    model = outputs(tmp_path / "model.json", ["a", "long", "b", "same"], "mine")
    reference = outputs(tmp_path / "reference.json", ["aa", "l", "bb", "same"], "theirs")
    main([
        "evaluate", "--evaluation", "lrlhf.evaluation.HeadToHead", "--evaluation.model", model,
        "--evaluation.reference", reference, "--evaluation.judge", "lrlhf.evaluation.FunctionJudge",
        "--evaluation.judge.function", f"{__name__}.shorter", "--to", str(tmp_path / "to"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "to/evaluation.json").read_text())
    assert result["title"] == "mine against theirs, judged by shorter"
    line = result["lines"][0]
    assert (line["label"], line["value"], line["n"]) == ("win rate (ties half)", (1 + 0 + 1 + 0.5) / 4, 4)
    assert {"model's output, characters", "reference's output, characters"} <= {x["label"] for x in result["lines"]}
    rows = json.loads((tmp_path / "to/annotations.json").read_text())
    assert [row["preference"] for row in rows] == [2.0, 1.0, 2.0, 1.5]
    printed = capsys.readouterr().out
    assert "62.5%" in printed
    assert "No difference is shown" in printed


def test_a_run_answers_as_its_module_does_and_its_reference_as_the_run_below(run, data_files, tmp_path):
    folder, module = run
    evaluation = HeadToHead(
        str(folder / "ppo"), FunctionJudge(count_vowels), prompts=data_files["prompts"], limit=6,
        sampling=module.sampling,
    )  # fmt: skip
    evaluation.run(tmp_path)
    files = {side: tmp_path / f"{side}_outputs.json" for side in ("model", "reference")}
    written = {side: [row["output"] for row in json.loads(path.read_text())] for side, path in files.items()}
    from lrlhf.functional.randomness import generator
    from lrlhf.model.generation import respond

    data = prompt_data(module.base_model, data_files, val=data_files["prompts"], val_batch_size=6)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    for side, role in (("model", "policy"), ("reference", "reference")):
        with module.backbone.role(role):
            draws = generator(0, "evaluate", 0)
            answer = respond(
                module.backbone, batch.prompt_ids, batch.prompt_mask, sampling=module.sampling,
                stop_ids=module.stop_ids, generator=draws,
            )  # fmt: skip
        assert written[side] == module.decode(*answer)
    assert written["model"] != written["reference"]


def test_the_reference_of_an_sft_run_is_its_base(run, data_files, tmp_path, tiny_llama):
    folder, module = run
    judge = FunctionJudge(count_vowels)
    shared = {"prompts": data_files["prompts"], "limit": 4, "sampling": module.sampling, "template": None}
    HeadToHead(str(folder / "sft"), judge, **shared).run(tmp_path)
    ours = json.loads((tmp_path / "reference_outputs.json").read_text())
    from lrlhf import AlpacaTemplate

    (tmp_path / "base").mkdir()
    settings = {**shared, "template": AlpacaTemplate(), "dtype": "float32"}
    HeadToHead(tiny_llama, judge, str(folder / "sft"), **settings).run(tmp_path / "base")
    base = json.loads((tmp_path / "base/model_outputs.json").read_text())
    assert [row["output"] for row in ours] == [row["output"] for row in base]


def test_two_runs_on_the_same_prompts(run, data_files, tmp_path):
    folder, module = run
    result = HeadToHead(
        str(folder / "ppo/handover"), FunctionJudge(count_vowels), str(folder / "sft"), data_files["prompts"],
        sampling=module.sampling, limit=3,
    ).run(tmp_path)  # fmt: skip
    assert "sft, sft" in result["title"]
    assert "ppo/handover, policy" in result["title"]


def test_the_settings_of_a_run_come_from_its_config(run, tmp_path):
    """Sampling and template of config.yaml; a template other than the trained one is refused by its fingerprint."""
    from lrlhf import TextTemplate
    from lrlhf.evaluation.system import System

    folder, _ = run
    template = {"class_path": "lrlhf.TextTemplate", "init_args": {"without_input": "Q {instruction}\n"}}
    values = {
        "model": {"class_path": "lrlhf.PPOPolicy", "init_args": {"sampling": {"max_new_tokens": 5, "temperature": 0}}},
        "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": {"template": template}},
    }
    config = folder / "ppo/config.yaml"
    config.write_text(yaml.safe_dump(values))
    try:
        system = System(str(folder / "ppo"))
        assert (system.sampling.max_new_tokens, system.sampling.temperature) == (5, 0)
        assert isinstance(system.template, TextTemplate)
        with pytest.raises(UserError, match="trained with another prompt template"):
            system.backbone  # noqa: B018
    finally:
        config.unlink()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "MODEL"}, "outputs have no reference of their own"),
        ({"model": "MODEL", "reference": "OTHER"}, "the two systems answered different prompts: 1 of 3"),
        ({"model": "MODEL", "reference": "EMPTY"}, "empty.json holds no rows"),
        ({"model": "MODEL", "reference": "nowhere.json"}, "data file nowhere.json does not exist"),
        ({"model": "RUN"}, "evaluation.prompts: name a file of instructions"),
        ({"model": "RUN", "prompts": "nowhere.jsonl"}, "data file nowhere.jsonl does not exist"),
        ({"model": "MODEL", "reference": "no/such/model"}, "there is no run, hand-over or model no/such/model"),
        ({"model": "configs/ppo"}, "there is no run, hand-over or model configs/ppo"),
        ({"model": "MODEL", "reference": "MODEL", "order": "twice"}, "config key evaluation.order: expected"),
        ({"model": "MODEL", "reference": "MODEL", "limit": "0"}, "config key evaluation.limit: expected a number >0"),
        ({"model": "MODEL", "reference": "MODEL", "judges": "x"}, "config key evaluation.judges"),
        ({"model": "MODEL", "reference": "MODEL", "judge": "lrlhf.NoJudge"}, "config key evaluation.judge"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(Path(__file__).parents[2])
    names = {
        "MODEL": outputs(tmp_path / "model.json", ["a", "b", "c"]),
        "OTHER": outputs(tmp_path / "other.json", ["a", "b"]),
        "EMPTY": str(tmp_path / "empty.json"),
        "RUN": str(run[0] / "ppo"),
    }
    (tmp_path / "empty.json").write_text("[]")
    judge = ["--evaluation.judge", "lrlhf.evaluation.FunctionJudge"]
    judge += ["--evaluation.judge.function", f"{__name__}.shorter"]
    given = [w for key, value in options.items() for w in (f"--evaluation.{key}", names.get(value, value))]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--evaluation", "lrlhf.evaluation.HeadToHead", *judge, *given, "--to", str(tmp_path / "to")])
    told = capsys.readouterr().err
    assert stop.value.code == 1
    assert told.startswith("lrlhf: error: ")
    assert sentence in told
    assert "Traceback" not in told
    assert not (tmp_path / "to/evaluation.json").exists()


def test_a_command_without_an_evaluation_says_what_to_name(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate"])
    assert "name an evaluation, such as --config configs/evaluate/" in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_refused(tmp_path):
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / name).write_text("a: 1\n")
    with pytest.raises(UserError, match="is a run without a hand-over; let its fit finish first"):
        HeadToHead(str(tmp_path), FunctionJudge(shorter), prompts="x").run(tmp_path)


def judged(preferences, answers=None, model="m"):
    return [
        Annotation(f"p{i}", "x", "y" * (i + 1), "r", model, annotator="j", preference=p, answers=tuple(answers or [p]))
        for i, p in enumerate(preferences)
    ]


def test_missing_answers_are_counted_in_the_notes():
    notes = " ".join(summary(judged([2, None, 1, None]))["notes"])
    assert "2 of 4 pairs have no preference: 2 of 4 of the judge's answers were missing" in notes


def test_a_judge_that_changes_its_word_with_the_order_gets_no_verdict():
    notes = summary(judged([1.5] * 30, answers=[2.0, 1.0]))["notes"]
    assert notes[0].startswith("No verdict: the judge gives the same answer in both orders for 0% of the pairs")


def test_the_better_system_is_named():
    assert summary(judged([2] * 30 + [1] * 2))["notes"][0].startswith("m is preferred (93.8%")
    assert summary(judged([1] * 30 + [2] * 2))["notes"][0].startswith("r is preferred")


def test_a_win_that_length_explains_is_said_to_be_one():
    """A judge that looks at length alone, with logit 3 tanh(difference / s)."""
    difference = np.array([3 * (i % 40) - 20 for i in range(120)])
    chance = 1 / (1 + np.exp(-3 * np.tanh(difference / difference.std(ddof=1))))
    preference = 1.0 + (np.random.default_rng(2).random(120) < chance)
    rows = [
        Annotation(f"p{i}", "x" * 50, "y" * (50 + d), "r", "m", preference=p)
        for i, (d, p) in enumerate(zip(difference, preference, strict=True))
    ]
    notes = summary(rows)["notes"]
    assert notes[0].startswith("m is preferred")
    assert notes[1].startswith("At equal lengths no difference is shown")
    always = [Annotation(f"p{i}", "x" * 50, "y" * (40 + i), "r", "m", preference=2.0) for i in range(60)]
    assert len(summary(always)["notes"]) == 1


def test_a_leaderboard_has_paired_differences_and_elo(tmp_path):
    from lrlhf.files import write_json

    write_json(tmp_path / "a.json", judged([2, 2, 2, 1, 1, 2], model="a"))
    write_json(tmp_path / "b.json", judged([2, 1, 1, 1, 1, 1], model="b"))
    result = Leaderboard([str(tmp_path / "a.json"), str(tmp_path / "b.json")]).run(tmp_path)
    lines = {line.label: line.estimate for line in result["lines"]}
    assert lines["a: win rate"].value == pytest.approx(4 / 6)
    assert lines["b: difference to a"].value == pytest.approx(-3 / 6)
    assert lines["a: Elo"].value > lines["r: Elo"].value == 0 > lines["b: Elo"].value
