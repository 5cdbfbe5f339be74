"""The plots of a run, from its metrics.csv files: reward against divergence first."""

import csv
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lrlhf.errors import UserError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError(f"lrlhf report needs {error.name}: pip install 'lrlhf[demo]'.") from None

DIVERGENCE = "train/divergence/"
PLOTS = (  # stage, metric, title, unit, dotted guide, what to look for
    ("ppo", "score", "Learned score", "score, mean of a rollout", None,
     "Should rise and level off; held-out prompts should follow the training prompts."),
    ("ppo", "length", "Response length", "tokens per response", None,
     "If it climbs with the score, the reward model may be paying for words."),
    ("sft", "loss", "SFT loss", "loss (nats per token)", None,
     "Should fall; a held-out loss that turns up again means memorising."),
    ("reward", "loss", "Reward model loss", "loss (nats per pair)", math.log(2),
     "Should fall below the dotted line, the loss of tossing a coin."),
    ("ppo", "update_kl", "Update KL", "nats per token", 0.0,
     "How far one iteration moves the policy: small and steady; spikes ask for a lower learning rate."),
    ("ppo", "clip_fraction", "Clip fraction", "share of tokens", 0.0,
     "Tokens stopped by PPO's clip range: up to 0.3 is usual; near 0 the policy hardly moves."),
    ("ppo", "explained_variance", "Explained variance", "share (1 = perfect critic)", 0.0,
     "Should rise above the dotted line, where the critic is no better than a constant."),
    ("ppo", "entropy", "Entropy", "nats per token", None,
     "May sink slowly; a collapse to 0 means that all responses become the same."),
)  # fmt: skip

Curves = dict[str, dict[int, float]]
"""Metrics by name: the value at each step that logged it."""


class Plot(NamedTuple):
    """A figure, its file name, and a sentence on what to look for."""

    name: str
    hint: str
    figure: Figure


def read_curves(path: Path) -> Curves:
    """The columns of a CSVLogger file; none without the file."""
    curves: Curves = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    with suppress(ValueError, TypeError):  # empty, or the last line of a run that was killed
                        step, value = int(row["step"]), float(cell)
                        curves.setdefault(name, {})[step] = value
    return curves


def make_plots(stages: dict[str, Curves]) -> list[Plot]:
    """The plots whose metrics were logged."""
    plots = [frontier_plot(stages["ppo"])]
    for stage, metric, title, unit, guide, hint in PLOTS:
        found = {"training": stages[stage].get(f"train/{metric}"), "held-out": stages[stage].get(f"val/{metric}")}
        curves = {label: curve for label, curve in found.items() if curve}
        if curves:
            steps = "PPO iteration" if stage == "ppo" else "optimizer step"
            plots.append(Plot(f"{stage}_{metric}", hint, line_figure(title, steps, unit, curves, guide)))
    return [plot for plot in plots if plot]


def line_figure(title: str, steps: str, unit: str, curves: Curves, guide: float | None) -> Figure:
    """Curves over their steps, counted from 1."""
    figure, axes = _axes(title, steps, unit)
    for (label, curve), color in zip(curves.items(), ("#2563eb", "#ea580c"), strict=False):
        marker = "o" if len(curve) <= 40 else ""
        axes.plot([s + 1 for s in curve], list(curve.values()), marker=marker, ms=3.5, lw=1.4, color=color, label=label)
    if guide is not None:
        axes.axhline(guide, color="#475569", lw=1.2, ls=":")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def frontier_plot(ppo: Curves) -> Plot | None:
    """What the policy paid in divergence for its score, iteration by iteration."""
    name, score = penalty_divergence(ppo), ppo.get("train/score", {})
    divergence = ppo.get(f"{DIVERGENCE}{name}", {})
    steps = sorted(score.keys() & divergence.keys())
    if not steps:
        return None
    distance = f"{name} from the reference, per token"
    figure, axes = _axes("Reward against divergence", distance, "score, mean of a rollout")
    x, y = [divergence[step] for step in steps], [score[step] for step in steps]
    axes.plot(x, y, color="#cbd5e1", lw=1, zorder=1)
    points = axes.scatter(x, y, c=[step + 1 for step in steps], cmap="viridis", s=26, zorder=2)
    figure.colorbar(points, label="PPO iteration")
    hint = "The right is far from the reference. Good runs climb early; moving right without climbing pays for nothing."
    return Plot("reward_against_divergence", hint, figure)


def penalty_divergence(ppo: Curves) -> str | None:
    """The divergence that was penalised: the one for which penalty = coefficient * length * divergence per token."""
    names = [name.removeprefix(DIVERGENCE) for name in ppo if name.startswith(DIVERGENCE)]
    penalty, coefficient, length = (ppo.get(f"train/{name}", {}) for name in ("penalty", "coefficient", "length"))

    def mismatch(name: str) -> float:
        curve = ppo[DIVERGENCE + name]
        steps = curve.keys() & penalty.keys() & coefficient.keys() & length.keys()
        return sum(abs(penalty[s] - coefficient[s] * length[s] * curve[s]) for s in steps)

    return min(names, key=lambda name: (mismatch(name), name != "kl"), default=None)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.8)
    return figure, axes
