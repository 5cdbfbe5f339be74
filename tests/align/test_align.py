"""From a base model to an aligned adapter, by one command."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lrlhf.__main__ import main
from lrlhf.cli.verify_resume import differences
from lrlhf.run.checkpoints import checkpoint_path, load, newest_checkpoint

TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "limit_train_batches": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, tiny_llama, data_files):
    """A run of three stages over the tiny model, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("align")
    files = {}
    for stage, kind, data in (
        ("sft", "SFT", "sft"),
        ("reward", "RewardModel", "pairs"),
        ("rl", "PPOPolicy", "prompts"),
    ):
        settings = {"base_model": tiny_llama, "lora": {"r": 2}, "sampling": {"max_new_tokens": 6}}
        if stage == "rl":
            settings |= {"ppo": {"minibatch_size": 4}}
        rows = {"train": data_files[data], "val": data_files[data], "batch_size": 8, "val_limit": 6}
        callbacks = [{"class_path": "lrlhf.DivergenceCallback"}, {"class_path": "lrlhf.SampleLog"}]
        values = {
            "seed_everything": 1,
            "trainer": TRAINER | ({"callbacks": callbacks} if stage == "rl" else {}),
            "model": {"class_path": f"lrlhf.{kind}", "init_args": settings},
            "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": rows},
        }
        files[stage] = [str(folder / f"{stage}.yaml")]
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    plan = {
        "run": str(folder / "run"),
        "stages": files,
        "compare": {"gold": "lrlhf.rewards.vader_sentiment", "count": 6},
    }
    (folder / "align.yaml").write_text(yaml.safe_dump(plan))
    arguments = ["align", "--config", str(folder / "align.yaml")]
    main(arguments)
    return folder / "run", arguments


def test_each_stage_leaves_an_ordinary_run_folder(aligned):
    run, _ = aligned
    for stage in ("sft", "reward", "rl"):
        for name in (
            "config.yaml",
            "metrics.csv",
            "checkpoints/iteration=000002.ckpt",
            "handover/manifest.json",
            "stage.json",
        ):
            assert (run / stage / name).is_file(), f"{stage}/{name}"


def test_the_comparison_and_the_page_are_written(aligned):
    run, _ = aligned
    result = json.loads((run / "comparison.json").read_text())
    assert len(result["rows"]) == 6
    assert result["gold"] == "vader_sentiment"
    assert result["reward_model"]["pairs"] == 6
    assert result["divergences"]["exact_kl"] > 0
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.init_args.ppo.clip_range", "-1", "model.ppo.clip_range: expected a number >0, got -1"),
        ("data.limt", "3", "the nearest is limit"),
    ],
)
def test_a_fault_of_the_last_stage_is_told_before_the_first_begins(aligned, tmp_path, capsys, setting, value, words):
    _run, arguments = aligned
    with pytest.raises(SystemExit):
        main([*arguments, "--run", str(tmp_path / "run"), f"--rl.{setting}", value])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "rows"),
    [
        ("DPO", {}, {}),
        pytest.param(
            "GRPO",
            {"reward_function": "lrlhf.rewards.vader_sentiment", "updates": {"minibatch_size": 8}},
            {"responses_per_prompt": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_method_without_a_reward_model_skips_that_stage(
    aligned, tmp_path, tiny_llama, data_files, capsys, kind, settings, rows
):
    _run, arguments = aligned
    path = tmp_path / "rl.yaml"
    values = {"base_model": tiny_llama, "lora": {"r": 2}, "sampling": {"max_new_tokens": 6}, **settings}
    train = data_files["pairs" if kind == "DPO" else "prompts"]
    data = {"train": train, "val": train, "batch_size": 8, **rows}
    config = {
        "trainer": TRAINER,
        "model": {"class_path": f"lrlhf.{kind}", "init_args": values},
        "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": data},
    }
    path.write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    main([*arguments, "--run", str(run), "--stages.rl", f"[{path}]", "--compare.prompts", data_files["prompts"]])
    assert "reward: skipped" in capsys.readouterr().out
    assert not (run / "reward").exists()
    result = json.loads((run / "comparison.json").read_text())
    assert result["divergences"]["exact_kl"] == pytest.approx(0, abs=0.01)  # two small steps
    assert (result["rows"][0]["after"]["learned"] is None) == (kind == "DPO")
    assert result["rows"][0]["after"]["gold"] is not None
    page = (run / "report.html").read_text()
    assert ("margin" if kind == "DPO" else "groups_with_signal") in page


def test_stages_that_are_done_are_skipped_and_a_change_runs_what_follows_it(aligned, capsys):
    _run, arguments = aligned
    main(arguments)
    out = capsys.readouterr().out
    assert [f"{stage}: done already" in out for stage in ("sft", "reward", "rl")] == [True, True, True]
    main([*arguments, "--reward.model.init_args.centering", "0.5"])
    out = capsys.readouterr().out
    assert [f"{stage}: done already" in out for stage in ("sft", "reward", "rl")] == [True, False, False]


def test_the_policy_s_adapter_is_plain_peft(aligned, tiny_llama):
    run, _ = aligned
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft = PeftModel.from_pretrained(model, str(run / "rl/handover/adapter"))
    assert peft.peft_config["default"].r == 4  # sft and policy, of rank 2 each


def test_predict_writes_alpaca_eval_rows_of_the_trained_weights(aligned):
    run, _ = aligned
    main(["predict", "--config", str(run / "rl/config.yaml")])
    rows = json.loads((run / "rl/model_outputs.json").read_text())
    assert len(rows) == 6
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}


def test_predict_of_a_reward_model_writes_scores(aligned):
    run, _ = aligned
    main(["predict", "--config", str(run / "reward/config.yaml")])
    rows = json.loads((run / "reward/model_outputs.json").read_text())
    assert set(rows[0]) == {"chosen", "rejected", "chosen_score", "rejected_score"}


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_a_run_s_own_config_validates_and_tests_its_last_checkpoint(aligned, capsys, command, stage):
    run, _ = aligned
    before = (run / stage / "metrics.csv").read_text()
    main([command, "--config", str(run / stage / "config.yaml")])
    out = capsys.readouterr().out
    assert "iteration=000002.ckpt" in out
    metric = {"sft": "perplexity", "reward": "accuracy", "rl": "divergence/kl"}[stage]
    assert metric in out
    assert (run / stage / "metrics.csv").read_text() == before


def test_a_relaunch_of_the_saved_config_needs_no_flag(aligned, capsys):
    run, _ = aligned
    main(["fit", "--config", str(run / "sft/config.yaml")])
    assert "complete already" in capsys.readouterr().out


def test_a_second_run_in_one_folder_is_evaluated_with_its_own_weights(aligned):
    run, _ = aligned
    first = load(newest_checkpoint(run / "sft"))["state_dict"]
    config = str(run / "sft/config.yaml")
    main(["fit", "--config", config, "--model.init_args.optimizer.init_args.lr", "0.1", "--fresh"])
    second = load(newest_checkpoint(run / "sft"))["state_dict"]
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_stage_that_was_interrupted_goes_on_and_one_that_was_changed_starts_afresh(tmp_path, aligned, capsys):
    _, arguments = aligned
    again = tmp_path / "again"
    main([*arguments, "--run", str(again)])
    shutil.copytree(again / "rl", tmp_path / "whole")
    record = again / "rl/stage.json"
    record.write_text(json.dumps({"fingerprint": json.loads(record.read_text())["fingerprint"]}))
    checkpoint_path(again / "rl", 2).unlink()
    capsys.readouterr()
    main([*arguments, "--run", str(again)])
    out = capsys.readouterr().out
    assert f"Going on from {checkpoint_path(again / 'rl', 1)}" in out
    assert differences(tmp_path / "whole", again / "rl")[0] == []
    main([*arguments, "--run", str(again), "--rl.model.init_args.ppo.discount", "0.9"])
    assert "Going on from" not in capsys.readouterr().out
