"""A study as tables and plots: conditions over seeds, the comparisons that were named, reward against divergence."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate
from lrlhf.report.plots import COLORS, Curve, Plot

FILE = "study.json"
OUTCOMES = {"gold": "gold reward", "learned": "learned reward", "judged": "win rate over the reference"}
HEADINGS = ("condition", "seeds", "{outcome}", "95 % interval")
MEANS = (
    ("exact_kl", "exact KL a token", ".4f"),
    ("length", "length", ".1f"),
    ("learned", "learned", ".3f"),
    ("gold", "gold", ".3f"),
    ("judged", "win rate", ".3f"),
)
"""Columns of trials behind the outcome: name, heading, digits; those that were measured and are not the outcome."""
OF_ONE_REWARD_MODEL = ("learned", "train/score", "val/win_rate/score")
"""What is shown only where one reward model scored all trials: scores of several have no common scale."""
COMPARED = ("comparison", "seeds", "difference", "95 % interval", "p, corrected", "verdict", "seeds for {effect:g}")


@dataclass(frozen=True)
class StudyResults:
    """What there is of a study."""

    name: str
    plan: dict[str, Any]
    """The contents of study.json."""
    trials: pd.DataFrame
    prompts: pd.DataFrame
    """Those with an outcome in every trial."""
    curves: pd.DataFrame
    left_out: int = 0
    """Prompts without."""

    @property
    def outcome(self) -> str:
        """In words."""
        return OUTCOMES[self.plan["outcome"]]

    def shows(self, name: str) -> bool:
        """Whether a column of trials, or a curve, means the same in all conditions."""
        return self.plan.get("one_reward_model", True) or name not in OF_ONE_REWARD_MODEL

    @property
    def conditions(self) -> list[str]:
        """Those with a trial, in the order of the study."""
        there = set(self.trials["condition"])
        return [name for name in self.plan["order"] if name in there]

    def values(self, condition: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """The outcome [S, P] of a condition, by seed and prompt.

        Args:
            condition: its name.
            seeds: which, in this order; None for all that there are.
        """
        rows = self.prompts[self.prompts["condition"] == condition]
        table = rows.pivot(index="seed", columns="prompt", values=self.plan["outcome"]).sort_index()
        return table.loc[list(seeds) if seeds is not None else table.index].to_numpy(float)

    def seeds(self, condition: str) -> set[int]:
        """Those whose trial is done."""
        return set(self.trials.loc[self.trials["condition"] == condition, "seed"])


def read_study(folder: Path) -> StudyResults:
    """The tables of a study.

    Raises:
        UserError: no trial is done, or its outcome was not measured.
    """
    plan = json.loads((folder / FILE).read_text())
    paths = [folder / f"{name}.csv" for name in ("trials", "prompts", "curves")]
    if not paths[0].is_file() or len(paths[0].read_text().strip().splitlines()) < 2:
        raise UserError(f"report: no trial of the study {folder} is done yet; run lrlhf study.")
    text = {"condition": str}
    trials, prompts = (pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""]) for path in paths[:2])
    curves = pd.read_csv(paths[2], dtype=text, keep_default_na=False, na_values=[""]) if paths[2].is_file() else None
    outcome = plan["outcome"]
    rows = prompts.assign(answered=prompts[outcome].notna() if outcome in prompts else False)
    silent = [who for who, there in rows.groupby(["condition", "seed"])["answered"].any().items() if not there]
    if silent:
        condition, seed = silent[0]
        what = "judge" if outcome == "judged" else "gold"
        raise UserError(
            f"report: the study {folder} has not measured {outcome} in {condition}, seed {seed}; look at "
            f"compare.{what} of its align, and at what the judge said."
        )
    missing = set(rows.loc[~rows["answered"], "prompt"])
    there = prompts[~prompts["prompt"].isin(missing)]
    if there.empty:
        raise UserError(f"report: no prompt of the study {folder} has {outcome} in all trials.")
    curves = pd.DataFrame() if curves is None else curves
    return StudyResults(folder.resolve().name, plan, trials, there, curves, left_out=len(missing))


def study_tables(study: StudyResults) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of conditions, and of comparisons, each under its headings."""
    from lrlhf.evaluation.seeds import corrected, difference, mean_over_seeds, verdict

    others = [column for column in MEANS if column[0] in study.trials and column[0] != study.plan["outcome"]]
    shown = [column for column in others if study.trials[column[0]].notna().all() and study.shows(column[0])]
    lines = [[*(heading.format(outcome=study.outcome) for heading in HEADINGS), *(heading for _, heading, _ in shown)]]
    for name in study.conditions:
        rows = study.trials[study.trials["condition"] == name]
        estimate = mean_over_seeds(study.values(name))
        means = [f"{rows[column].mean():{digits}}" for column, _, digits in shown]
        lines.append([name, *_told(estimate), *means])
    compared = [[heading.format(**study.plan) for heading in COMPARED]]
    found = []
    for first, second in study.plan["comparisons"]:
        both = sorted(study.seeds(first) & study.seeds(second))
        if both:
            pair = study.values(first, both), study.values(second, both)
            found.append((f"{first} - {second}", difference(*pair, study.plan["effect"])))
    p = corrected([result.p for _, result in found])
    for (label, result), held in zip(found, p, strict=True):
        needed = "" if result.seeds_needed is None else str(result.seeds_needed)
        told = "" if math.isnan(held) else f"{held:.3f}"
        compared.append([label, *_told(result.estimate, "+"), told, verdict(result.estimate, held), needed])
    return lines, compared if len(compared) > 1 else []


def _told(estimate: Estimate, sign: str = "") -> tuple[str, str, str]:
    interval = "" if math.isnan(estimate.low) else f"{estimate.low:{sign}.3f} to {estimate.high:{sign}.3f}"
    return str(estimate.n), f"{estimate.value:{sign}.3f}", interval


def study_notes(study: StudyResults) -> list[str]:
    """What a reader must know to read the tables."""
    plan, count = study.plan, len(study.plan["comparisons"])
    seen = plan["trials_seen"]
    when = "before any trial was done" if not seen else f"after {seen} trials were done: read them as exploratory"
    wanted = len(plan["order"]) * len(plan["seeds"])
    notes = [
        f"{len(study.trials)} of {wanted} trials are done, {study.trials['seconds'].sum() / 3600:.1f} machine hours.",
        "Intervals and p count seeds and prompts (pigeonhole bootstrap, t distribution over seeds).",
    ]
    if not study.shows("learned"):
        notes.append("Conditions have reward models of their own, so their learned rewards are not shown together.")
    if study.left_out:
        notes.append(f"{study.left_out} prompts have no outcome in some trial and are left out of all.")
    if set(plan["first_seeds"]) != set(plan["seeds"]):
        notes.append(
            f"Planned with the seeds {plan['first_seeds']}, now {plan['seeds']}: such a change, where results have "
            "been seen, makes small p-values likelier than they say."
        )
    if count:
        notes.append(
            f"The {count} comparisons were named {when} ({plan['named']}); p is corrected for all of them (Holm)."
            " Nothing is called higher or lower whose interval includes 0 or whose corrected p is 0.05 or more."
        )
    return notes


def study_plots(study: StudyResults) -> list[Plot]:
    """Outcome by condition, against exact KL and length; learned score, length and win rates by iteration."""
    from lrlhf.evaluation.seeds import mean_over_seeds

    outcome = study.outcome
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(study.conditions)}
    seeds, means = [], []
    for name in study.conditions:
        values = study.values(name)
        seeds.append(Curve(name, [name] * len(values), list(values.mean(1)), colors[name], "points"))
        means.append((name, mean_over_seeds(values)))
    low, high = ([getattr(e, side) for _, e in means] for side in ("low", "high"))
    center = Curve("mean", [n for n, _ in means], [e.value for _, e in means], "#0f172a", "points", error=(low, high))
    hint = "A point is a seed; the bar is the 95 % interval of the mean. Bars that overlap may still differ, paired."
    plots = [Plot("outcome", outcome.capitalize(), "", outcome, hint, [center, *seeds], legend=False)]
    for column, title, x, hint in (
        ("exact_kl", "Reward against divergence", "exact KL from the reference, nats per token",
         "A point is a trial. Up and to the left is better: more reward for less divergence."),
        ("length", "Reward against length", "tokens per response",
         "If reward only rises with length, it may be length that is paid for."),
        ("learned", "Gold against learned", "learned reward",
         "Right without up: the reward model is exploited."),
    ):  # fmt: skip
        if column in study.trials and study.trials[column].notna().all() and study.shows(column):
            curves = []
            for name in study.conditions:
                rows = study.trials[study.trials["condition"] == name].sort_values("seed")
                hover = [f"seed {seed}" for seed in rows["seed"]]
                y = list(study.values(name).mean(1))
                curves.append(Curve(name, list(rows[column]), y, colors[name], "points", hover=hover))
            plots.append(Plot(f"outcome_{column}", title, x, outcome, hint, curves))
    judges = sorted({m for m in study.curves.get("metric", ()) if m.startswith("val/win_rate/")})
    for metric, title, unit in (
        ("train/score", "Learned score by iteration", "score, mean of a rollout"),
        ("train/length", "Length by iteration", "tokens per response"),
        *((metric, f"Win rate by iteration ({metric.rpartition('/')[2]})", "over the reference") for metric in judges),
    ):
        curves = []
        for name in study.conditions if len(study.curves) and study.shows(metric) else ():
            rows = study.curves[(study.curves["condition"] == name) & (study.curves["metric"] == metric)]
            by_step = rows.groupby("iteration")["value"].mean()
            curves += [Curve(name, list(by_step.index), list(by_step), colors[name])] if len(by_step) else []
        if curves:
            plots.append(Plot(metric.replace("/", "_"), title, "iteration", unit, "Mean over seeds.", curves))
    return plots
