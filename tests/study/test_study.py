"""Studies: which trials there are, that they are run once and told rightly, and what may be concluded."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from lrlhf.errors import UserError
from lrlhf.report.report import main as report
from lrlhf.report.study import read_study, study_notes, study_plots, study_tables
from lrlhf.study import command, trials
from lrlhf.study.matching import main as match
from lrlhf.study.trials import make_trials

KL = {"class_path": "lrlhf.DivergenceCallback", "init_args": {"divergence": "lrlhf.functional.kl"}}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with an align config of a reward stage and a last stage, and `align` runs that only note their files."""
    monkeypatch.chdir(tmp_path)
    Path("reward.yaml").write_text("model: {class_path: lrlhf.RewardModel}\n")
    Path("ppo.yaml").write_text("model: {class_path: lrlhf.PPOPolicy}\n")
    Path("bare.yaml").write_text("stages: {rl: [ppo.yaml]}\n")
    Path("judged.yaml").write_text("stages: {rl: [ppo.yaml]}\ncompare: {judge: a.Judge}\n")
    Path("align.yaml").write_text("stages: {reward: [reward.yaml], rl: [ppo.yaml]}\ncompare: {gold: a.gold}\n")
    monkeypatch.setattr(command, "write_study", lambda run: None)
    ran = []

    def fake_align(align, folder, stages, changes, threads, seed):
        folder.mkdir(parents=True, exist_ok=True)
        ran.append((str(folder), changes, seed))
        if "bad" in str(folder):
            raise UserError(f"{folder} failed (on purpose)")
        if folder.parent.name != "before":
            gold = len(folder.parent.name) + seed
            row = {"gold": gold, "learned": 2.0, "length": 3, "ended": True, "response": "x"}
            rows = [
                {"instruction": i, "before": row | {"gold": 0.5}, "after": row | {"gold": gold + i, "judged": i / 2}}
                for i in (0, 2)
            ]
            result = {"rows": rows, "divergences": {"exact_kl": 0.25}, "seconds": {"rl": 7.0}}
            (folder / "comparison.json").write_text(json.dumps(result))
            (folder / "rl").mkdir(exist_ok=True)
            (folder / "rl" / "metrics.csv").write_text("step,train/score,train/loss\n0,1.5,9\n1,2.5,9\n")

    monkeypatch.setattr(trials, "_align", fake_align)
    return ran


def study(**changes) -> list[str]:
    """The arguments of a study of two conditions and two seeds."""
    plan = {
        "align": ["align.yaml"], "run": "study", "seeds": [1, 2], "comparisons": [["kl", "none"]],
        "conditions": {"none": {}, "kl": {"rl": {"trainer": {"callbacks+": KL}}}},
    }  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return ["--config", "study.yaml"]


def table(name: str) -> list[dict[str, str]]:
    with Path("study", f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_condition_is_run_with_every_value_and_every_seed(lab):
    grid = {"rl.model.init_args.lora.r": [1, 4], "reward.model.init_args.dtype": ["auto"]}
    conditions = {"none": {}, "kl": {"rl": {"model": {"init_args": {"lora": {"alpha": 8}}}}}}
    found = make_trials(Path("run"), ("align.yaml",), conditions, grid, [1, 2])
    assert len(found) == 2 * 2 * 2
    assert [trial.seed for trial in found] == [1] * 4 + [2] * 4
    one = next(trial for trial in found if trial.condition == "kl (r=4, dtype=auto)")
    assert one.changes["rl"] == {"model": {"init_args": {"lora": {"alpha": 8, "r": 4}}}}
    assert one.changes["reward"] == {"model": {"init_args": {"dtype": "auto"}}}
    assert dict(one.factors) == {"rl.model.init_args.lora.r": 4, "reward.model.init_args.dtype": "auto"}
    assert len({trial.folder for trial in found}) == 8


def test_trials_share_a_reward_model_unless_they_change_it(lab):
    conditions = {"a": {"rl": {"x": 1}}, "b": {"rl": {"x": 2}}, "c": {"reward": {"x": 1}}}
    before = [t.before for t in make_trials(Path("run"), ("align.yaml",), conditions, {}, [1])]
    assert before[0] == before[1] != before[2]


def test_a_trial_starts_from_the_shared_stages_with_its_own_changes_and_seed(lab):
    command.main(study())
    shared, *runs = lab
    assert "before" in shared[0]
    assert [seed for _, _, seed in runs] == [1, 1, 2, 2]
    handover = f"{shared[0]}/reward/handover"
    assert runs[0][1] == {"rl": {"model": {"init_args": {"reward_model": handover}}}}
    assert runs[1][1]["rl"]["trainer"] == {"callbacks+": KL}


def test_tables_hold_what_the_trials_found(lab):
    command.main(study())
    rows = table("trials")
    assert [(row["condition"], row["seed"]) for row in rows] == [("none", "1"), ("kl", "1"), ("none", "2"), ("kl", "2")]
    assert [float(row["gold"]) for row in rows] == [4 + 1 + 1, 2 + 1 + 1, 4 + 2 + 1, 2 + 2 + 1]
    assert {float(row["gold_before"]) for row in rows} == {0.5}
    assert (rows[0]["exact_kl"], rows[0]["seconds"]) == ("0.25", "7.0")
    assert [float(row["gold"]) for row in table("prompts")[:2]] == [5, 7]
    assert ([float(row["judged"]) for row in table("prompts")[:2]], float(rows[0]["judged"])) == ([0, 1], 0.5)
    assert [(c["metric"], c["iteration"], c["value"]) for c in table("curves")[:2]] == [
        ("train/score", "1", "1.5"), ("train/score", "2", "2.5"),
    ]  # fmt: skip
    parquet = pd.read_parquet("study/trials.parquet")
    assert list(parquet["gold"]) == [float(row["gold"]) for row in rows]


def test_done_trials_are_skipped_until_something_they_are_made_of_changes(lab):
    command.main(study())
    first = len(lab)
    command.main(study())
    assert len(lab) == first
    command.main(study(seeds=[1, 2, 3]))
    assert [seed for _, _, seed in lab[first:]] == [3, 3]
    notes = " ".join(study_notes(read_study(Path("study"))))
    assert "Planned with the seeds [1, 2], now [1, 2, 3]: such a change" in notes
    changed = {"none": {}, "kl": {"rl": {"trainer": {"callbacks+": KL, "max_epochs": 2}}}}
    count = len(lab)
    command.main(study(conditions=changed))
    assert ["kl" in folder for folder, _, _ in lab[count:]] == [True, True]
    Path("ppo.yaml").write_text("model: {class_path: lrlhf.PPOPolicy, init_args: {dtype: auto}}\n")
    count = len(lab)
    command.main(study(conditions=changed))
    assert len(lab) - count == 4, "the shared stages do not hang on what the last one is made of"
    Path("reward.yaml").write_text("model: {class_path: lrlhf.RewardModel, init_args: {dtype: auto}}\n")
    count = len(lab)
    command.main(study(conditions=changed))
    assert len(lab) - count == 1 + 4, "and every trial hangs on them"


def test_a_trial_that_fails_is_named_and_the_others_are_run(lab):
    with pytest.raises(UserError, match=r"2 of 4 trials failed, first .*bad.*on purpose"):
        command.main(study(conditions={"bad": {}, "kl": {}}, comparisons=[]))
    assert [row["condition"] for row in table("trials")] == ["kl", "kl"]


def test_trials_whose_reward_model_fails_are_named_and_the_others_are_run(lab, monkeypatch):
    fake = trials._align

    def fail_where_the_reward_model_is_another(align, folder, stages, changes, threads, seed):
        if changes.get("reward"):
            raise UserError("no reward model (on purpose)")
        fake(align, folder, stages, changes, threads, seed)

    monkeypatch.setattr(trials, "_align", fail_where_the_reward_model_is_another)
    conditions = {"none": {}, "other": {"reward": {"x": 1}}}
    with pytest.raises(UserError, match=r"2 of 4 trials failed, first .*other/seed-1: no reward model .on purpose"):
        command.main(study(conditions=conditions, comparisons=[]))
    assert [row["condition"] for row in table("trials")] == ["none", "none"]


def test_a_method_may_be_named_without_its_settings(lab):
    conditions = {"none": {}, "rloo": {"rl": {"model": "lrlhf.RLOO"}}}
    command.main(study(conditions=conditions, comparisons=[]))
    assert [row["condition"] for row in table("trials")] == ["none", "rloo"] * 2


def test_a_study_that_was_interrupted_ends_with_the_same_tables(lab, monkeypatch):
    command.main(study())
    whole = {name: table(name) for name in ("trials", "prompts", "curves")}
    interrupted, fake = [], trials._align

    def stop_at_the_third(*arguments):
        interrupted.append(arguments)
        if len(interrupted) == 3:
            raise KeyboardInterrupt
        fake(*arguments)

    monkeypatch.setattr(trials, "_align", stop_at_the_third)
    subprocess.run(["rm", "-r", "study"], check=True)
    with pytest.raises(KeyboardInterrupt):
        command.main(study())
    command.main(study())
    assert {name: table(name) for name in whole} == whole


def test_comparisons_are_dated_by_how_many_trials_had_been_seen(lab):
    command.main(study())
    assert json.loads(Path("study/study.json").read_text())["trials_seen"] == 0
    command.main(study(comparisons=[["none", "kl"]]))
    assert json.loads(Path("study/study.json").read_text())["trials_seen"] == 4
    command.main(study(comparisons=[["none", "kl"]], seeds=[1, 2, 3]))
    assert json.loads(Path("study/study.json").read_text())["trials_seen"] == 4, "more seeds name nothing anew"
    changed = {"none": {}, "kl": {"rl": {"trainer": {"callbacks+": KL, "max_epochs": 2}}}, "js": {}}
    command.main(study(comparisons=[["none", "kl"]], seeds=[1, 2, 3], conditions=changed))
    assert json.loads(Path("study/study.json").read_text())["trials_seen"] == 6, "another kl is another comparison"
    command.main(study(comparisons=[["none", "kl"]]))
    assert any(
        "after 4 trials were done: read them as exploratory" in n for n in study_notes(read_study(Path("study")))
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"comparisons": [["kl", "js"]]}, "is no pair of two of the conditions none, kl"),
        ({"comparisons": [["kl"]]}, "is no pair of two"),
        ({"conditions": {"kl": {"ppo": {}}}, "comparisons": []}, "'kl' changes 'ppo'; begin with a stage"),
        ({"grid": {"lora.r": [1]}}, "changes 'lora.r'; begin with a stage"),
        ({"grid": {"rl.x": 1}}, "grid.rl.x: expected a list of values, got 1"),
        ({"conditions": {"kl": 3}, "comparisons": []}, "conditions.kl: expected stages with their configs"),
        ({"conditions": [1]}, "conditions"),
        ({"seeds": [1, 1]}, "name each once"),
        ({"outcome": "learned", "conditions": {"none": {}, "kl": {"reward": {"x": 1}}}}, "scores have no common scale"),
        (
            {"outcome": "learned", "conditions": {"none": {}, "kl": {"rl": {"model.init_args.aggregate": "worst"}}}},
            "scores have no common scale",
        ),
        ({"outcome": "judged"}, "no file of align has compare.judge"),
        ({"align": ["bare.yaml"]}, "no file of align has compare.gold"),
        (
            {"align": ["judged.yaml"], "outcome": "judged", "conditions": {"none": {}, "kl": {"sft": {"x": 1}}}},
            "each would be judged against another reference",
        ),
        (
            {"outcome": "learned", "grid": {"rl.model.init_args.reward_function": ["a.b", "c.d"]}, "comparisons": []},
            "scores have no common scale",
        ),
        ({"align": ["none.yaml"]}, "there is no config file none.yaml"),
        ({"align": ["reward.yaml"]}, "names no config files of stages.rl"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_in_a_sentence(lab, changes, sentence):
    with pytest.raises(UserError) as refusal:
        command.main(study(**changes))
    assert sentence in str(refusal.value)
    assert not lab


def write_tables(folder: Path, effect: float, draws: np.random.Generator) -> None:
    """A simulated study of three conditions and eight seeds: `b` is better by the effect, `c` is `a` again."""
    folder.mkdir()
    pairs = [["b", "a"], ["c", "a"]]
    plan = {"order": ["a", "b", "c"], "seeds": list(range(8)), "comparisons": pairs, "outcome": "gold", "effect": 0.05}
    (folder / "study.json").write_text(
        json.dumps(plan | {"trials_seen": 0, "named": "2026-01-01", "first_seeds": plan["seeds"]})
    )
    hard, rows = draws.normal(0, 0.3, 30), []
    for seed in range(8):
        for name in "abc":
            luck = draws.normal(0, 0.02) + (effect if name == "b" else 0)
            rows += [{"condition": name, "seed": seed, "prompt": i, "gold": luck + x} for i, x in enumerate(hard)]
    prompts = pd.DataFrame(rows)
    prompts.to_csv(folder / "prompts.csv", index=False)
    means = prompts.groupby(["condition", "seed"], as_index=False)["gold"].mean()
    means.assign(learned=1.0, length=9.0, exact_kl=0.1, seconds=1.0).to_csv(folder / "trials.csv", index=False)


@pytest.mark.slow
def test_a_simulated_study_finds_the_effect_that_there_is_and_not_the_one_that_there_is_not(tmp_path):
    draws, words = np.random.default_rng(0), []
    for number in range(40):
        write_tables(tmp_path / str(number), 0.05, draws)
        _, (_, effect, none) = study_tables(read_study(tmp_path / str(number)))
        words.append((effect[5], none[5]))
    assert np.mean([effect == "higher" for effect, _ in words]) > 0.8
    assert np.mean([none != "not told apart" for _, none in words]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 40)


def test_the_report_of_a_study_is_tables_plots_and_a_page(tmp_path, capsys):
    write_tables(tmp_path / "study", 0.2, np.random.default_rng(1))
    report([str(tmp_path / "study")])
    page = (tmp_path / "study/report.html").read_text()
    assert "b - a" in page
    assert "higher" in page
    assert "not told apart" in page
    assert {path.name for path in (tmp_path / "study/plots").iterdir()} >= {"outcome.png", "outcome_exact_kl.png"}
    assert "24 of 24 trials are done" in " ".join(capsys.readouterr().out.split())


def test_a_study_may_be_decided_by_a_judge_on_the_prompts_that_it_answered_in_every_trial(tmp_path):
    folder = tmp_path / "study"
    write_tables(folder, 0.2, np.random.default_rng(1))
    plan, prompts = json.loads((folder / "study.json").read_text()), pd.read_csv(folder / "prompts.csv")
    (folder / "study.json").write_text(json.dumps(plan | {"outcome": "judged"}))
    with pytest.raises(UserError, match=r"has not measured judged in a, seed 0; look at compare\.judge"):
        read_study(folder)
    prompts["judged"] = np.where(prompts["condition"] == "b", 0.75, 0.5) + 0.01 * (prompts["prompt"] % 3)
    prompts.loc[(prompts["prompt"] == 4) & (prompts["seed"] == 3) & (prompts["condition"] == "c"), "judged"] = np.nan
    prompts.to_csv(folder / "prompts.csv", index=False)
    found = read_study(folder)
    assert found.values("a").shape == (8, 29)
    assert "1 prompts have no outcome in some trial and are left out of all." in study_notes(found)
    conditions, (_, effect, none) = study_tables(found)
    assert conditions[0][2] == "win rate over the reference"
    mean = 0.5 + 0.01 * (sum(i % 3 for i in range(30)) - 4 % 3) / 29
    assert [line[2] for line in conditions[1:]] == [f"{mean + gain:.3f}" for gain in (0, 0.25, 0)]
    assert (effect[2], none[2]) == ("+0.250", "+0.000")


def test_scores_of_several_reward_models_are_not_shown_together(lab):
    command.main(study())
    assert "learned" in study_tables(read_study(Path("study")))[0][0]
    command.main(study(conditions={"none": {}, "kl": {"reward": {"x": 1}}}))
    found = read_study(Path("study"))
    assert "learned" not in study_tables(found)[0][0]
    assert not {"outcome_learned", "train_score"} & {plot.name for plot in study_plots(found)}
    assert "Conditions have reward models of their own" in " ".join(study_notes(found))


def test_a_study_without_a_trial_has_no_report(tmp_path):
    write_tables(tmp_path / "study", 0, np.random.default_rng(0))
    (tmp_path / "study/trials.csv").unlink()
    with pytest.raises(UserError, match="no trial of the study .* is done yet"):
        report([str(tmp_path / "study")])


def real_study(base: str, files: dict[str, str], folder: Path, **changes) -> list[str]:
    """A study of real runs of the tiny model."""
    model = {
        "base_model": base, "reward_function": "tests.modules.helpers.count_vowels", "lora": {"r": 2, "alpha": 4},
        "micro_batch_size": 8, "ppo": {"minibatch_size": 8}, "sampling": {"max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
    }  # fmt: skip
    rl = {
        "trainer": {"max_epochs": 1, "limit_train_batches": 3, "accelerator": "cpu", "callbacks": []},
        "model": {"class_path": "lrlhf.PPOPolicy", "init_args": model},
        "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": {
            "train": files["prompts"], "val": files["prompts"], "batch_size": 8}},
    }  # fmt: skip
    (folder / "rl.yaml").write_text(yaml.safe_dump(rl))
    align = {"stages": {"rl": [str(folder / "rl.yaml")]}, "compare": {"gold": "tests.modules.helpers.count_vowels"}}
    (folder / "align.yaml").write_text(yaml.safe_dump(align))
    plan = {
        "align": [str(folder / "align.yaml")], "run": str(folder / "study"), "seeds": [1, 2],
        "conditions": {"none": {}, "kl": {"rl": {"trainer": {"callbacks+": KL}}}}, "comparisons": [["kl", "none"]],
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return ["--config", str(folder / "study.yaml")]


@pytest.mark.slow
def test_a_killed_study_of_real_runs_goes_on_and_ends_with_the_tables_of_one_that_was_not(
    tmp_path, tiny_llama, data_files
):
    found = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        words = [sys.executable, "-m", "lrlhf", "study", *real_study(tiny_llama, data_files, tmp_path / name)]
        if name == "killed":
            process = subprocess.Popen(words)
            while not list((tmp_path / name / "study/trials").glob("*/*/trial.json")):
                time.sleep(0.5)
            time.sleep(10)  # in the next trial
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(words, check=True)
        table = pd.read_csv(tmp_path / name / "study/trials.csv").drop(columns=["folder", "seconds"])
        found[name] = table
    pd.testing.assert_frame_equal(found["whole"], found["killed"])
    run = str(tmp_path / "whole/study/trials/none/seed-1")
    out = tmp_path / "matched.json"
    divergences = "[lrlhf.functional.js, lrlhf.functional.js_paper, lrlhf.functional.squared_error]"
    match([run, "--divergences", divergences, "--responses", "16", "--out", str(out)])
    for line in json.loads(out.read_text())["matched"].values():
        assert line["pull_again"] == pytest.approx(1, abs=0.1)
        assert line["coefficient"] > 0


@pytest.mark.slow
def test_submitit_runs_the_trials_of_a_study(tmp_path, tiny_llama, data_files):
    changes = {"cluster": "local", "seeds": [1], "submit": {"timeout_min": 5}}
    words = real_study(tiny_llama, data_files, tmp_path, **changes)
    subprocess.run([sys.executable, "-m", "lrlhf", "study", *words], check=True)
    assert list(pd.read_csv(tmp_path / "study/trials.csv")["condition"]) == ["none", "kl"]
