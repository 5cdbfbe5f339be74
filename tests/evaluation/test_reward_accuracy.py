"""The report on a reward model: hand values, scipy, and the scores of training."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from lrlhf import AlpacaDataModule
from lrlhf.__main__ import main
from lrlhf.errors import UserError
from lrlhf.evaluation import RewardModelAccuracy
from lrlhf.evaluation.reward_accuracy import calibration_error, describe, notes, reliability
from tests.conftest import write_jsonl
from tests.modules.helpers import train_reward, train_sft

HAND = pd.DataFrame(
    {
        "subset": ["Chat", "Chat", "Safety", "Safety"],
        "chosen": [2.0, 0.0, 1.0, 3.0],
        "rejected": [1.0, 1.0, 1.0, 0.0],
        "chosen_length": [100, 50, 95, 10],
        "rejected_length": [50, 50, 100, 40],
        "prompt": ["a", "b", "b", "c"],
    }
)


def lines(table) -> dict:
    return {line.label: line.estimate for line in describe(table)["lines"]}


def test_accuracy_and_the_baseline_by_hand():
    found = lines(HAND)
    assert found["accuracy (ties half)"].value == (1 + 0 + 0.5 + 1) / 4
    assert found["the longer wins (characters)"].value == (1 + 0.5 + 0 + 0) / 4
    assert found["accuracy minus the longer wins, paired"].value == pytest.approx(1 / 4)
    assert found["accuracy on pairs alike in length"] == pytest.approx(lines(HAND[1:3])["accuracy (ties half)"])
    assert found["margin, chosen minus rejected"].value == pytest.approx((1 - 1 + 0 + 3) / 4)
    assert found["Chat: accuracy"].value == 0.5
    assert found["Safety: accuracy"].value == 0.75
    assert found["Safety: the longer wins"].value == 0


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    n = 80
    table = pd.DataFrame({key: rng.normal(size=n).round(1) for key in ("chosen", "rejected")})
    table["chosen_length"], table["rejected_length"] = rng.integers(1, 30, n), rng.integers(1, 30, n)
    table["subset"], table["prompt"] = "", [str(i) for i in range(n)]
    found = lines(table)
    scores, lengths = pd.concat([table.chosen, table.rejected]), pd.concat([table.chosen_length, table.rejected_length])
    assert found["score and length, rank correlation"].value == pytest.approx(stats.spearmanr(scores, lengths)[0])
    differences = table.chosen - table.rejected, table.chosen_length - table.rejected_length
    assert found["their differences, rank correlation"].value == pytest.approx(stats.spearmanr(*differences)[0])
    assert found["their differences, rank correlation"].low < found["their differences, rank correlation"].value


def test_a_calibrated_reward_model_has_no_calibration_error_and_an_overconfident_one_has():
    rng = np.random.default_rng(0)
    strength = rng.normal(0, 1.5, 20000)
    difference = np.where(rng.random(20000) < 1 / (1 + np.exp(-strength)), strength, -strength)
    assert calibration_error(difference) < 0.01
    assert calibration_error(3 * difference) > 0.08


def test_calibration_error_by_hand():
    """At 0.65 one is right and one wrong; at 0.75 and 0.92, in bins of their own, one is right; a tie is half right."""
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    difference = np.array([logit(0.65), -logit(0.65), logit(0.75), logit(0.92), 0.0])
    assert calibration_error(difference) == pytest.approx((2 * (0.65 - 0.5) + (1 - 0.75) + (1 - 0.92)) / 5)
    bins = reliability(difference)
    assert bins["n"] == [1, 2, 1, 1]
    assert bins["confidence"] == pytest.approx([0.5, 0.65, 0.75, 0.92])
    assert bins["accuracy"] == [0.5, 0.5, 1.0, 1.0]


def test_notes_say_whether_it_beats_length():
    right = pd.DataFrame({"chosen": [1.0] * 40, "rejected": [0.0] * 40, "chosen_length": [1] * 40})
    right["rejected_length"], right["subset"], right["prompt"] = 2, "", range(40)
    assert notes(right)[0].startswith("The reward model beats the rule")
    assert "0 pairs are alike in length" in notes(right)[2]
    same = right.assign(chosen_length=3)
    assert notes(same)[0].startswith("The reward model is not shown to beat")
    assert notes(same.assign(chosen=-1.0))[0].startswith("The reward model loses to")


def test_intervals_but_those_of_shares_draw_whole_prompts():
    found = {label: estimate.n for label, estimate in lines(HAND).items() if ": " not in label}
    shares = {"accuracy (ties half)": 4, "the longer wins (characters)": 4, "accuracy on pairs alike in length": 2}
    shares["expected calibration error"] = 4
    assert found == dict.fromkeys(found, 3) | shares


def test_the_two_sides_of_a_pair_are_drawn_together():
    """Each pair twice, under its prompt, says no more than once: the interval does not shrink."""
    rng = np.random.default_rng(2)
    table = pd.DataFrame(rng.normal(size=(50, 2)), columns=["chosen", "rejected"])
    table["chosen_length"], table["rejected_length"] = rng.integers(1, 90, (2, 50))
    table["subset"], table["prompt"] = "", range(50)
    label = "score and length, rank correlation"
    assert lines(pd.concat([table, table]))[label] == pytest.approx(lines(table)[label])


def test_notes_tell_what_calibration_error_chance_alone_gives():
    """Of 1,000 draws with p = 0.75 the share is off by sqrt(2 / pi 0.75 0.25 / 1000) = 0.011 in the mean."""
    table = pd.DataFrame({"chosen": [np.log(3)] * 1000, "rejected": 0.0, "chosen_length": 1, "rejected_length": 2})
    assert "error of 1.1% by chance" in notes(table.assign(prompt=range(1000)))[1]


@pytest.fixture(scope="module")
def runs(tiny_llama, data_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train_sft(tiny_llama, data_files, folder / "sft")
    return folder, train_reward(tiny_llama, data_files, folder / "reward", sft=str(folder / "sft/handover"))


def test_scores_are_those_of_the_module_that_was_trained(runs, data_files, tmp_path):
    folder, module = runs
    RewardModelAccuracy(str(folder / "reward"), data_files["pairs"], batch_size=7).run(tmp_path)
    table = pd.read_csv(tmp_path / "scores.csv")
    data = AlpacaDataModule(val=data_files["pairs"], tokenizer=module.base_model, task="preference", val_batch_size=40)
    data.setup("validate")
    with torch.no_grad(), module.backbone.role("reward"):
        theirs = module.pair_scores(next(iter(data.val_dataloader())))
    assert table[["chosen", "rejected"]].to_numpy() == pytest.approx(theirs.numpy(), abs=1e-5)


def test_rewardbenchs_columns_are_read_and_reported_by_subset(runs, tmp_path, capsys):
    rows = [
        {"id": i, "prompt": f"sun {i}", "chosen": "yes " * (i + 1), "rejected": "no", "subset": ("chat", "code")[i % 2]}
        for i in range(12)
    ]
    pairs = write_jsonl(
        tmp_path / "rb.jsonl", [*rows, {**rows[0], "prompt": "x" * 600}, {**rows[0], "rejected": rows[0]["chosen"]}]
    )
    main([
        "evaluate", "--evaluation", "lrlhf.evaluation.RewardModelAccuracy", "--evaluation.reward_model",
        str(runs[0] / "reward"), "--evaluation.pairs", pairs, "--to", str(tmp_path / "to"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "to/evaluation.json").read_text())
    labels = {line["label"]: line for line in result["lines"]}
    assert labels["chat: accuracy"]["n"] == labels["code: accuracy"]["n"] == 6
    assert labels["accuracy (ties half)"]["n"] == 12
    assert result["notes"][0] == (
        "Left out, and in no number: 1 pairs of equal responses, 1 longer than the base takes."
    )
    assert set(result["plots"]) == {"reliability", "score_against_length"}
    assert len(result["plots"]["score_against_length"]["length"]) == 24
    assert "the longer wins" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "row", "sentence"),
    [
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "is no reward model"),
        ("reward", {"prompt": "a", "chosen": "b"}, "row 2"),
        ("reward", {"instruction": "a", "output": "b"}, "row 2: expected two responses"),
        ("nowhere", {"prompt": "a", "chosen": "b", "rejected": "c"}, "there is no run"),
    ],
)
def test_bad_input_is_one_sentence(runs, tmp_path, model, row, sentence):
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
    with pytest.raises(UserError, match=sentence):
        RewardModelAccuracy(str(runs[0] / model), pairs).run(tmp_path)


def test_an_empty_file_is_refused(runs, tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no pair"):
        RewardModelAccuracy(str(runs[0] / "reward"), str(tmp_path / "p.jsonl")).run(tmp_path)


def test_scores_that_are_not_finite_are_refused(runs, data_files, tmp_path):
    shutil.copytree(runs[0] / "reward/handover", tmp_path / "handover")
    head = {"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)}
    save_file(head, tmp_path / "handover/head.safetensors")
    manifest = json.loads((tmp_path / "handover/manifest.json").read_text())
    (tmp_path / "handover/manifest.json").write_text(json.dumps({**manifest, "probe_score": None}))
    with pytest.raises(UserError, match="scores that are not finite"):
        RewardModelAccuracy(str(tmp_path), data_files["pairs"]).run(tmp_path)


def test_another_model_than_the_one_that_was_handed_over_is_refused(runs, data_files, tmp_path):
    """Its manifest tells the score of a probe."""
    shutil.copytree(runs[0] / "reward/handover", tmp_path / "handover")
    manifest = json.loads((tmp_path / "handover/manifest.json").read_text())
    moved = {**manifest, "probe_score": manifest["probe_score"] + 1}
    (tmp_path / "handover/manifest.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="its manifest says"):
        RewardModelAccuracy(str(tmp_path), data_files["pairs"]).run(tmp_path)
