"""The plots of runs: which there are, and what is on them; drawing.py draws them."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from lrlhf.report.curves import Curves
from lrlhf.report.runs import Run
from lrlhf.report.verdict import RATE

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#475569")
DIVERGENCE = "train/divergence/"
PLOTS = (  # stage, metric, title, unit, dotted guide, what to look for
    ("rl", "score", "Learned score", "score, mean of a rollout", None,
     "Should rise and level off; held-out prompts should follow the training prompts."),
    ("rl", "length", "Response length", "tokens per response", None,
     "If it climbs with the score, the reward model may be paying for words."),
    ("sft", "loss", "SFT loss", "loss (nats per token)", None,
     "Should fall; a held-out loss that turns up again means memorising."),
    ("reward", "loss", "Reward model loss", "loss (nats per pair)", math.log(2),
     "Should fall below the dotted line, the loss of tossing a coin."),
    ("rl", "update_kl", "Update KL", "nats per token", 0.0,
     "How far one iteration moves the policy: small and steady; spikes ask for a lower learning rate."),
    ("rl", "clip_fraction", "Clip fraction", "share of tokens", 0.0,
     "Tokens stopped by the clip range: up to 0.3 is usual; near 0 the policy hardly moves."),
    ("rl", "explained_variance", "Explained variance", "share (1 = perfect critic)", 0.0,
     "Should rise above the dotted line, where the critic is no better than a constant."),
    ("rl", "entropy", "Entropy", "nats per token", None,
     "May sink slowly; a collapse to 0 means that all responses become the same."),
    ("rl", "disagreement", "Disagreement of the reward ensemble", "standard deviation of the members' scores", None,
     "If it climbs, the policy goes where no pair told the reward models what is better: an early warning."),
    ("rl", "groups_with_signal", "Groups with signal", "share of prompts", None,
     "Prompts whose responses scored differently; the others teach nothing, being too easy or too hard."),
    ("rl", "pair_loss", "Loss of pairs", "loss (per pair)", None,
     "Should fall below its start, which is log 2 for DPO's sigmoid."),
    ("rl", "accuracy", "Accuracy on pairs", "share of pairs", 0.5,
     "Pairs whose chosen response has the larger implicit reward; the dotted line is a coin's."),
    ("rl", "margin", "Margin of implicit rewards", "beta times the difference", 0.0,
     "How far apart the policy puts the two of a pair; growing long after the accuracy stopped is over-fitting."),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Points of one colour, perhaps joined, perhaps with a band around them; nan is a gap."""

    label: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    color: str
    style: Literal["line", "dashed", "points"] = "line"
    band: tuple[Sequence[float], Sequence[float]] | None = None
    hover: Sequence[str] | None = None
    error: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of a bar through each point."""


@dataclass(frozen=True)
class Plot:
    """A picture: its file name, its words, a sentence on what to look for, and its curves."""

    name: str
    title: str
    x: str
    y: str
    hint: str
    curves: list[Curve] = field(default_factory=list)
    guide: float | None = None
    diagonal: bool = False
    legend: bool = True


def make_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots whose metrics a run logged or an evaluation found, all runs in each."""
    judges = dict.fromkeys(n.removeprefix(RATE) for run in runs for n in run.curves.get("rl", {}) if n.startswith(RATE))
    plots = [frontier_plot(runs), *(win_rate_plot(runs, judge) for judge in judges)]
    plots += [metric_plot(runs, *line) for line in PLOTS]
    for i, run in enumerate(runs):
        plots += evaluation_plots(run, *((f"{i}_", f": {run.name}") if len(runs) > 1 else ("", "")))
    return [plot for plot in plots if plot.curves]


def metric_plot(
    runs: Sequence[Run], stage: str, metric: str, title: str, unit: str, guide: float | None, hint: str
) -> Plot:
    """A metric over its steps, counted from 1: training as a line, held-out dashed."""
    curves = []
    for label, color, run in _labelled(runs):
        kinds = {"training": ("train", "line"), "held-out": ("val", "dashed")}
        found = {k: run.curves.get(stage, {}).get(f"{where}/{metric}") for k, (where, _) in kinds.items()}
        for kind, values in found.items():
            if values is not None:
                alone = color if kind == "training" else COLORS[1] if len(runs) == 1 else color
                curves.append(_curve(f"{label}{kind}", values, alone, kinds[kind][1]))
    return Plot(
        f"{stage}_{metric}", title, "iteration" if stage == "rl" else "optimizer step", unit, hint, curves, guide
    )


def win_rate_plot(runs: Sequence[Run], judge: str) -> Plot:
    """A judge's win rate against the reference with its interval, and length-controlled, over iterations."""
    curves = []
    for label, color, run in _labelled(runs):
        logged = run.curves.get("rl", {})
        ends = [logged.get(f"val/win_rate_{end}/{judge}") for end in ("low", "high")]
        if (rate := logged.get(f"{RATE}{judge}")) is not None:
            band = None if ends[0] is None or ends[1] is None else (_at(ends[0], rate), _at(ends[1], rate))
            curves.append(_curve(f"{label}win rate", rate, color, "line", band))
        if (controlled := logged.get(f"val/length_controlled_win_rate/{judge}")) is not None:
            curves.append(_curve(f"{label}length-controlled", controlled, color, "dashed"))
    hint = "Against the reference; the band is the 95 % interval. What lies above the dashed line is length."
    file = re.sub(r"[^\w.-]+", "_", judge)[:80]
    return Plot(f"win_rate_{file}", f"Win rate by {judge}", "iteration", "share of prompts", hint, curves, 0.5)


def frontier_plot(runs: Sequence[Run]) -> Plot:
    """What the policy paid in divergence for its score, iteration by iteration, where both were logged."""
    curves, names = [], []
    for label, color, run in _labelled(runs):
        logged = run.curves.get("rl", {})
        name = penalised_divergence(run.configs.get("rl", {}), logged)
        both = [logged.get("train/score"), logged.get(f"{DIVERGENCE}{name}")]
        if both[0] is not None and both[1] is not None:
            points = pd.concat(both, axis=1, join="inner", keys=["score", "divergence"])
            steps = [f"iteration {step + 1:.0f}" for step in points.index]
            label = f"{label}{name}" if len(runs) > 1 else str(name)
            curves.append(Curve(label, list(points["divergence"]), list(points["score"]), color, "line", None, steps))
            names.append(str(name))
    distance = f"{' or '.join(dict.fromkeys(names))} from the reference, per token"
    hint = "The right is far from the reference. Good runs climb early; moving right without climbing pays for nothing."
    return Plot(
        "reward_against_divergence", "Reward against divergence", distance, "score, mean of a rollout", hint, curves
    )


def evaluation_plots(run: Run, prefix: str, whose: str) -> Iterable[Plot]:
    """Reliability and length, of reward models that were evaluated.

    Args:
        run: whose evaluations these are.
        prefix: of the number in a file's name.
        whose: end of a title.
    """
    for number, result in enumerate(run.evaluations):
        found, end = result.get("plots") or {}, f"{prefix}{number}"
        if bins := found.get("reliability"):
            hover = [f"{n} pairs" for n in bins["n"]]
            curve = Curve("reward model", bins["confidence"], bins["accuracy"], COLORS[0], "line", None, hover)
            hint = "On the dotted line the reward model is as often right as it says; below, it is too sure of itself."
            yield Plot(
                f"reliability_{end}", f"Reliability{whose}", "confidence", "accuracy", hint, [curve], diagonal=True
            )
        if points := found.get("score_against_length"):
            curve = Curve("response", points["length"], points["score"], COLORS[0], "points")
            hint = "A cloud that climbs to the right: the reward model pays for words."
            yield Plot(f"score_length_{end}", f"Score against length{whose}", "characters", "score", hint, [curve])


def penalised_divergence(config: dict[str, Any], logged: Curves) -> str | None:
    """The name of the divergence that a config penalises; without a config the only one that was logged.

    Args:
        config: of the stage with rollouts.
        logged: by it.
    """
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith("DivergenceCallback"):
            divergence = (callback.get("init_args") or {}).get("divergence") or "kl"
            path = divergence.get("class_path", "") if isinstance(divergence, dict) else str(divergence)
            return path.rpartition(".")[2]
    names = [name.removeprefix(DIVERGENCE) for name in logged if name.startswith(DIVERGENCE)]
    return names[0] if len(names) == 1 else None


def _labelled(runs: Sequence[Run]) -> Iterable[tuple[str, str, Run]]:
    """What stands before a curve's label, its colour, and the run; one run alone needs no name."""
    for i, run in enumerate(runs):
        yield f"{run.name}: " if len(runs) > 1 else "", COLORS[i % len(COLORS)], run


def _curve(label: str, values: pd.Series, color: str, style: Any, band: Any = None) -> Curve:
    return Curve(label, list(values.index + 1), list(values), color, style, band)


def _at(values: pd.Series, others: pd.Series) -> list[float]:
    return list(values.reindex(others.index))
