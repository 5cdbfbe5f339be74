"""`lrlhf align`: SFT, reward model and PPO or another method, each an ordinary `fit`, then a comparison and a report.

A stage that is done is skipped, one that was interrupted goes on: its folder holds stage.json with a fingerprint of
everything it is made from. A change of its config, its overrides or a stage before it starts it afresh.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from lrlhf.cli.lightning import ConfigCLI, class_of, import_name, run_stage
from lrlhf.cli.messages import CommandParser
from lrlhf.cli.start import check_config_files
from lrlhf.errors import UserError
from lrlhf.evaluation.judges import Judge
from lrlhf.files import write_json
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.report import STAGES

DESCRIPTION = """SFT, reward model and PPO (or another method), each in a folder of its own, then a comparison and a
report. An option --STAGE.KEY VALUE is passed to that stage's fit as --KEY VALUE, e.g. --rl.trainer.max_epochs 2."""


@dataclass(frozen=True)
class Stages:
    """Config files of each stage; null leaves a stage out."""

    sft: list[str] | None = None
    """Of supervised fine-tuning."""
    reward: list[str] | None = None
    """Of the reward model, or of an ensemble; left out where the method of `rl` needs none."""
    rl: list[str] | None = None
    """Of the method that moves the policy: PPO, RLOO, GRPO, DPO or expert iteration."""


@dataclass(frozen=True)
class Compare:
    """What is compared afterwards."""

    gold: str | None = None
    """Import path of a reward function that training never saw."""
    prompts: str | None = None
    """File of held-out prompts; null takes the validation prompts of `rl`."""
    count: PositiveInt = 96
    """Prompts at most."""
    judge: Judge | None = None
    """By class path, e.g. lrlhf.evaluation.LanguageModelJudge: also judges after against before, in both orders."""


@dataclass(frozen=True)
class Plan:
    """What an align run is made of."""

    stages: Stages
    """Config files of the stages."""
    run: str = "runs/align"
    """Folder of the run."""
    compare: Compare = Compare()
    """What is compared afterwards."""
    seed: int | None = None
    """Of every stage; null leaves each its own."""
    overrides: dict[str, list[str]] = field(default_factory=dict)
    """Options of a stage's fit, by stage; on the command line --STAGE.KEY VALUE."""

    @classmethod
    def read(cls, arguments: list[str]) -> "Plan":
        """From the command line and the files that it names.

        Raises:
            UserError: an unknown option or key, a value of another kind, or no stage.
        """
        mine, overrides = _divided(arguments)
        parser = CommandParser("align", DESCRIPTION)
        parser.add_class_arguments(cls, skip={"overrides"})
        parsed = parser.parse_args(mine)
        for name in ("stages", "compare"):
            if not isinstance(parsed[name], Namespace):
                raise UserError(f"config key {name}: expected keys and values, got {parsed[name]}.")
        values = parser.instantiate_classes(parsed)
        values.pop("config", None)
        plan = cls(**vars(values), overrides=overrides)
        if not plan.files:
            raise UserError(f"align: stages names no config files; give --config FILE with stages {', '.join(STAGES)}.")
        return plan

    @property
    def files(self) -> dict[str, list[str]]:
        """Config files by stage, in the order in which they run."""
        return {stage: files for stage in STAGES if (files := getattr(self.stages, stage))}

    def arguments(self, stage: str, *, reward_model: bool = True) -> list[str]:
        """Of the `lrlhf` command that fits a stage.

        Args:
            stage: its name.
            reward_model: give the last stage the reward model that was trained.
        """
        words = ["fit", *(word for file in self.files[stage] for word in ("--config", file))]
        run = Path(self.run).expanduser()
        words += ["--trainer.default_root_dir", str(run / stage)]
        if stage != "sft" and "sft" in self.files:
            words += ["--model.init_args.sft", str(run / "sft" / "handover")]
        if stage == "rl" and "reward" in self.files and reward_model:
            words += ["--model.init_args.reward_model", str(run / "reward" / "handover")]
        seed = [] if self.seed is None else ["--seed_everything", str(self.seed)]
        return words + seed + self.overrides.get(stage, [])


def main(arguments: list[str]) -> None:
    """Run the stages that are not done, compare the policy with its reference, and write the report."""
    plan = Plan.read(arguments)
    configs = {}
    for stage in plan.files:
        _, *words = plan.arguments(stage, reward_model=False)
        check_config_files(words)
        configs[stage] = ConfigCLI(f"align: {stage}", lambda parser: None, words).config
    if "reward" in configs and "rl" in configs and not needs_reward_model(configs["rl"].model):
        print("reward: skipped, the method of rl needs no reward model")
        plan = replace(plan, stages=replace(plan.stages, reward=None))
    gold = import_name(plan.compare.gold) if plan.compare.gold else None
    run, upstream = Path(plan.run).expanduser(), ""
    for stage in plan.files:
        upstream = _run_stage(plan, stage, upstream)
    if plan.stages.rl:
        from lrlhf.align.comparison import compare
        from lrlhf.report.report import write_report

        compare(run, gold, plan.compare.prompts, plan.compare.count, plan.compare.judge)
        write_report([run])


def needs_reward_model(model: Namespace) -> bool:
    """Whether a method makes rollouts that no reward function scores.

    Args:
        model: its config.
    """
    return issubclass(class_of(model), RolloutModule) and not model.init_args.get("reward_function")


def _divided(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Our own arguments, and those that begin with a stage, by stage."""
    mine: list[str] = []
    overrides: dict[str, list[str]] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        stage, dot, option = word.removeprefix("--").partition(".")
        if not (word.startswith("--") and dot and stage in STAGES):
            mine.append(word)
            continue
        value = [] if "=" in option or not words else [words.pop(0)]
        overrides[stage] = [*overrides.get(stage, []), f"--{option}", *value]
    return mine, overrides


def _run_stage(plan: Plan, stage: str, upstream: str) -> str:
    """Fit one stage unless it is done; its fingerprint."""
    folder, arguments = Path(plan.run).expanduser() / stage, plan.arguments(stage)
    files = [Path(file).expanduser() for file in plan.files[stage]]
    contents = [file.read_text() for file in files if file.is_file()]
    fingerprint = hashlib.sha256(json.dumps([upstream, arguments, contents]).encode()).hexdigest()[:16]
    record = folder / "stage.json"
    before = _read_record(record)
    same = before.get("fingerprint") == fingerprint
    if same and "seconds" in before:
        print(f"{stage}: done already in {folder}")
        return fingerprint
    arguments += [] if same else ["--fresh"]
    print(f"{stage}: lrlhf {' '.join(arguments)}")
    start = time.perf_counter()
    write_json(record, {"fingerprint": fingerprint})
    run_stage(arguments)
    write_json(record, {"fingerprint": fingerprint, "seconds": round(time.perf_counter() - start, 1)})
    return fingerprint


def _read_record(path: Path) -> dict[str, Any]:
    """What stage.json says; a stage that was begun and not ended has no `seconds`."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
