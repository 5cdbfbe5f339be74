"""A run that is killed and started again ends exactly as the run that was not."""

import csv
import os
import shutil
import signal
import time

import pytest
import torch
import yaml

from lrlhf.__main__ import main
from lrlhf.cli.verify_resume import differences
from lrlhf.modules.base import AlignmentModule
from lrlhf.run.checkpoints import SafeCheckpointIO, all_checkpoints, checkpoint_path, load, newest_checkpoint
from tests.integration.soak_resume import METHODS, launch, launch_and_kill_at, soak, write_configs

STAGES = ("SFT", "RewardModel", "PPOPolicy")
LAST = 6


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, configs):
    """The uninterrupted run of each stage."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        assert launch(configs[stage], folder / stage) == 0, (folder / f"{stage}.log").read_text()[-3000:]
    return {stage: folder / stage for stage in STAGES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, configs):
    """Runs killed as soon as iteration 4 was saved: in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    for stage in STAGES:
        launch_and_kill_at(configs[stage], folder / stage, 4)
    return {stage: folder / stage for stage in STAGES}


def copy(run, target):
    shutil.copytree(run, target)
    return target


@pytest.mark.parametrize("stage", [*(pytest.param(name, marks=pytest.mark.slow) for name in STAGES[:2]), "PPOPolicy"])
def test_a_run_killed_after_every_iteration_ends_like_the_uninterrupted_one(stage, configs, whole, tmp_path):
    run = tmp_path / stage
    for iteration in range(1, LAST):
        launch_and_kill_at(configs[stage], run, iteration)
        assert newest_checkpoint(run) == checkpoint_path(run, iteration)
    assert launch(configs[stage], run) == 0
    differing, compared = differences(whole[stage], run)
    assert differing == []
    assert compared > 1000


@pytest.mark.parametrize(
    "method",
    ["RLOO", "DPO", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in ("RLOO", "DPO"))],
)
def test_a_method_s_run_that_is_killed_ends_like_the_uninterrupted_one(method, configs, tmp_path):
    assert launch(configs[method], tmp_path / "whole") == 0, (tmp_path / "whole.log").read_text()[-3000:]
    launch_and_kill_at(configs[method], tmp_path / "run", 4)
    assert launch(configs[method], tmp_path / "run") == 0
    differing, compared = differences(tmp_path / "whole", tmp_path / "run")
    assert differing == []
    assert compared > 1000


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_runs_killed_at_random_moments_end_like_the_uninterrupted_one(stage, configs, tmp_path):
    assert soak(configs[stage], tmp_path, kills=10, seed=int(time.time()))["kills"] >= 10


def forget(state, *path, value):
    """Put `value` in the place of one item of the state."""
    *way, last = path
    for key in way:
        state = state[next(k for k in state if k.startswith(key)) if isinstance(state, dict) else key]
    assert not torch.equal(torch.as_tensor(state[last]), torch.as_tensor(value)), "this item was not used"
    state[last] = value


def forget_optimizer(state, name):
    for moments in state["optimizer_states"][0]["state"].values():
        moments[name] = torch.zeros_like(moments[name])


GENERATOR = torch.Generator().manual_seed(5).get_state()

MUTATIONS = {
    "the controller's coefficient": ("PPOPolicy", ("callbacks", "DivergenceCallback", "coefficient"), 0.1),
    "the count of running moments": ("PPOPolicy", ("callbacks", "NormalizeScores", "count"), 8),
    "the mean of running moments": ("PPOPolicy", ("callbacks", "NormalizeScores", "mean"), 0.0),
    "the deviation of running moments": ("PPOPolicy", ("callbacks", "NormalizeScores", "squares"), 1.0),
    "a callback's own generator": ("PPOPolicy", ("callbacks", "NoisyReward", "generator"), GENERATOR),
    "a callback's counter": ("PPOPolicy", ("callbacks", "Draws", "count"), 0),
    "the length of samples.jsonl": ("PPOPolicy", ("callbacks", "SampleLog", "written"), 0),
    "the best value": ("RewardModel", ("callbacks", "Checkpoints", "best"), 9.0),
    "the cursor": ("PPOPolicy", ("AlpacaDataModule", "start"), 0),
    "the seed of the order": ("PPOPolicy", ("AlpacaDataModule", "seed"), 4),
    "the seed of sampling": ("PPOPolicy", ("lrlhf", "seed"), 4),
    "the iteration number": ("PPOPolicy", ("lrlhf", "iteration"), 0),
    "the schedule": ("SFT", ("lr_schedulers", 0, "last_epoch"), 0),
    "the rows of the log": ("SFT", ("loggers", 0, "rows"), 0),
    "torch's generator": ("SFT", ("random", 0, "torch"), torch.Generator().manual_seed(5).get_state()),
    "Python's generator": ("SFT", ("random", 0, "python"), (3, (*range(1, 625), 624), None)),
    "NumPy's generator": ("SFT", ("random", 0, "numpy"), ("MT19937", list(range(1, 625)), 624, 0, 0.0)),
    "the loop's batch": ("SFT", ("loops", "fit_loop", "epoch_loop.batch_progress", "current", "completed"), 0),
    "the loop's epoch": ("SFT", ("loops", "fit_loop", "epoch_progress", "current", "processed"), 0),
    "the logger's step": ("SFT", ("loops", "fit_loop", "epoch_loop.state_dict", "_batches_that_stepped"), 0),
    "the first moments of AdamW": ("SFT", "exp_avg", None),
    "the second moments of AdamW": ("SFT", "exp_avg_sq", None),
    "the step count of AdamW": ("SFT", "step", None),
}


@pytest.mark.parametrize("item", MUTATIONS)
def test_a_forgotten_item_of_state_is_seen(item, configs, whole, killed, tmp_path):
    stage, path, value = MUTATIONS[item]
    run = copy(killed[stage], tmp_path / "run")
    file = checkpoint_path(run, 4)
    state = load(file)
    if isinstance(path, str):
        forget_optimizer(state, path)
    elif item.endswith("s generator") and item[0] in "PN":
        state["random"][0][path[-1]] = value
    else:
        forget(state, *path, value=value)
    SafeCheckpointIO().save_checkpoint(state, file)
    ended = launch(configs[stage], run)
    assert ended != 0 or differences(whole[stage], run)[0] != []


def test_the_state_that_is_not_tampered_with_is_enough(configs, whole, killed, tmp_path):
    for stage in STAGES:
        run = copy(killed[stage], tmp_path / stage)
        assert launch(configs[stage], run) == 0
        assert differences(whole[stage], run)[0] == []


def test_worker_processes_that_read_ahead_begin_at_the_right_batch_of_the_right_epoch(configs, whole, killed, tmp_path):
    run = copy(killed["SFT"], tmp_path / "run")
    fit(configs["SFT"], run, "--data.init_args.num_workers", "1")
    assert differences(whole["SFT"], run)[0] == []


def test_a_checkpoint_holds_only_what_trains(whole):
    for stage, roles in (("SFT", {"sft"}), ("RewardModel", {"reward"}), ("PPOPolicy", {"policy", "critic"})):
        state = load(newest_checkpoint(whole[stage]))
        parts = {part for name in state["state_dict"] for part in name.split(".")}
        assert roles <= parts
        assert not parts & ({"sft", "reward", "policy", "critic"} - roles)
        assert all("lora_" in name or "heads." in name for name in state["state_dict"])
        assert checkpoint_path(whole[stage], LAST).stat().st_size < 200_000


def test_a_truncated_newest_checkpoint_costs_one_iteration_and_no_bit(configs, whole, killed, tmp_path):
    run = copy(killed["PPOPolicy"], tmp_path / "run")
    newest = checkpoint_path(run, 4)
    newest.write_bytes(newest.read_bytes()[:-500])
    assert launch(configs["PPOPolicy"], run) == 0
    log = run.with_suffix(".log").read_text()
    assert "iteration=000004.ckpt is damaged" in log
    assert "Going on from" in log
    assert "iteration=000003.ckpt" in log
    assert differences(whole["PPOPolicy"], run)[0] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 143)])
def test_a_signal_ends_the_iteration_saves_and_leaves(number, code, configs, whole, tmp_path):
    run = tmp_path / "run"
    status = launch_and_kill_at(configs["PPOPolicy"], run, 2, number)
    assert os.waitstatus_to_exitcode(status) == code, run.with_suffix(".log").read_text()[-2000:]
    saved = int(newest_checkpoint(run).stem.split("=")[1])
    assert saved >= 3
    assert f"Stopped after {saved} iterations" in run.with_suffix(".log").read_text()
    assert launch(configs["PPOPolicy"], run) == 0
    assert differences(whole["PPOPolicy"], run)[0] == []


def fit(config, run, *more):
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(run), *more])


def test_a_complete_run_is_not_run_again(configs, whole, tmp_path, capsys):
    run = copy(whole["SFT"], tmp_path / "run")
    fit(configs["SFT"], run)
    assert "complete already" in capsys.readouterr().out
    assert differences(whole["SFT"], run)[0] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_hand_over_that_fails_costs_no_training(stage, configs, whole, tmp_path, capsys, monkeypatch):
    """A file lies where the folder should; once it is gone, the same command writes the folder and trains nothing."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "handover").write_text("in the way")
    with pytest.raises(SystemExit):
        fit(configs[stage], run)
    assert "handover could not be written" in (told := capsys.readouterr().err)
    assert "start the same command" in told
    assert load(newest_checkpoint(run))["complete"] is True
    assert differences(whole[stage], run)[0] == ["handover/manifest.json"]
    assert not list(run.glob("handover.*"))
    (run / "handover").unlink()
    monkeypatch.setattr(AlignmentModule, "optimization_step", lambda *_: pytest.fail("trained again"))
    fit(configs[stage], run)
    assert differences(whole[stage], run)[0] == []
    assert (run / "handover/manifest.json").is_file()


def test_a_complete_run_goes_on_when_it_is_made_longer(configs, whole, tmp_path, capsys):
    run = copy(whole["SFT"], tmp_path / "run")
    fit(configs["SFT"], run, "--trainer.max_epochs", "3")
    assert "Going on from" in capsys.readouterr().out
    assert newest_checkpoint(run) == checkpoint_path(run, 9)
    with (run / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(9))


def test_fresh_starts_over(configs, whole, tmp_path):
    run = copy(whole["SFT"], tmp_path / "run")
    fit(configs["SFT"], run, "--fresh", "--seed_everything", "4")
    differing, _ = differences(whole["SFT"], run)
    assert any("state_dict" in name for name in differing)
    assert [p.name for p in all_checkpoints(run)] == ["iteration=000006.ckpt", "iteration=000005.ckpt"]
    assert yaml.safe_load((run / "config.yaml").read_text())["fresh"] is False


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model.init_args.optimizer.init_args.lr", "0.02", "optimizer.init_args.lr: 0.01, now 0.02"),
        ("--seed_everything", "4", "seed_everything: 3, now 4"),
        ("--data.init_args.batch_size", "4", "data.init_args.batch_size: 8, now 4"),
        ("--model.init_args.lora.r", "4", "lora.r: 2, now 4"),
        ("--trainer.callbacks", "null", "trainer.callbacks"),
    ],
)
def test_another_config_in_the_same_folder_is_refused_by_name(option, value, named, configs, killed, capsys):
    with pytest.raises(SystemExit):
        fit(configs["SFT"], killed["SFT"], option, value)
    assert named in capsys.readouterr().err


def test_memory_settings_may_change(configs, killed, tmp_path):
    run = copy(killed["SFT"], tmp_path / "run")
    fit(configs["SFT"], run, "--model.init_args.micro_batch_size", "2")
    assert newest_checkpoint(run) == checkpoint_path(run, LAST)


def test_best_is_the_state_after_the_best_validation(whole):
    with (whole["SFT"] / "metrics.csv").open() as file:
        rows = [(float(row["val/loss"]), int(row["step"]) + 1) for row in csv.DictReader(file) if row["val/loss"]]
    best = load(whole["SFT"] / "checkpoints/best.ckpt")
    assert best["lrlhf"]["iteration"] == min(rows)[1]
    assert best["callbacks"]["Checkpoints"]["best"] == pytest.approx(min(rows)[0])


def test_a_reward_function_that_raises_leaves_the_iteration_before(configs, tmp_path, monkeypatch, capsys):
    run, calls = tmp_path / "run", []

    def failing(prompts: list[str], responses: list[str]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError("the user's judge is down")
        return torch.arange(float(len(responses)))

    monkeypatch.setattr("tests.integration.soak_resume.count_vowels", failing)
    with pytest.raises(SystemExit):
        fit(configs["PPOPolicy"], run)
    assert "failing failed at a batch of 8 rows" in capsys.readouterr().err
    # a sanity check, two iterations, a validation, and the third; the sixth call is of the fourth
    assert load(newest_checkpoint(run))["lrlhf"]["iteration"] == 3
