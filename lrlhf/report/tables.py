"""The numbers of a run as lines of text: label, value, interval, n."""

import math
import unicodedata
from statistics import fmean
from typing import Any

from lrlhf.evaluation.estimates import Estimate, mean_interval, wilson_interval
from lrlhf.report import AFTER, BEFORE
from lrlhf.report.verdict import Row, difference, paired

SIDES = ("before", "after")
CAVEAT = "Intervals cover the choice of prompts, not another training seed."
HEADINGS = ("", "Value", "95 % interval", "n")
Line = tuple[str, str, str, str]
"""Label, value, interval, n."""


def make_table(comparison: dict[str, Any]) -> dict[str, list[Line]]:
    """The lines under each heading, without what was not measured."""
    rows, table = comparison["rows"], {}
    if model := comparison.get("reward_model"):
        accuracy = _line("accuracy", wilson_interval(model["accuracy"], int(model.get("pairs") or 0)), ".1%")
        longer = model.get("longer_accuracy")
        baseline = [] if longer is None else [("baseline: the longer wins", f"{longer:.1%}", "", "")]
        table["Reward model, held-out pairs"] = [accuracy, *baseline]
    for title, key, style, estimate in (
        ("Learned reward", "learned", ".3f", mean_interval),
        (f"Gold reward: {comparison.get('gold')}", "gold", ".3f", mean_interval),
        ("Response length, tokens", "length", ".1f", mean_interval),
        ("Ended by itself (difference in points)", "ended", ".1%", lambda v: wilson_interval(fmean(v), len(v))),
    ):
        if pairs := paired(rows, key):
            before, after = ([pair[side] for pair in pairs] for side in (0, 1))
            table[title] = [
                _line(BEFORE, estimate(before), style),
                _line(AFTER, estimate(after), style),
                _line("difference, paired", difference(rows, key), f"+{style}"),
            ]
    if divergences := comparison.get("divergences"):
        lines = [(name, f"{value:.4f}", "", "") for name, value in divergences.items()]
        table["Divergence per token after (0 before)"] = lines
    return table


def _line(label: str, estimate: Estimate, style: str) -> Line:
    value, low, high, n = estimate
    interval = f"{low:{style}} to {high:{style}}" if math.isfinite(high - low) else ""
    return label, f"{value:{style}}", interval, str(n or "")


def evaluation_table(result: dict[str, Any]) -> list[Line]:
    """The lines of an evaluation."""
    return [_line(label, estimate, style) for label, estimate, style in result["lines"]]


def choose_samples(rows: list[Row], count: int = 5) -> tuple[str, list[tuple[int, Row]]]:
    """How they were chosen, and (rank, row) at evenly spaced ranks of the difference, from the largest fall up.

    Args:
        rows: of comparison.json.
        count: samples at most.
    """
    key = next((key for key in ("gold", "learned") if len(paired(rows, key)) == len(rows)), "length")
    names = {"gold": "gold reward", "learned": "learned reward", "length": "length"}
    ranked = sorted(rows, key=lambda row: row["after"][key] - row["before"][key])
    places = dict.fromkeys(round(i * (len(ranked) - 1) / (count - 1)) for i in range(count)) if ranked else {}
    note = (
        f"Not picked by hand: evenly spaced ranks of the {names[key]}'s difference among {len(rows)} prompts, "
        "from the largest fall to the largest rise."
    )
    return note, [(place + 1, ranked[place]) for place in places]


def describe(side: dict[str, Any]) -> str:
    """The numbers of one response."""
    rewards = [f"{key} {side[key]:.2f}, " for key in ("gold", "learned") if side.get(key) is not None]
    return f"{''.join(rewards)}{side['length']} tokens{'' if side['ended'] else ', cut off'}"


def describe_seconds(seconds: dict[str, float]) -> str:
    """Time per stage and together."""
    parts = [f"{stage} {value:.0f} s" for stage, value in seconds.items()]
    return f"Time: {', '.join(parts)}; together {sum(seconds.values()) / 60:.1f} minutes." if parts else ""


def printable(text: str) -> str:
    """Without control characters, which a terminal obeys, and halves of surrogate pairs, which no file can hold."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
