"""What a reward model is worth: accuracy by subset beside "the longer wins", calibration, and its taste for length."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse.typing import PositiveInt
from torchmetrics.functional.classification import binary_calibration_error

from lrlhf.config import DType, check_ranges
from lrlhf.datamodules.formats import read_rows
from lrlhf.datamodules.prompts import Template
from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, Line, bootstrap_interval, clustered_mean, wilson_interval
from lrlhf.evaluation.evaluation import Evaluation
from lrlhf.evaluation.system import System

ALIKE = 0.1
"""Two responses are alike in length if they differ by at most this share of the longer one."""
BINS = 5
"""Of confidence, from 0.5 to 1."""
POINTS = 500
"""Of a scatter plot at most."""


class RewardModelAccuracy(Evaluation):
    """How often a reward model prefers the chosen response of a pair.

    Args:
        reward_model: run folder or hand-over of a RewardModel run.
        pairs: file of preference pairs in any layout that training takes; RewardBench's columns prompt, chosen,
            rejected and subset are one.
        dtype: of the frozen base; null takes the run's.
        template: how prompts are rendered; null takes the run's own.
        batch_size: responses of one pass. Memory only.
        limit: pairs at most.
    """

    def __init__(
        self,
        reward_model: str,
        pairs: str,
        dtype: DType | None = None,
        template: Template | None = None,
        batch_size: PositiveInt = 16,
        limit: PositiveInt | None = None,
    ):
        self.system = System(reward_model, dtype=dtype, template=template, batch_size=batch_size)
        self.pairs, self.limit = pairs, limit
        check_ranges(self)

    def run(self, folder: Path) -> dict[str, Any]:
        """Score both responses of every pair; writes scores.csv."""
        counts: Counter[tuple[str, str]] = Counter()
        rows = list(read_rows(self.pairs, counts))[: self.limit]
        if not rows:
            raise UserError(f"{self.pairs} holds no pair.")
        if lacking := [row.place for row in rows if len(row.responses) != 2]:
            raise UserError(f"{lacking[0]}: expected two responses and a preference.")
        both = [self.system.score(rows, [row.responses[side] for row in rows]).numpy() for side in (0, 1)]
        table = pd.DataFrame({
            "chosen": both[0], "rejected": both[1],
            "chosen_length": [len(row.responses[0]) for row in rows],
            "rejected_length": [len(row.responses[1]) for row in rows],
            "subset": [row.dataset for row in rows],
            "prompt": [repr(row.messages) for row in rows],
        })  # fmt: skip
        table.to_csv(folder / "scores.csv", index=False)
        kept = table[table.chosen.notna() & table.rejected.notna()]
        if kept.empty:
            raise UserError(f"{self.pairs}: every pair is longer than the {self.system.context} tokens of the base.")
        lost = {why: count for (_, why), count in counts.items()} | {
            "longer than the base takes": len(table) - len(kept)
        }
        told = ", ".join(f"{count} {why}" for why, count in lost.items() if count)
        said = [f"Left out, and in no number: {told}."] * bool(told)
        title = f"Reward model {self.system.source} on {self.pairs}"
        return {"title": title, **describe(kept), "notes": said + notes(kept)}


def describe(pairs: pd.DataFrame) -> dict[str, Any]:
    """Lines and plots of scored pairs.

    Args:
        pairs: columns chosen, rejected (scores), chosen_length, rejected_length (characters), subset and prompt;
            intervals but those of shares draw whole prompts anew.
    """
    right, longer = correct(pairs), longer_wins(pairs)
    lengths = np.concatenate([pairs.chosen_length, pairs.rejected_length])
    scores = np.concatenate([pairs.chosen, pairs.rejected])
    difference = (pairs.chosen - pairs.rejected).to_numpy()
    length_difference = (pairs.chosen_length - pairs.rejected_length).to_numpy()
    matched, each = alike(pairs), pairs.prompt.to_numpy()
    lines = [
        Line("accuracy (ties half)", _share(right), ".1%"),
        Line("the longer wins (characters)", _share(longer), ".1%"),
        Line("accuracy minus the longer wins, paired", clustered_mean(right - longer, each), "+.1%"),
        Line("accuracy on pairs alike in length", _share(right[matched]), ".1%"),
        Line("margin, chosen minus rejected", clustered_mean(difference, each)),
        Line("expected calibration error", Estimate(calibration_error(difference), n=len(pairs))),
        Line("score and length, rank correlation", _correlation(scores, lengths, np.tile(each, 2)), "+.2f"),
        Line("their differences, rank correlation", _correlation(difference, length_difference, each), "+.2f"),
    ]
    for name, of in pairs.groupby("subset"):
        if name:
            lines.append(Line(f"{name}: accuracy", _share(correct(of)), ".1%"))
            lines.append(Line(f"{name}: the longer wins", _share(longer_wins(of)), ".1%"))
    shown = np.linspace(0, len(scores) - 1, min(POINTS, len(scores))).round().astype(int)
    scatter = {"length": lengths[shown].tolist(), "score": scores[shown].round(4).tolist()}
    lines = [line for line in lines if line.estimate.n]
    return {"lines": lines, "plots": {"reliability": reliability(difference), "score_against_length": scatter}}


def notes(pairs: pd.DataFrame) -> list[str]:
    """In words: whether it beats length, what chance alone does to its calibration, and what is too little to tell."""
    gain, matched = (
        clustered_mean(correct(pairs) - longer_wins(pairs), pairs.prompt.to_numpy()),
        int(alike(pairs).sum()),
    )
    told = "beats" if gain.low > 0 else "loses to" if gain.high < 0 else "is not shown to beat"
    strength = (pairs.chosen - pairs.rejected).abs().to_numpy(float)
    draws = np.random.default_rng(0).random((200, len(pairs))) < 1 / (1 + np.exp(-strength))
    chance = np.mean([calibration_error(np.where(draw, strength, -strength)) for draw in draws])
    few = f"{matched} pairs are alike in length: too few to tell its taste from its judgement."
    return [
        f"The reward model {told} the rule that the longer response wins ({gain.value:+.1%}, {gain.low:+.1%} to "
        f"{gain.high:+.1%}, {gain.n} prompts).",
        f"A calibrated reward model with these margins would show a calibration error of {chance:.1%} by chance alone.",
        *[few] * (matched < 20),
    ]


def correct(pairs: pd.DataFrame) -> np.ndarray:
    """1 where the chosen response scores higher, 0.5 at equal scores, else 0: [N]."""
    return 0.5 + 0.5 * np.sign(pairs.chosen - pairs.rejected).to_numpy(float)


def longer_wins(pairs: pd.DataFrame) -> np.ndarray:
    """The same for length instead of score: [N]."""
    return 0.5 + 0.5 * np.sign(pairs.chosen_length - pairs.rejected_length).to_numpy(float)


def alike(pairs: pd.DataFrame) -> np.ndarray:
    """Whether the two responses are alike in length: [N]."""
    most = np.maximum(pairs.chosen_length, pairs.rejected_length)
    return ((pairs.chosen_length - pairs.rejected_length).abs() <= ALIKE * most).to_numpy()


def calibration_error(difference: np.ndarray) -> float:
    """Expected calibration error of P(chosen preferred) = sigmoid(difference): Naeini et al. (2015), bins of 0.1.

    Every pair counts in both orders, so that neither answer is always right. No bootstrap interval: drawing pairs
    anew raises the error, so that such an interval excludes small errors that are there.

    Args:
        difference: [N], score of the chosen minus score of the rejected.
    """
    p = torch.sigmoid(torch.tensor(difference, dtype=torch.float64))
    labels = torch.cat([torch.ones_like(p), torch.zeros_like(p)]).long()
    return float(binary_calibration_error(torch.cat([p, 1 - p]), labels, n_bins=2 * BINS))


def reliability(difference: np.ndarray) -> dict[str, list[float]]:
    """Mean confidence, accuracy and number of pairs in each bin of confidence max(p, 1 - p) that has any.

    Args:
        difference: [N], score of the chosen minus score of the rejected.
    """
    p = 1 / (1 + np.exp(-np.abs(difference.astype(float))))
    right = 0.5 + 0.5 * np.sign(difference)
    place = np.minimum(((p - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [place == i for i in range(BINS) if (place == i).any()]
    return {
        "confidence": [float(p[b].mean()) for b in bins],
        "accuracy": [float(right[b].mean()) for b in bins],
        "n": [int(b.sum()) for b in bins],
    }


def _share(values: np.ndarray) -> Estimate:
    return wilson_interval(float(values.mean()), len(values)) if len(values) else Estimate(np.nan)


def _correlation(one: np.ndarray, other: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Spearman's, with a bootstrap over prompts."""

    def of(rows: np.ndarray) -> float:
        first, second = (pd.Series(x[rows]).rank() for x in (one, other))
        return float(first.corr(second)) if first.std() and second.std() else np.nan

    return bootstrap_interval(of, prompts, resamples=500)
