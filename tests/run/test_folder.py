"""Which settings make a run the run that it is, and what is cleared for another."""

import copy
import os
import subprocess
import sys

import pytest
import yaml

from lrlhf.errors import UserError
from lrlhf.run.folder import clear, refuse_other_run, written_whole

LIMIT = {"class_path": "lrlhf.RewardLimit", "init_args": {"limit": 5.0}}
DIVERGENCE = {"class_path": "lrlhf.DivergenceCallback", "init_args": {"coefficient": 0.02}}
CONFIG = {
    "seed_everything": 3,
    "trainer": {
        "max_epochs": 2,
        "limit_train_batches": None,
        "max_time": None,
        "devices": 1,
        "strategy": "auto",
        "callbacks": [LIMIT, DIVERGENCE, {"class_path": "lrlhf.Checkpoints", "init_args": {"every": 1}}],
    },
    "model": {
        "class_path": "lrlhf.PPOPolicy",
        "init_args": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "lora": {"r": 2, "options": {}},
            "minibatch_size": 4,
            "micro_batch_size": 3,
            "gradient_checkpointing": False,
        },
    },
    "data": {
        "class_path": "lrlhf.AlpacaDataModule",
        "init_args": {"train": "a.jsonl", "batch_size": 8, "val_batch_size": 8, "num_workers": 0, "val_limit": None},
    },
    "ckpt_path": None,
}
MODEL, DATA = "model.init_args.", "data.init_args."


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def changed(key: str, value) -> dict:
    """The config with one value of it changed or added; a key of None changes nothing."""
    values = copy.deepcopy(CONFIG)
    *way, last = key.split(".")
    place = values
    for name in way:
        place = place[name]
    place[last] = value
    return values


def callbacks(*listed) -> dict:
    return changed("trainer.callbacks", list(listed))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed_everything", 4, "seed_everything: 3, now 4"),
        ("model.class_path", "lrlhf.SFT", "model.class_path: lrlhf.PPOPolicy, now lrlhf.SFT"),
        (MODEL + "optimizer.init_args.lr", 0.02, "model.init_args.optimizer.init_args.lr: 0.01, now 0.02"),
        (MODEL + "lora.r", 4, "model.init_args.lora.r: 2, now 4"),
        (MODEL + "lora.options", {"use_dora": True}, "model.init_args.lora.options.use_dora: None, now True"),
        (MODEL + "lora", None, "model.init_args.lora.r: 2, now None"),
        (MODEL + "minibatch_size", 8, "model.init_args.minibatch_size: 4, now 8"),
        (MODEL + "discount", 0.9, "model.init_args.discount: None, now 0.9"),
        (DATA + "train", "b.jsonl", "data.init_args.train: a.jsonl, now b.jsonl"),
        (DATA + "batch_size", 4, "data.init_args.batch_size: 8, now 4"),
        ("trainer.callbacks", None, "trainer.callbacks: "),
        ("trainer.callbacks", [LIMIT], "trainer.callbacks: "),
        ("trainer.callbacks", [DIVERGENCE, LIMIT], "trainer.callbacks: "),
        ("trainer.callbacks", [LIMIT, {**DIVERGENCE, "init_args": {"coefficient": 0.1}}], "trainer.callbacks: "),
    ],
)
def test_what_decides_what_is_learned_is_refused_by_name_with_both_values(run, key, value, told):
    with pytest.raises(
        UserError, match="holds a run with other settings .*choose another trainer.default_root_dir"
    ) as e:
        refuse_other_run(changed(key, value), run)
    assert told in str(e.value)
    assert str(run) in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (MODEL + "micro_batch_size", 1),
        (MODEL + "gradient_checkpointing", True),
        (DATA + "val_batch_size", 2),
        (DATA + "num_workers", 4),
        (DATA + "val_limit", 10),
        ("trainer.devices", 2),
        ("trainer.strategy", "fsdp2"),
        ("ckpt_path", "last.ckpt"),
        ("trainer.callbacks", [LIMIT, DIVERGENCE]),
        ("trainer.callbacks", [{"class_path": "lrlhf.Checkpoints", "init_args": {"every": 9}}, LIMIT, DIVERGENCE]),
        ("trainer.callbacks", [LIMIT, DIVERGENCE, {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]),
    ],
)
def test_what_changes_memory_speed_or_what_is_looked_at_is_free(run, key, value):
    assert refuse_other_run(changed(key, value), run) is True


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.max_epochs", 3), ("trainer.limit_train_batches", 10), ("trainer.max_time", "00:01:00:00")],
)
def test_another_length_is_the_same_run_and_told_from_an_equally_long_one(run, key, value):
    assert refuse_other_run(changed(key, value), run) is False


def test_the_same_config_is_the_same_run(run):
    assert refuse_other_run(copy.deepcopy(CONFIG), run) is True


def test_one_callback_that_is_not_in_a_list_is_the_list_of_it_and_none_is_the_empty_list(tmp_path):
    for there, here in (([LIMIT], LIMIT), ([], None), (None, {"class_path": "lrlhf.Checkpoints"})):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": there}}))
        assert refuse_other_run({"trainer": {"callbacks": here}}, tmp_path) is True


def test_five_differences_are_told_and_long_values_are_cut(run):
    values = changed(DATA + "train", "x" * 100 + ".jsonl")
    values["data"]["init_args"] |= {f"option_{i}": i for i in range(9)}
    with pytest.raises(UserError) as refused:
        refuse_other_run(values, run)
    told = str(refused.value)
    assert [f"option_{i}: None, now {i}" in told for i in range(9)] == [True] * 5 + [False] * 4
    values = changed(DATA + "train", "x" * 100 + ".jsonl")
    with pytest.raises(UserError, match=rf"train: a\.jsonl, now {'x' * 57}\.\.\.\);"):
        refuse_other_run(values, run)


def test_checkpoints_whose_config_is_gone_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds checkpoints and no config\.yaml; start over with --fresh"):
        refuse_other_run(CONFIG, tmp_path)


def test_clearing_removes_what_a_fit_writes_and_nothing_else(tmp_path):
    for name in ("checkpoints/best.ckpt", "handover/sft/adapter_config.json", "notes/handover", "plots/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    for name in ("metrics.csv", "samples.jsonl", "config.yaml", "stage.json", "model_outputs.json"):
        (tmp_path / name).write_text("x")
    for _ in range(2):  # the second finds nothing
        clear(tmp_path)
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
        assert left == ["model_outputs.json", "notes/handover", "plots/a.png", "stage.json"]


def test_clearing_a_folder_that_is_not_there_does_nothing(tmp_path):
    clear(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_a_living_one_writes_stays(tmp_path):
    code = "import os, sys; from pathlib import Path; from lrlhf.run.folder import written_whole\n"
    code += (
        "with written_whole(Path(sys.argv[1])) as scratch: (scratch / 'half').write_text(''); os.kill(os.getpid(), 9)"
    )
    folder = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -9
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    living = tmp_path / f"out.{os.getppid()}.part"
    living.mkdir()
    with written_whole(folder) as scratch:
        (scratch / "whole").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", living.name]
