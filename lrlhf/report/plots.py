"""The plots of a run, from its metrics.csv files: reward against divergence first."""

import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from lrlhf.errors import UserError
from lrlhf.report import STAGES
from lrlhf.report.curves import Curves, read_curves

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


class Plot(NamedTuple):
    """A figure, its file name, and a sentence on what to look for."""

    name: str
    hint: str
    figure: Figure


def make_plots(run: Path) -> list[Plot]:
    """The plots whose metrics an align run logged."""
    stages = {stage: read_curves(run / stage / "metrics.csv") for stage in STAGES}
    plots = [frontier_plot(stages["ppo"], penalised_divergence(run, stages["ppo"]))]
    for stage, metric, title, unit, guide, hint in PLOTS:
        found = {"training": stages[stage].get(f"train/{metric}"), "held-out": stages[stage].get(f"val/{metric}")}
        curves = {label: curve for label, curve in found.items() if curve is not None}
        if curves:
            steps = "PPO iteration" if stage == "ppo" else "optimizer step"
            plots.append(Plot(f"{stage}_{metric}", hint, line_figure(title, steps, unit, curves, guide)))
    return [plot for plot in plots if plot]


def line_figure(title: str, steps: str, unit: str, curves: Curves, guide: float | None) -> Figure:
    """Curves over their steps, counted from 1."""
    figure, axes = _axes(title, steps, unit)
    for (label, curve), color in zip(curves.items(), ("#2563eb", "#ea580c"), strict=False):
        marker = "o" if len(curve) <= 40 else ""
        axes.plot(curve.index + 1, curve.values, marker=marker, ms=3.5, lw=1.4, color=color, label=label)
    if guide is not None:
        axes.axhline(guide, color="#475569", lw=1.2, ls=":")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def frontier_plot(ppo: Curves, name: str | None) -> Plot | None:
    """What the policy paid in divergence for its score, iteration by iteration; None where one was not logged.

    Args:
        ppo: what the PPO stage logged.
        name: of the divergence.
    """
    both = [ppo.get("train/score"), ppo.get(f"{DIVERGENCE}{name}")]
    if any(curve is None for curve in both):
        return None
    points = pd.concat(both, axis=1, join="inner", keys=["score", "divergence"])
    distance = f"{name} from the reference, per token"
    figure, axes = _axes("Reward against divergence", distance, "score, mean of a rollout")
    axes.plot(points["divergence"], points["score"], color="#cbd5e1", lw=1, zorder=1)
    dots = axes.scatter(points["divergence"], points["score"], c=points.index + 1, cmap="viridis", s=26, zorder=2)
    figure.colorbar(dots, label="PPO iteration")
    hint = "The right is far from the reference. Good runs climb early; moving right without climbing pays for nothing."
    return Plot("reward_against_divergence", hint, figure)


def penalised_divergence(run: Path, ppo: Curves) -> str | None:
    """The name of the divergence that the run's config penalises; without a config the only one that was logged.

    Args:
        run: folder of an align run.
        ppo: what its PPO stage logged.
    """
    try:
        callbacks = yaml.safe_load((run / "ppo" / "config.yaml").read_text())["trainer"]["callbacks"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        callbacks = None
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith("DivergenceCallback"):
            divergence = (callback.get("init_args") or {}).get("divergence") or "kl"
            path = divergence.get("class_path", "") if isinstance(divergence, dict) else str(divergence)
            return path.rpartition(".")[2]
    logged = [name.removeprefix(DIVERGENCE) for name in ppo if name.startswith(DIVERGENCE)]
    return logged[0] if len(logged) == 1 else None


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.8)
    return figure, axes
