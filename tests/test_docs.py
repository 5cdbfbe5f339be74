"""What the documents name exists, and what they tell to type runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

import lrlhf
import lrlhf.functional
from lrlhf import chat, evaluation
from lrlhf.__main__ import USAGE
from lrlhf.align.align import Plan
from lrlhf.cli import verify_resume
from lrlhf.cli.lightning import CLI, AlignmentCLI, ConfigCLI
from lrlhf.evaluation import command as evaluate
from lrlhf.export import command as export
from lrlhf.memory.command import add_options, read
from lrlhf.modules.base import AlignmentModule
from lrlhf.study import command as study
from lrlhf.study.trials import stages_of
from tests.modules.helpers import train_reward, train_sft

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_file_that_a_document_names_exists(path):
    for name in re.findall(r"(?:configs|docs|demo/data)/[\w./-]+\.(?:yaml|md|jsonl|png)", path.read_text()):
        assert (ROOT / name).is_file() or "NAME" in name, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_public_name_that_a_document_uses_exists(path):
    for name in re.findall(r"\blrlhf\.([A-Z]\w+)", path.read_text()):
        assert hasattr(lrlhf, name), name
    for name in re.findall(r"\blrlhf\.functional\.([a-z_]+)\b", path.read_text()):
        assert hasattr(lrlhf.functional, name), name


def test_the_swap_in_the_readme_runs(tmp_path, tiny_llama, data_files, monkeypatch):
    """The Python block of the README, on the tiny model."""
    code = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Trainer" in b)
    code = code.replace("runs/mine", str(tmp_path)).replace("demo/data/prompts.jsonl", data_files["prompts"])
    code = re.sub(r'base_model="[^"]+"', f'base_model="{tiny_llama}"', code).replace(
        "smollm2-135m-instruct", tiny_llama
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "handover/manifest.json").is_file()


# Commands


def commands() -> list[str]:
    """Every lrlhf command that help, README, docs and configs show, each once."""
    texts = [USAGE, *(path.read_text() for path in DOCUMENTS)]
    place = r"(?:^|: +|^#\s+|^#\s+OPENAI_API_KEY=\S+ |`|^\s*srun .*)"
    shown = [found for text in texts for found in re.findall(place + r"(lrlhf [a-z-]+ [^`\n]*)", text, re.M)]
    lines = {re.split(r"\s+#|\s{2,}(?=[A-Z])", command)[0].strip() for command in shown}
    return sorted(line for line in lines if " --config " in line or line.split()[1] in ("report", "export", "chat"))


class Built(AlignmentCLI):
    """A command that ends when model and data are built."""

    def instantiate_trainer(self, **_):
        return None

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_llama, data_files):
    """A folder like a checkout in which the earlier stages have run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "demo"):
        (folder / name).symlink_to(ROOT / name)
    train_sft(tiny_llama, data_files, folder / "sft", limit_train_batches=1)
    train_reward(tiny_llama, data_files, folder / "reward", sft=str(folder / "sft/handover"), limit_train_batches=1)
    for run in ("runs", "runs/demo"):
        for stage in ("sft", "reward"):
            shutil.copytree(folder / stage / "handover", folder / run / stage / "handover")
            shutil.copy(ROOT / f"configs/demo/{stage}.yaml", folder / run / stage / "config.yaml")
    (folder / "data").mkdir()
    shutil.copy(data_files["pairs"], folder / "data/alpaca_human_preference.json")  # which configs/reward.yaml asks for
    (folder / "runs/ppo").mkdir()
    shutil.copy(ROOT / "configs/demo/sft.yaml", folder / "runs/ppo/config.yaml")
    shutil.copy(ROOT / "configs/demo/sft.yaml", folder / "run.yaml")
    return folder


def test_there_are_commands_to_check():
    assert {line.split()[1] for line in commands()} >= {
        "fit",
        "validate",
        "predict",
        "plan",
        "align",
        "evaluate",
        "export",
        "chat",
        "report",
    }
    assert len(commands()) > 15


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_runs_as_shown(line, checkout, monkeypatch):
    """To the point where model and data are built, or the plan's job is read."""
    monkeypatch.chdir(checkout)
    command, *arguments = shlex.split(line)[1:]
    if command in ("fit", "validate", "test", "predict"):
        built = Built(**CLI, args=[command, *arguments])
        assert isinstance(built.model, AlignmentModule)
        assert isinstance(built.datamodule, lrlhf.AlpacaDataModule)
    elif command == "verify-resume":
        assert ConfigCLI(command, verify_resume.add_options, arguments).config.kill_at
    elif command == "plan":
        assert read(ConfigCLI(command, add_options, arguments)).rows
    elif command == "align":
        plan = Plan.read(arguments)
        for stage in plan.files:
            ConfigCLI("align", lambda parser: None, plan.arguments(stage)[1:])
    elif command == "study":
        found = study.read(arguments)
        for trial in [trial for trial in found.trials() if trial.seed == found.seeds[0]]:
            Path("changes.yaml").write_text(yaml.safe_dump({"trainer": {}, **trial.changes.get("rl", {})}))
            files = [*stages_of(trial.align)["rl"], "changes.yaml"]
            words = [word for file in files for word in ("--config", file)]
            words += ["--model.init_args.reward_model", "runs/demo/reward/handover"]
            built = Built(**CLI, args=["fit", *words])
            assert isinstance(built.model, AlignmentModule)
    elif command == "evaluate":
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        for name in ("model_outputs", "reference_outputs", "annotations"):
            Path(f"{name}.json").write_text('[{"instruction": "a", "output_1": "b", "output_2": "c"}]')
        assert isinstance(evaluate.parse(arguments)[0], evaluation.Evaluation)
    elif command in ("export", "chat"):
        assert {"export": export, "chat": chat}[command].parse(arguments).source
    else:
        assert command == "report"
        assert arguments
