"""What run folders hold, and how their configs differ."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, Line
from lrlhf.evaluation.evaluation import FILE
from lrlhf.evaluation.pairs import read_annotations
from lrlhf.report import BEFORE, STAGES
from lrlhf.report.curves import Curves, read_curves

CLASSES = {"SFT": "sft", "RewardModel": "reward", "RewardEnsemble": "reward", "DPO": "rl"}
"""The stage that a module's class is for, where a run is of one stage."""
OWN_NAMES = ("trainer.default_root_dir", "model.init_args.sft", "model.init_args.reward_model")
"""Keys whose values only name a run."""
TEXTS = {
    "self_checks.txt": "self-checks",
    "plan.json": "memory plan",
    "plan.txt": "memory plan",
    "config.yaml": "resolved config",
}
"""Files that are shown as they are, in a run's folder or in a stage's."""


@dataclass(frozen=True)
class Run:
    """What there is of a run; what lacks is empty."""

    folder: Path
    name: str
    curves: dict[str, Curves] = field(default_factory=dict)
    """By stage."""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage, as resolved by its fit."""
    texts: dict[str, str] = field(default_factory=dict)
    """Resolved configs, plans and self-checks as text, by what they are."""
    comparison: dict[str, Any] | None = None
    """The contents of comparison.json."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The contents of evaluations/*/evaluation.json; `lines` are `Line`s."""
    words: dict[str, list[str]] = field(default_factory=dict)
    """What judges said of before and after, by prompt."""


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, by their names; by their paths where two have one name.

    Raises:
        UserError: a folder that is missing, named twice, or holds no run.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise UserError(f"report: {path} is named twice.")
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """A run of `lrlhf align`, or of one stage.

    Raises:
        UserError: there is no folder, no run in it, or a comparison.json that is none.
    """
    if not folder.is_dir():
        raise UserError(f"report: there is no folder {folder}; give the folder of a run.")
    stages = {stage: folder / stage for stage in STAGES if (folder / stage).is_dir()} or _one_stage(folder)
    curves = {stage: read_curves(path / "metrics.csv") for stage, path in stages.items()}
    comparison, evaluations = _comparison(folder), _evaluations([folder, *stages.values()])
    if not comparison and not evaluations and not any(curves.values()):
        raise UserError(
            f"report: {folder} holds no metrics.csv, no comparison.json and no evaluation; give a folder of lrlhf "
            "align, or of one stage."
        )
    return Run(
        folder,
        name,
        curves,
        {stage: _config(path) for stage, path in stages.items()},
        _texts(folder, stages),
        comparison,
        evaluations,
        _words(folder),
    )


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The config keys in which runs differ that have the stage, each with its value in every run."""
    told = []
    for stage in STAGES:
        flat = [_flat(run.configs[stage]) if run.configs.get(stage) else None for run in runs]
        for key in dict.fromkeys(key for values in flat if values for key in values if key not in OWN_NAMES):
            values = ["" if values is None else str(values.get(key, "not set")) for values in flat]
            if len({value for value, has in zip(values, flat, strict=True) if has}) > 1:
                told.append((f"{stage}: {key}", values))
    return told


def stage_of(path: Path, config: dict[str, Any]) -> str:
    """The stage of a single run folder, by its config, or else by what it logged."""
    name = str((config.get("model") or {}).get("class_path", "")).rpartition(".")[2]
    logged = read_curves(path / "metrics.csv")
    guess = "rl" if "train/score" in logged else "reward" if "val/accuracy" in logged else "sft"
    return CLASSES.get(name, guess)


def _one_stage(folder: Path) -> dict[str, Path]:
    return {stage_of(folder, _config(folder)): folder}


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _texts(folder: Path, stages: dict[str, Path]) -> dict[str, str]:
    places = stages if folder in stages.values() else {"run": folder, **stages}
    return {
        f"{name}: {what}": (path / file).read_text(errors="replace")
        for name, path in places.items()
        for file, what in TEXTS.items()
        if (path / file).is_file()
    }


def _comparison(run: Path) -> dict[str, Any] | None:
    path = run / "comparison.json"
    if not path.is_file():
        return None
    comparison = _json(path)
    if not isinstance(comparison, dict) or not isinstance(comparison.get("rows"), list):
        raise UserError(f"report: {path} has no list named rows; run lrlhf align again.")
    if bad := [number for number, row in enumerate(comparison["rows"]) if not _is_row(row)]:
        raise UserError(
            f"report: row {bad[0]} of {path} is no prompt answered before and after; run lrlhf align again."
        )
    return comparison


def _is_row(row: Any) -> bool:
    needed = {"response", "learned", "length", "ended"}
    sides = (
        [row.get(side) for side in ("before", "after")] if isinstance(row, dict) and "instruction" in row else [None]
    )
    return all(isinstance(side, dict) and needed <= side.keys() for side in sides)


def _evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    paths = sorted({path for folder in folders for path in folder.glob(f"evaluations/*/{FILE}")})
    return [_evaluation(path) for path in paths]


def _evaluation(path: Path) -> dict[str, Any]:
    result = _json(path)
    try:
        return {"title": path.parent.name, **result, "lines": [_line(line) for line in result["lines"]]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"report: {path} is no result of lrlhf evaluate ({error!r}); make it again.") from None


def _line(line: dict[str, Any]) -> Line:
    value, low, high = (math.nan if line[key] is None else float(line[key]) for key in ("value", "low", "high"))
    format(value, line["style"])
    return Line(str(line["label"]), Estimate(value, low, high, line["n"]), line["style"])


def _words(run: Path) -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    for path in sorted(run.glob("evaluations/*/annotations.json")):
        for judged in read_annotations(str(path)):
            if judged.generator_1 == BEFORE:
                words.setdefault(judged.instruction, []).append(f"{judged.annotator} {judged.word}")
    return words


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"report: {path} is not valid JSON ({error}); make it again.") from None


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one with dotted keys."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = _by_class(values)
    if isinstance(values, dict) and values:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= _flat(value, f"{key}.{name}" if key else str(name))
        return found
    return {key: values}


def _by_class(values: list[Any]) -> dict[str, Any]:
    """The k-th of a class by its name, and k after the first; what has no class by its place."""
    found: dict[str, Any] = {}
    for place, value in enumerate(values):
        path = value.get("class_path") if isinstance(value, dict) else None
        name = str(path).rpartition(".")[2] if path else str(place)
        repeated = sum(other.partition("#")[0] == name for other in found)
        found[f"{name}#{repeated + 1}" if repeated else name] = value
    return found
