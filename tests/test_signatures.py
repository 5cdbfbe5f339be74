"""What is read from the source is what Python sees when it imports."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

import lrlhf
from lrlhf import _HOMES
from lrlhf.errors import UserError
from lrlhf.settings import check_configs
from lrlhf.signatures import settings_of


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


@pytest.mark.parametrize("name", sorted(_HOMES))
def test_settings_are_those_of_the_class(name):
    told = settings_of(f"lrlhf.{name}")
    assert told is None or set(told) == arguments(getattr(lrlhf, name))


def test_those_that_a_config_names_are_told():
    for name in ("SFT", "RewardModel", "PPOPolicy", "AlpacaDataModule", "DivergenceCallback", "LoRA", "Sampling"):
        assert settings_of(name)
    assert settings_of("lrlhf.LoRA")["targets"] == "list[str]"


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
        ([COEFFICIENT % "targett"], "trainer.callbacks.coefficient.targett: .* the nearest is target."),
    ],
)
def test_an_unknown_key_is_refused_without_importing_torch(tmp_path, texts, expected):
    files = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    options = [word for file in files for word in ("--config", str(file))]
    with pytest.raises(UserError, match=f"{len(texts) - 1}.yaml: config key {expected}"):
        check_configs(options)
    code = f"""
import sys
from lrlhf.cli import main
try:
    main(["fit", *{options}])
except SystemExit as stop:
    sys.exit(17 if stop.code == 1 and "torch" not in sys.modules else 18)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 17


@pytest.mark.parametrize(
    "texts",
    [
        [COEFFICIENT % "target"],
        [BASE, "model: {class_path: lrlhf.PPOPolicy, init_args: {minibatch_size: 2, lora: {r: 2}}}"],
        [BASE, "model: {class_path: mine.Module, init_args: {anything: 2}}"],
        ["model: {init_args: {anything: 2}}"],
        ["model: {class_path: lrlhf.SFT, init_args: {lora: null, optimizer: {class_path: x, init_args: {lr: 1}}}}"],
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
