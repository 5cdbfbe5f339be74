"""In words, whether a run made its model better, and where it began to make it worse."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

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


def over_optimisation(run: Run) -> str:
    """From where on the learned score rose while what it stands for fell (Gao et al. 2022, arXiv 2210.10760).

    By the curves of judged win rates: past the best point, the last value lies below the best one's interval while the
    learned score is higher. Without curves, by the gold reward before and after.
    """
    curves = run.curves.get("ppo", {})
    judges = [name.removeprefix(RATE) for name in curves if name.startswith(RATE) and name != f"{RATE}score"]
    if told := [found for judge in judges if (found := _turning_point(curves, judge))]:
        return " ".join(told)
    if run.comparison and paired(run.comparison["rows"], "gold"):
        rows = run.comparison["rows"]
        learned, gold = difference(rows, "learned"), difference(rows, "gold")
        if learned.low > 0 and gold.high < 0:
            return "Over-optimised: the learned reward rose while the gold reward fell, both beyond their intervals."
    if judges:
        return (
            f"No over-optimisation is visible: no win rate ({', '.join(judges)}) fell below the interval of its best."
        )
    return (
        "From where on it over-optimises, if it does, cannot be told: no judged win rate was logged (WinRateCallback)."
    )


def _turning_point(curves: Curves, judge: str) -> str | None:
    rate, low = curves[f"{RATE}{judge}"].dropna(), curves.get(f"val/win_rate_low/{judge}")
    learned = next((curves[name].dropna() for name in ("val/score", "train/score") if name in curves), None)
    if low is None or learned is None or len(rate) < 2:
        return None
    best, last = rate.idxmax(), rate.index[-1]
    then, now = (_mean_near(learned, step, rate.index) for step in (best, last))
    if best == last or not rate[last] < low.get(best, math.nan) or not now > then:
        return None
    return (
        f"Over-optimised from iteration {int(best) + 1} on: the learned score went on rising ({then:.2f} to {now:.2f}) "
        f"while the win rate by {judge} fell from {rate[best]:.1%} to {rate[last]:.1%}, below the interval of its best."
    )


def _mean_near(curve: Any, step: float, steps: Sequence[float]) -> float:
    """The curve's mean between the validation before a step and the step itself."""
    before = max((s for s in steps if s < step), default=-math.inf)
    near = curve[(curve.index > before) & (curve.index <= step)]
    return fmean(near) if len(near) else math.nan
