"""`lrlhf align`: SFT, reward model and PPO, each an ordinary `fit` in its own folder, then a comparison and a report.

A stage that is done is skipped, one that was interrupted goes on: its folder holds stage.json with a fingerprint of
everything it is made from. A change of its config, its overrides or a stage before it starts it afresh.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrlhf.cli.settings import check_configs, import_function, read_yaml
from lrlhf.errors import UserError

STAGES = ("sft", "reward", "ppo")

USAGE = """usage: lrlhf align --config configs/demo/align.yaml [--run FOLDER] [--seed N] [--STAGE.KEY VALUE ...]

  --config FILE        names the run folder, the config files of each stage, and what to compare afterwards
  --run FOLDER         another run folder than the file's
  --seed N             another seed for every stage
  --STAGE.KEY VALUE    passed to that stage's fit as --KEY VALUE, e.g. --ppo.trainer.limit_train_batches 4
                       (STAGE is sft, reward or ppo)"""


@dataclass
class Plan:
    """What an align run is made of."""

    run: Path
    stages: dict[str, list[str]]
    compare: dict[str, Any]
    overrides: dict[str, list[str]]

    @classmethod
    def read(cls, arguments: list[str]) -> "Plan":
        """From the command line and the YAML file that it names.

        Raises:
            UserError: an unknown option or key, or a file that cannot be read.
        """
        options: dict[str, str] = {}
        overrides: dict[str, list[str]] = {stage: [] for stage in STAGES}
        for name, value in _pairs(arguments):
            stage, _, key = name.partition(".")
            if name in ("config", "run", "seed"):
                options[name] = value
            elif stage in STAGES and key:
                overrides[stage] += [f"--{key}", value]
            else:
                raise UserError(f"align: unknown option --{name}; see lrlhf align --help.")
        if "config" not in options:
            raise UserError("align needs --config FILE, e.g. configs/demo/align.yaml.")
        values = read_yaml(Path(options["config"]).expanduser(), "keys run, stages and compare")
        unknown = values.keys() - {"run", "stages", "compare"}
        if unknown:
            raise UserError(
                f"{options['config']}: unknown key {sorted(unknown)[0]!r}; it may have run, stages, compare."
            )
        stages, compare = values.get("stages") or {}, values.get("compare") or {}
        for name, section in {"stages": stages, "compare": compare}.items():
            if not isinstance(section, dict):
                raise UserError(f"{options['config']}: {name} must hold keys, got {section!r}.")
        if unknown := compare.keys() - {"gold", "prompts", "count"}:
            raise UserError(
                f"{options['config']}: unknown key compare.{sorted(unknown)[0]}; it may have gold, prompts, count."
            )
        for stage, files in stages.items():
            if stage not in STAGES:
                raise UserError(f"{options['config']}: unknown stage {stage!r}; stages are {', '.join(STAGES)}.")
            if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
                raise UserError(f"{options['config']}: stages.{stage} must be a list of config files.")
        if not stages:
            raise UserError(f"{options['config']}: stages is empty; name config files for {', '.join(STAGES)}.")
        if "seed" in options:
            for stage in STAGES:
                overrides[stage] += ["--seed_everything", options["seed"]]
        run = Path(options.get("run") or str(values.get("run") or "runs/align")).expanduser()
        ordered = {stage: stages[stage] for stage in STAGES if stage in stages}
        return cls(run, ordered, compare, overrides)


def align(arguments: list[str]) -> None:
    """Run the stages that are not done, compare the policy with its reference, and write the report."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    plan = Plan.read(arguments)
    for stage in plan.stages:
        check_configs(_arguments(plan, stage))
    if plan.compare.get("gold"):
        import_function(plan.compare["gold"])
    upstream = ""
    for stage in plan.stages:
        upstream = _run_stage(plan, stage, upstream)
    if "ppo" in plan.stages:
        from lrlhf.align.comparison import compare
        from lrlhf.align.report import write_report

        compare(plan.run, **plan.compare)
        write_report(plan.run)


def _run_stage(plan: Plan, stage: str, upstream: str) -> str:
    """Fit one stage unless it is done; its fingerprint."""
    from lrlhf.cli.lightning import run_stage

    folder, arguments = plan.run / stage, _arguments(plan, stage)
    files = [Path(file).expanduser() for file in plan.stages[stage]]
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
    _write_record(record, {"fingerprint": fingerprint})
    run_stage(arguments)
    _write_record(record, {"fingerprint": fingerprint, "seconds": round(time.perf_counter() - start, 1)})
    return fingerprint


def _arguments(plan: Plan, stage: str) -> list[str]:
    """Of the `lrlhf` command that fits the stage."""
    files = [word for file in plan.stages[stage] for word in ("--config", file)]
    folder = str(plan.run / stage)
    return ["fit", *files, "--trainer.default_root_dir", folder, *_links(plan, stage), *plan.overrides[stage]]


def _read_record(path: Path) -> dict[str, Any]:
    """What stage.json says; a stage that was begun and not ended has no `seconds`."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".json.part")
    scratch.write_text(json.dumps(record) + "\n")
    scratch.replace(path)


def _links(plan: Plan, stage: str) -> list[str]:
    """Where a stage finds what the stages before it handed over."""
    links = []
    if stage != "sft" and "sft" in plan.stages:
        links += ["--model.init_args.sft", str(plan.run / "sft" / "handover")]
    if stage == "ppo" and "reward" in plan.stages:
        links += ["--model.init_args.reward_model", str(plan.run / "reward" / "handover")]
    return links


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise UserError(f"align: expected --OPTION VALUE, got {name!r}.")
        name, has_value, value = name[2:].partition("=")
        if not has_value:
            if not rest:
                raise UserError(f"align: --{name} needs a value.")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs
