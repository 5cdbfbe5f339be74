"""What the trials of a study found, as three tables: trials, prompts and curves."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from lrlhf.report.curves import read_curves
from lrlhf.study.trials import Trial

MEASURED = ("gold", "learned", "length", "ended")
COLUMNS = {name: ("after", name) for name in (*MEASURED, "judged")} | {f"{n}_before": ("before", n) for n in MEASURED}
"""Of trials and prompts: the side of a comparison's row, and the name there."""
CURVES = ("train/score", "train/length", "train/coefficient", "train/divergence/", "val/win_rate", "val/score")
"""Beginnings of the names of metrics that are kept, step by step."""
TABLES = ("trials", "prompts", "curves")


def collect(run: Path, trials: Sequence[Trial]) -> int:
    """Write trials, prompts and curves as parquet and CSV into the study's folder, of all trials that are done.

    Args:
        run: folder of the study.
        trials: of it, done or not.

    Returns:
        How many are done.
    """
    done = [trial for trial in trials if trial.is_done()]
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for trial in done:
        comparison = json.loads((trial.folder / "comparison.json").read_text())
        who = {"condition": trial.condition, **dict(trial.factors), "seed": trial.seed}
        tables["trials"].append(who | _summary(comparison) | {"folder": str(trial.folder)})
        tables["prompts"] += [who | {"prompt": i} | _sides(row) for i, row in enumerate(comparison["rows"])]
        for name, curve in read_curves(trial.folder / "rl" / "metrics.csv").items():
            if name.startswith(CURVES):
                tables["curves"] += [who | {"metric": name, "iteration": i + 1, "value": v} for i, v in curve.items()]
    for name, rows in tables.items():
        table = pd.DataFrame(rows)
        for ending, write in ((".csv", table.to_csv), (".parquet", table.to_parquet)):
            scratch = run / f"{name}{ending}.part"
            write(scratch, index=False)
            scratch.replace(run / f"{name}{ending}")
    return len(done)


def _summary(comparison: dict[str, Any]) -> dict[str, Any]:
    """Means over the prompts before and after, and divergences per token."""
    rows, means = comparison["rows"], {}
    for column, (side, name) in COLUMNS.items():
        values = [row[side].get(name) for row in rows]
        given = [value for value in values if value is not None]  # a judge may leave some prompts without an answer
        means[column] = fmean(given) if given else None
    seconds = sum(comparison.get("seconds", {}).values())
    return means | (comparison.get("divergences") or {}) | {"seconds": seconds}


def _sides(row: dict[str, Any]) -> dict[str, Any]:
    return {column: row[side].get(name) for column, (side, name) in COLUMNS.items()}
