"""In words, whether a run made its model better, and where it began to make it worse."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from lrlhf.evaluation.estimates import Estimate, mean_interval
from lrlhf.report.curves import Curves
from lrlhf.report.runs import Run

Row = dict[str, Any]
"""One prompt of comparison.json."""
RATE = "val/win_rate/"


def paired(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(before, after) of the rows that have both."""
    pairs = [(row["before"].get(key), row["after"].get(key)) for row in rows]
    return [(before, after) for before, after in pairs if before is not None and after is not None]


def difference(rows: list[Row], key: str) -> Estimate:
    """Of after - before, paired by prompt.

    Args:
        rows: of comparison.json.
        key: of a number of each response.
    """
    return mean_interval([after - before for before, after in paired(rows, key)])


def verdict(comparison: dict[str, Any]) -> str:
    """In words, whether the gold difference excludes 0."""
    name, rows = comparison.get("gold"), comparison["rows"]
    if name is None or not paired(rows, "gold"):
        return "No gold reward was measured: a higher learned reward alone does not show better responses."
    value, low, high, n = difference(rows, "gold")
    if not math.isfinite(high - low):
        return f"Too few finite gold rewards (n = {n}) to say whether {name} changed."
    numbers = f"{value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, n = {n}"
    if low <= 0 <= high:
        return f"The gold reward {name} did not change measurably ({numbers}): the interval includes 0."
    return f"The gold reward {name} {'rose' if value > 0 else 'fell'} ({numbers}): the interval excludes 0."


def verdicts(run: Run) -> list[str]:
    """What can be said of a run in sentences; nothing of one without rollouts."""
    said = [verdict(run.comparison)] if run.comparison else []
    return [*said, over_optimisation(run)] if run.comparison or "train/score" in run.curves.get("rl", {}) else said


def over_optimisation(run: Run) -> str:
    """From where on the learned score rose while what it stands for fell (Gao et al. 2022, arXiv 2210.10760).

    By the curves of judged win rates: their best point, if the last value's interval lies wholly below that of the best
    one while the learned score ends higher. Intervals that touch are not enough, because the best of many noisy points
    is high by luck. Where no curve fell, by the gold reward before and after.
    """
    curves = run.curves.get("rl", {})
    judged = _judged(curves)
    if told := [found for judge, table in judged.items() if (found := _turning_point(judge, table))]:
        return " ".join(told)
    if run.comparison and all(paired(run.comparison["rows"], key) for key in ("gold", "learned")):
        rows = run.comparison["rows"]
        learned, gold = difference(rows, "learned"), difference(rows, "gold")
        if learned.low > 0 and gold.high < 0:
            return "Over-optimised: the learned reward rose while the gold reward fell, both beyond their intervals."
    if judged:
        return (
            f"No over-optimisation is visible: no win rate ({', '.join(judged)}) ended below its best by more than "
            "their intervals while the learned score rose."
        )
    return (
        "From where on it over-optimises, if it does, cannot be told: no judged win rate was logged twice or more "
        "(WinRateCallback)."
    )


def _judged(curves: Curves) -> dict[str, pd.DataFrame]:
    """Columns rate, low, high and learned by judge, where they were logged twice or more."""
    learned = next((curves[name].dropna() for name in ("val/score", "train/score") if name in curves), None)
    tables = {}
    for judge in (name.removeprefix(RATE) for name in curves if name.startswith(RATE) and name != f"{RATE}score"):
        columns = [curves.get(f"val/{name}/{judge}") for name in ("win_rate", "win_rate_low", "win_rate_high")]
        if learned is not None and all(column is not None for column in columns):
            table = pd.concat(columns, axis=1, keys=["rate", "low", "high"]).dropna()
            table["learned"] = [_mean_until(learned, step, table.index) for step in table.index]
            if len(table) > 1:
                tables[judge] = table
    return tables


def _turning_point(judge: str, table: pd.DataFrame) -> str | None:
    step = table["rate"].idxmax()
    best, last = table.loc[step], table.iloc[-1]
    if not (last["high"] < best["low"] and last["learned"] > best["learned"]):
        return None
    return (
        f"Over-optimised from iteration {int(step) + 1} on: the learned score went on rising "
        f"({best['learned']:.2f} to {last['learned']:.2f}) while the win rate by {judge} fell from {best['rate']:.1%} "
        f"to {last['rate']:.1%}, beyond both intervals."
    )


def _mean_until(curve: pd.Series, step: float, steps: Sequence[float]) -> float:
    """The curve's mean between the validation before a step and the step itself."""
    before = max((s for s in steps if s < step), default=-math.inf)
    near = curve[(curve.index > before) & (curve.index <= step)]
    return fmean(near) if len(near) else math.nan
