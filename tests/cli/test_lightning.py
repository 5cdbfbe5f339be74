"""The command line with modules and data of the user's own, and what it prints, saves and says."""

import re

import pytest
import torch
import yaml

from lrlhf.__main__ import main
from lrlhf.cli.lightning import ConfigCLI
from lrlhf.memory.command import add_options, read

BORING = "lightning.pytorch.demos.boring_classes"
SHORT = [
    "--trainer.limit_train_batches",
    "2",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.enable_progress_bar",
    "false",
]


def fails(capsys, *arguments: str) -> str:
    """What a command that cannot run says."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture
def stage(tmp_path, tiny_llama, data_files):
    """The config of a small SFT stage."""
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "limit_train_batches": 1,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {"class_path": "lrlhf.SFT", "init_args": {"base_model": tiny_llama, "lora": {"r": 2}}},
        "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": {"train": data_files["sft"], "batch_size": 4}},
    }
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


# Modules and data of one's own


@pytest.mark.parametrize("data", [["--data", f"{BORING}.BoringDataModule"], []])
def test_any_lightning_module_runs_is_saved_and_goes_on(tmp_path, capsys, data):
    """Lightning's own example, which users try first; without a data module it brings its own data."""
    arguments = ["--model", f"{BORING}.BoringModel", *data, "--trainer.default_root_dir", str(tmp_path), *SHORT]
    main(["fit", *arguments])
    first = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    main(["fit", *arguments, "--trainer.max_epochs", "2"])
    assert "Going on from" in capsys.readouterr().out
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (first["global_step"], last["global_step"]) == (2, 4)
    for command in ("validate", "test", "predict"):
        main([command, *arguments])
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--trainer.callbacks", "lrlhf.Checkpoints"])
    assert "use lightning.pytorch.callbacks.ModelCheckpoint" in capsys.readouterr().err


def test_data_of_another_kind_is_one_sentence(stage, capsys):
    said = fails(capsys, "fit", "--config", stage, "--data", f"{BORING}.BoringDataModule")
    assert "SFT takes batches of lrlhf.types.Sequences, not Tensor; use lrlhf.AlpacaDataModule" in said


def test_batches_of_ours_that_a_module_cannot_use_are_one_sentence_with_its_line(tmp_path, capsys, data_files):
    data = ["--data", "lrlhf.AlpacaDataModule", "--data.init_args.train", data_files["sft"]]
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    said = fails(capsys, "fit", "--model", f"{BORING}.BoringModel", *data, *folder, *SHORT)
    assert "BoringModel cannot use batches of lrlhf.types.Sequences, which AlpacaDataModule gives: linear()" in said
    assert re.search(r"\(line \d+ of \S+boring_classes.py\)\.$", said)


def test_another_module_does_not_go_on_from_the_first_ones_checkpoint(tmp_path, capsys):
    folder = ["--trainer.default_root_dir", str(tmp_path), *SHORT]
    main(["fit", "--model", f"{BORING}.BoringModel", *folder])
    said = fails(capsys, "fit", "--model", f"{BORING}.ManualOptimBoringModel", *folder)
    assert "holds a run with other settings (model.class_path: " in said
    main(["fit", "--model", f"{BORING}.ManualOptimBoringModel", "--fresh", *folder])


def test_a_damaged_checkpoint_of_another_module_is_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.ckpt").write_text("x")
    said = fails(capsys, "fit", "--model", f"{BORING}.BoringModel", "--ckpt_path", str(tmp_path / "bad.ckpt"))
    assert "bad.ckpt is no checkpoint, or damaged" in said


@pytest.mark.parametrize("model", ["lightning.LightningModule", "lrlhf.modules.base.AlignmentModule"])
def test_predicting_with_an_abstract_class_says_so(capsys, model):
    """Any other module predicts by its forward pass."""
    said = fails(capsys, "predict", "--model", model)
    assert f"config key model: {model.rpartition('.')[2]} has no predict_step" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", f"{BORING}.BoringModel"], "it plans modules of lrlhf, such as lrlhf.SFT, not BoringModel."),
        (["--model", "lrlhf.modules.base.AlignmentModule"], "it plans modules of lrlhf, such as lrlhf.SFT, not Align"),
        (["--model", "lrlhf.SFT"], "data.init_args.max_prompt_tokens must be set"),
        (["--model", "lrlhf.SFT", "--data", f"{BORING}.BoringDataModule"], "data.init_args.max_prompt_tokens must be"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, arguments, words):
    assert words in fails(capsys, "plan", *arguments)


def test_the_word_fsdp_is_planned_as_the_fsdp2_that_a_fit_runs(stage):
    arguments = ["--config", stage, "--trainer.strategy", "fsdp", "--trainer.devices", "2"]
    assert read(ConfigCLI("plan", add_options, arguments)).gather == "rollout"


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (["--trainer.accelerator", "gpu"], "bfloat16"),
        ([], "float32"),
        (["--trainer.accelerator", "gpu", "--model.init_args.lora", "null"], "float32"),
    ],
)
def test_a_plan_takes_the_dtype_that_auto_means_there(stage, monkeypatch, arguments, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    planned = read(ConfigCLI("plan", add_options, ["--config", stage, "--model.init_args.dtype", "auto", *arguments]))
    assert planned["dtype"] == dtype


def test_a_run_says_which_dtype_auto_was_and_goes_on_in_no_other(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    words = ["--config", stage, "--model.init_args.dtype", "auto", "--trainer.limit_val_batches", "0"]
    main(["fit", *words])
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["init_args"]["dtype"] == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    said = fails(capsys, "fit", *words, "--trainer.max_epochs", "2")
    assert "model.init_args.dtype: float32, now bfloat16" in said


@pytest.mark.parametrize("arguments", [[], ["--config", "null.yaml"], ["--model", "null"]])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "plan", "verify-resume"])
def test_without_a_module_every_command_shows_a_first_one(tmp_path, monkeypatch, capsys, command, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "null.yaml").write_text("model: null")
    said = fails(capsys, command, *arguments)
    assert said.endswith("a first command is lrlhf fit --config configs/demo/sft.yaml.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "config key model names no module"),
        (["--data", "lrlhf.AlpacaDataModule"], "config key model names no module"),
        (["--model", "lightning.LightningModule"], "config key model: LightningModule has no training_step"),
        (["--model", "lrlhf.modules.base.AlignmentModule"], "config key model: AlignmentModule has no training_step"),
        (["--model", "lrlhf.SFT"], "config key data: name a data module, such as class_path: lrlhf.AlpacaDataModule"),
        (["--model", "lrlhf.SFT", "--data", "lightning.LightningDataModule"], "config key data: name a data module"),
        (
            ["--model", "lrlhf.SFT", "--trainer", "cpu"],
            "config key trainer: expected settings, such as accelerator: cpu",
        ),
    ],
)
def test_what_is_missing_or_abstract_is_named(capsys, arguments, words):
    assert words in fails(capsys, "fit", *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: null\ndata: null", "config key model names no module, such as class_path: lrlhf.SFT"),
        ("model: lrlhf.SFT\ndata: null", "config key data: name a data module"),
        ("model: 5", "config key model: expected subclass of LightningModule or null, got 5"),
        ("trainer: cpu", "config key trainer: expected settings, such as accelerator: cpu, got cpu"),
        (
            "model: lrlhf.SFT\ntrainer: null",
            "config key trainer: expected settings, such as accelerator: cpu, got null",
        ),
    ],
)
def test_a_config_that_names_too_little_says_what_is_missing(tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert words in fails(capsys, "fit", "--config", str(tmp_path / "run.yaml"))


# What is printed, saved and said


def test_what_is_printed_is_what_runs_and_can_be_run(stage, tmp_path, capsys, tiny_llama):
    with pytest.raises(SystemExit):
        main(["fit", "--config", stage, "--print_config"])
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert not {"optimizer", "lr_scheduler"} & values.keys()
    assert (values["data"]["init_args"]["tokenizer"], values["data"]["init_args"]["task"]) == (tiny_llama, "sft")
    (tmp_path / "printed.yaml").write_text(printed)
    main(["fit", "--config", str(tmp_path / "printed.yaml")])
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["data"] == values["data"]
    assert saved["model"] == values["model"]
    main(["validate", "--config", str(tmp_path / "run/config.yaml")])


def test_one_line_says_what_trains_instead_of_a_table_of_modules(stage, caplog, capsys):
    with caplog.at_level("INFO"):
        main(["fit", "--config", stage])
    lora = "LoRA of rank 2 on k_proj (2), o_proj (2), q_proj (2), v_proj (2)"
    assert f"in float32, {lora}" in caplog.text
    assert "Training sft (0.00 M) of 0.03 M" in caplog.text
    assert "Modules in eval mode" not in caplog.text + capsys.readouterr().out


def test_a_home_folder_is_expanded_once_for_all(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", stage, "--trainer.default_root_dir", "~/run"])
    assert {path.name for path in (tmp_path / "home/run").iterdir()} == {
        "checkpoints", "config.yaml", "handover", "metrics.csv", "self_checks.txt",
    }  # fmt: skip
    assert not (tmp_path / "~").exists()
    newest = "~/run/checkpoints/iteration=000001.ckpt"
    main(["validate", "--config", "~/run/config.yaml", "--ckpt_path", newest])
    assert not (tmp_path / "~").exists()
