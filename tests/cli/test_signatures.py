"""What is read from the source is what Python sees when it imports."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import lightning
import pytest

import lrlhf
from lrlhf import _HOMES
from lrlhf.cli.settings import check_configs, check_run
from lrlhf.cli.signatures import defaults_of, fault, refusal, settings_of
from lrlhf.errors import UserError
from lrlhf.run.handover import Handover


def refused_without_torch(options: list[str], folder: Path) -> str:
    """What `lrlhf fit` says of them in a folder when it leaves with exit code 1 and torch was not imported."""
    code = f"""
import sys
from lrlhf.__main__ import main
try:
    main(["fit", *{options}])
except SystemExit as stop:
    sys.exit(17 if stop.code == 1 and "torch" not in sys.modules else 18)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 17
    return done.stderr


def arguments(kind: type) -> set[str] | None:
    """By import; None where a class that is not lrlhf's takes some of them."""
    if is_dataclass(kind):
        return {field.name for field in fields(kind)}
    found: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not base.__module__.startswith("lrlhf"):
                return None
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                return found - {"self"}
    return None


MADE_WITHOUT_SETTINGS = {"ChatTemplate", "RolloutCallback", "UserError"}


@pytest.mark.parametrize("name", sorted(_HOMES.keys() - MADE_WITHOUT_SETTINGS))
def test_settings_are_those_of_the_class(name):
    assert set(settings_of(f"lrlhf.{name}")) == arguments(getattr(lrlhf, name))


@pytest.mark.parametrize("name", sorted(MADE_WITHOUT_SETTINGS))
def test_of_a_class_whose_making_is_not_its_own_nothing_is_told(name):
    assert settings_of(f"lrlhf.{name}") is None


def test_settings_of_the_trainer_are_lightnings():
    parameters = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert set(settings_of("lightning.Trainer")) == parameters


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", "x", "int"),
        ("int", 1.5, "int"),
        ("int", [1], "int"),
        ("int", None, "int"),
        ("float | None", "fast", "float or null"),
        ("bool", 3, "bool"),
        ("str", [1], "str"),
        ("list[str]", 3, "list[str]"),
        ("Literal['a', 'b'] | None", "c", "one of 'a', 'b' or null"),
        ("Literal['a']", "b", "one of 'a'"),
        ("Optional[Union[int, float]]", "x", "int or float or null"),
        ("dict[str, int | None] | None", [1], "dict[str, int | None] or null"),
    ],
)
def test_a_value_of_another_kind_is_told(annotation, value, expected):
    assert refusal(annotation, value) == expected


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        ("int | None", [3, "3", 3.0, None, "null", True]),
        ("float", [1, "1e-5", 0.5, "inf"]),
        ("bool", [True, "true", "false"]),
        ("str", ["x", 3, 0.5, True]),
        ("list[str] | str", [["a"], "a"]),
        ("Literal['a', 'b'] | None", ["a", None]),
        ("LoRA | None", [3, "x", {}]),
        ("", [3, None, []]),
    ],
)
def test_nothing_is_told_of_a_value_that_a_parser_might_take(annotation, values):
    assert [refusal(annotation, value) for value in values] == [None] * len(values)


@pytest.mark.parametrize(
    ("name", "key", "value", "others"),
    [
        ("LoRA", "r", 0, {}),
        ("LoRA", "dropout", 1, {}),
        ("LoRA", "targets", [], {}),
        ("LoRA", "options", {"init_lora_weights": "pissa"}, {}),
        ("Sampling", "top_p", 0, {}),
        ("Schedule", "warmup", -1, {}),
        ("SFT", "micro_batch_size", 0, {}),
        ("SFT", "sft", "folder", {}),
        ("RewardModel", "centering", -1, {}),
        ("PPOPolicy", "inner_epochs", 0, {"reward_function": "lrlhf.rewards.sentiment"}),
        ("PPOPolicy", "trace_decay", 1.5, {"reward_function": "lrlhf.rewards.sentiment"}),
        ("PPOPolicy", "max_grad_norm", 0, {"reward_function": "lrlhf.rewards.sentiment"}),
        ("AlpacaDataModule", "val_limit", 0, {}),
        ("AdaptiveCoefficient", "rate", 0, {"target": 1}),
        ("DivergenceCallback", "coefficient", -1, {}),
        ("Checkpoints", "keep", 1, {}),
        ("RewardLimit", "limit", -0.5, {}),
    ],
)
def test_what_a_class_says_of_a_setting_is_told_in_its_words(monkeypatch, name, key, value, others):
    monkeypatch.setattr(Handover, "read", lambda folder: None)
    with pytest.raises(UserError) as refused:
        getattr(lrlhf, name)(**{key: value}, **others)
    assert fault(f"lrlhf.{name}", {key: value}) == str(refused.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("PPOPolicy", "reward_model", None),
        ("SFT", "lora", None),
        ("AlpacaDataModule", "val_split", "val"),
        ("DivergenceCallback", "coefficient", {"class_path": "lrlhf.AdaptiveCoefficient"}),
        ("LoRA", "r", 1),
        ("Sampling", "top_p", 1),
        ("AlpacaDataModule", "limit", None),
        ("torch.optim.AdamW", "lr", -1),
    ],
)
def test_a_setting_that_may_be_right_is_no_fault(name, key, value):
    assert fault(name, {key: value}) is None


def test_those_that_a_config_names_are_told():
    for name in ("SFT", "RewardModel", "PPOPolicy", "AlpacaDataModule", "DivergenceCallback", "Sampling", "Schedule"):
        assert settings_of(name)
    assert settings_of("lrlhf.LoRA")["targets"] == "list[str] | str | None"


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "mine.SFT", "lrlhf.Nothing", "lrlhf.UserError", ""])
def test_nothing_is_told_of_what_is_not_lrlhfs(name):
    assert settings_of(name) is None


COEFFICIENT = """
trainer:
  callbacks:
    - class_path: lrlhf.DivergenceCallback
      init_args: {coefficient: {class_path: lrlhf.AdaptiveCoefficient, init_args: {%s: 0.1}}}
"""
BASE = "model: {class_path: lrlhf.SFT, init_args: {dtype: float32}}"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["model: {class_path: lrlhf.SFT, init_args: {dtpe: float32}}"], "model.dtpe: .* the nearest is dtype."),
        ([BASE, "model: {init_args: {minibatch_size: 2}}"], "model.minibatch_size"),
        ([BASE, "model: {class_path: lrlhf.PPOPolicy, init_args: {minibatch_sise: 2}}"], "model.minibatch_sise"),
        (["model: {class_path: SFT, init_args: {lora: {rank: 8}}}"], "model.lora.rank: .* r, alpha"),
        (["data: {class_path: lrlhf.AlpacaDataModule, init_args: {batchsize: 2}}"], "data.batchsize"),
        (
            ["trainer: {callbacks: [{class_path: lrlhf.DivergenceCallback, init_args: {coeff: 1}}]}"],
            "trainer.callbacks.coeff: .* the nearest is coefficient.",
        ),
        ([BASE, "model: {init_args: {lora: {r: eight}}}"], "model.lora.r: expected int, got eight."),
        ([BASE, "model: {init_args: {dtype: int8}}"], "model.dtype: expected one of 'float32', .*, got int8."),
        ([BASE, "model: {init_args: {micro_batch_size: 0}}"], "model.micro_batch_size=0 must be at least 1."),
        (["trainer: {max_epoch: 3}"], "trainer.max_epoch: .* the nearest is max_epochs."),
        (["trainer: {max_epochs: three}"], "trainer.max_epochs: expected int or null, got three."),
        ([COEFFICIENT % "targett"], "trainer.callbacks.coefficient.targett: .* the nearest is target."),
    ],
)
def test_an_unknown_key_or_a_bad_value_is_refused_without_importing_torch(tmp_path, texts, expected):
    files = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    options = [word for file in files for word in ("--config", str(file))]
    with pytest.raises(UserError, match=f"{len(texts) - 1}.yaml: (config key )?{expected}"):
        check_configs(options)
    assert refused_without_torch(options, tmp_path)


@pytest.mark.parametrize(
    "texts",
    [
        [COEFFICIENT % "target"],
        [BASE, "model: {class_path: lrlhf.PPOPolicy, init_args: {minibatch_size: 2, lora: {r: 2}}}"],
        [BASE, "model: {class_path: mine.Module, init_args: {anything: 2}}"],
        ["model: {init_args: {anything: 2}}"],
        ["model: {class_path: lrlhf.SFT, init_args: {lora: null, optimizer: {class_path: x, init_args: {lr: 1}}}}"],
        ["trainer: {callbacks+: {class_path: lrlhf.SampleLog}, strategy: {class_path: lrlhf.FSDP2Strategy}}"],
        ["model: lrlhf.SFT", "data:", "trainer: {callbacks: null}", "trainer: {callbacks: [mine.Callback]}"],
    ],
)
def test_what_may_be_right_passes(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.yaml").write_text(text)
    check_configs([f"--config={tmp_path}/{i}.yaml" for i in range(len(texts))])


def test_a_class_given_as_an_option_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {init_args: {minibatch_size: 2}}")
    check_configs(["--model", "lrlhf.PPOPolicy", "--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError, match="model.minibatch_size"):
        check_configs(["--model=lrlhf.SFT", f"--config={tmp_path}/a.yaml"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "lrlhf.PPOPolicy", "--model.lora.r", "x"], "model.lora.r: expected int, got x."),
        (["--model.class_path=lrlhf.SFT", "--model.init_args.schedule.nam=z"], "model.schedule.nam: there is no"),
        (["--model=lrlhf.SFT", "--model.lora.dropout", "1.5"], "lora.dropout=1.5 must lie in"),
        (["--trainer.max_epochs=two"], "trainer.max_epochs: expected int or null, got two."),
    ],
)
def test_settings_given_as_options_are_checked_too(options, expected):
    with pytest.raises(UserError, match=f"^(config key )?{expected}"):
        check_configs(options)


@pytest.mark.parametrize(
    "options", [["--model.anything", "1"], ["--trainer.callbacks+=lrlhf.SampleLog"], ["--model.help", "lrlhf.SFT"]]
)
def test_options_that_may_be_right_pass(options):
    check_configs(options)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PPOPolicy", {}),
        ("PPOPolicy", {"reward_model": "folder", "reward_function": "lrlhf.rewards.sentiment"}),
        ("PPOPolicy", {"lora": None, "dtype": "bfloat16", "reward_function": "lrlhf.rewards.sentiment"}),
        ("SFT", {"lora": None, "quantize": lrlhf.Quantization()}),
        ("AlpacaDataModule", {"splits": {"a": 3, "b": None}, "train_split": "c"}),
        ("AlpacaDataModule", {"splits": {"a": 3, "b": None}, "val_split": "a"}),
        ("AlpacaDataModule", {"splits": {"a": 3, "b": None}, "train_split": "a", "val_split": "a"}),
    ],
)
def test_what_a_class_says_of_settings_that_contradict_each_other_is_told_in_its_words(monkeypatch, name, settings):
    monkeypatch.setattr(Handover, "read", lambda folder: None)
    with pytest.raises(UserError) as refused:
        getattr(lrlhf, name)(**settings)
    assert fault(name, defaults_of(name) | settings) == str(refused.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PPOPolicy", {"reward_model": "folder"}),
        ("SFT", {}),
        ("SFT", {"lora": None}),
        ("RewardModel", {"dtype": "bfloat16", "sft": "folder"}),
        ("AlpacaDataModule", {}),
        ("AlpacaDataModule", {"splits": {"a": 3, "b": None}, "train_split": "a", "val_split": "b"}),
    ],
)
def test_settings_that_a_class_takes_together_are_no_fault(monkeypatch, name, settings):
    monkeypatch.setattr(Handover, "read", lambda folder: None)
    getattr(lrlhf, name)(**settings)
    assert fault(name, defaults_of(name) | settings) is None


def test_defaults_are_those_of_the_classes():
    for name in ("SFT", "PPOPolicy", "AlpacaDataModule"):
        kind, found = getattr(lrlhf, name), defaults_of(name)
        made = {
            key: p.default for base in kind.__mro__[::-1] for key, p in _arguments(base) if p.default is not p.empty
        }
        assert found.keys() == made.keys()
        for key, value in found.items():
            assert value is ... or value == made[key]
    assert defaults_of("PPOPolicy")["minibatch_size"] == 128


def _arguments(kind):
    ours = kind.__module__.startswith("lrlhf.") and "__init__" in vars(kind)
    return list(inspect.signature(kind.__init__).parameters.items()) if ours else []


POLICY = "model: {class_path: lrlhf.PPOPolicy, init_args: {reward_function: lrlhf.rewards.vader_sentiment}}"
DATA = "data: {class_path: lrlhf.AlpacaDataModule, init_args: {train: %s}}"


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        (["model: {class_path: lrlhf.PPOPolicy}"], [], "PPO needs one source of reward"),
        ([POLICY, "model: {init_args: {lora: null}}"], ["--model.dtype", "bfloat16"], "model.dtype=bfloat16 with lora"),
        ([POLICY], ["--model.sft", "nowhere"], "nowhere is no hand-over folder"),
        (["model: {class_path: lrlhf.RewardModel, init_args: {sft: nowhere}}"], [], "nowhere is no hand-over folder"),
        ([POLICY, DATA % "nothing.json"], [], "data file nothing.json does not exist."),
        ([POLICY, DATA % "[0.yaml, nothing.json]"], [], "data file nothing.json does not exist."),
        ([POLICY, DATA % "."], [], "data . is a folder without data files"),
        ([POLICY, DATA % "0.yaml"], ["--data.val=[0.yaml,nothing.json]"], "data file nothing.json does not exist."),
    ],
)
def test_a_contradiction_or_a_missing_file_is_told_without_importing_torch(tmp_path, texts, options, expected):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.yaml").write_text(text)
        options = [*options, "--config", f"{i}.yaml"]
    assert expected in refused_without_torch(options, tmp_path)


@pytest.mark.parametrize(
    ("command", "texts", "options"),
    [
        ("fit", [DATA % "nothing.json", DATA % "0.yaml"], []),
        ("fit", [DATA % "nothing.json"], ["--data.train", "owner/name"]),
        ("fit", [DATA % "nothing.json"], ["--print_config"]),
        ("fit", [DATA % "nothing.json"], ["--print_config=skip_default"]),
        ("fit", [DATA % "nothing.json"], ["--model.help", "lrlhf.SFT"]),
        ("fit", [DATA % "nothing.json"], ["-h"]),
        ("fit", [DATA % "nothing.json"], ["--data.train", "[0.yaml, owner/name]"]),
        ("validate", [DATA % "nothing.json"], []),
        ("fit", [DATA % "0.yaml, splits: {val: 3, train: null}, train_split: train"], ["--data.splits.val", "5"]),
        ("fit", [DATA % "0.yaml, train_split: train"], ["--data.splits", "{val: 5, train: null}"]),
        ("fit", [DATA % "0.yaml"], ["--data.val", "[owner/name"]),
        ("fit", ["data: {class_path: mine.Data, init_args: {train: nothing.json}}"], []),
        ("fit", ["model: {class_path: lrlhf.PPOPolicy}", "model: {class_path: lrlhf.SFT}"], []),
    ],
)
def test_what_a_later_file_or_another_command_makes_right_passes(monkeypatch, tmp_path, command, texts, options):
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.yaml").write_text(text)
    model = [] if any("model:" in text for text in texts) else ["--model", "lrlhf.SFT"]
    check_run(command, [*model, *(f"--config={i}.yaml" for i in range(len(texts))), *options])


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "lrlhf.AlpacaDataModule", "--data.init_args.train", "data.jsonl", "--data.limit", "3"],
        ["--model", "lrlhf.SFT", "--model.base_model", "model.gguf", "--model.lora", "null"],
    ],
)
def test_a_value_that_looks_like_an_option_is_none(options):
    check_configs(options)
