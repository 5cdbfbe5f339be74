"""Win rates: raw, discrete and length-controlled, of one system or of several, each with its interval.

A preference lies in [1, 2]: 1 for the reference's output, 2 for the model's, 1.5 a tie.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import (
    Estimate,
    Line,
    bootstrap_draws,
    bootstrap_interval,
    clustered_mean,
    percentiles,
    wilson_interval,
)
from lrlhf.evaluation.pairs import Annotation

FOLDS = 5
"""Of the cross-validation that chooses the regularisation of the length-controlled win rate."""
REFITS = 400
"""Bootstrap draws for an interval whose statistic is a fit."""
ELO = 400 / math.log(10)
"""Elo points of one unit of the Bradley-Terry logit."""


class WinRate(Metric):
    """Win rates of a model against a reference, from judged pairs.

    `update` takes one entry a pair: preference [N] in [1, 2], nan without an answer; lengths [N] of the reference's and
    of the model's output in characters; prompt [N] int64, equal for pairs that share a prompt; swapped [N], the
    preference when the order was swapped, nan where it was not asked for, and straight [N], when it was not.

    `compute` returns Estimates by name: win_rate (ties half), discrete_win_rate, length_controlled_win_rate,
    swap_consistency, standard_error, reference_length, model_length, judged, ties.

    Args:
        options: of every torchmetrics.Metric, such as sync_on_compute.
    """

    full_state_update = False
    preference: list[Tensor]
    reference_length: list[Tensor]
    model_length: list[Tensor]
    prompt: list[Tensor]
    straight: list[Tensor]
    swapped: list[Tensor]

    COLUMNS = ("preference", "reference_length", "model_length", "prompt", "straight", "swapped")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in self.COLUMNS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        preference: Tensor,
        reference_length: Tensor,
        model_length: Tensor,
        prompt: Tensor,
        straight: Tensor | None = None,
        swapped: Tensor | None = None,
    ) -> None:
        """Add judged pairs."""
        nothing = torch.full_like(preference, math.nan)
        columns = (preference, reference_length, model_length, prompt, straight, swapped)
        for name, values in zip(self.COLUMNS, columns, strict=True):
            getattr(self, name).append(nothing if values is None else values)

    def compute(self) -> dict[str, Estimate]:
        """Over all pairs that have an answer."""
        every = {name: _column(getattr(self, name)) for name in self.COLUMNS}
        judged = ~np.isnan(every["preference"])
        preference, prompt = every["preference"][judged], every["prompt"][judged]
        first, second = every["reference_length"][judged], every["model_length"][judged]
        kept, both = swap_consistency(every["straight"], every["swapped"])
        n = len(preference)
        spread = float(preference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return {
            "win_rate": _share(preference - 1, prompt),
            "discrete_win_rate": _share(discrete(preference), prompt),
            "length_controlled_win_rate": length_controlled_win_rate(preference, first, second, prompt),
            "swap_consistency": _share(kept, every["prompt"][both]),
            "standard_error": Estimate(spread, n=n),
            "reference_length": clustered_mean(first, prompt),
            "model_length": clustered_mean(second, prompt),
            "ties": Estimate(float((preference == 1.5).mean()) if n else math.nan, n=n),
            "judged": Estimate(float(judged.mean()) if len(judged) else math.nan, n=len(judged)),
        }

    def add(self, annotations: Sequence[Annotation]) -> None:
        """`update` with annotations."""
        numbers = [int.from_bytes(hashlib.sha256(a.instruction.encode()).digest()[:6], "big") for a in annotations]
        both = [a.answers if len(a.answers) == 2 else (None, None) for a in annotations]
        self.update(
            _tensor([a.preference for a in annotations]),
            _tensor([len(a.output_1) for a in annotations]),
            _tensor([len(a.output_2) for a in annotations]),
            torch.tensor(numbers, dtype=torch.long),
            _tensor([one for one, _ in both]),
            _tensor([two for _, two in both]),
        )


def discrete(preference: np.ndarray) -> np.ndarray:
    """1 for a win, 0.5 for a tie, 0 for a loss: preferences [N] rounded, as AlpacaEval's discrete win rate."""
    return 0.5 + 0.5 * np.sign(preference - 1.5)


def swap_consistency(straight: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether a judge kept its word when the two outputs changed places, for pairs that it saw both ways.

    Args:
        straight: [N] preferences in the given order, nan where it was not asked.
        swapped: [N] those of the swapped order, in terms of the given order.

    Returns:
        1 or 0 for each of M pairs, and the mask [N] of these pairs.
    """
    both = ~np.isnan(straight) & ~np.isnan(swapped)
    return (discrete(straight[both]) == discrete(swapped[both])).astype(float), both


def length_controlled_win_rate(
    preference: np.ndarray, reference_length: np.ndarray, model_length: np.ndarray, prompt: np.ndarray | None = None
) -> Estimate:
    """The win rate that outputs of equal lengths would have, by AlpacaEval 2's model without instruction difficulty.

    logit P(model preferred) = phi tanh((len_ref - len_model) / s) + theta, s the sample standard deviation of the
    differences; L1 logistic regression without intercept, C by 5-fold cross-validation grouped by pair, fractional
    preferences as two weighted rows; the length term is then set to 0. Dubois et al. (2024), arXiv 2404.04475, section
    3; `length_controlled_minimal` of the package alpaca_eval. The interval is a bootstrap over prompts with C held.

    Args:
        preference: [N] in [1, 2].
        reference_length: [N] characters.
        model_length: [N] characters.
        prompt: [N], the prompt of each pair; None for all different.

    Returns:
        nan with fewer than 5 pairs, or where all differences in length are equal.
    """
    difference = (reference_length - model_length).astype(float)
    n = len(preference)
    if n < FOLDS or not difference.std():
        return Estimate(math.nan, n=n)
    features = np.stack([np.tanh(difference / difference.std(ddof=1)), np.ones(n)], axis=1)
    strength = _chosen_strength(features, preference - 1)

    def rate(rows: np.ndarray) -> float:
        theta = _fit(features[rows], preference[rows] - 1, strength)[1]
        return float(1 / (1 + np.exp(-theta)))

    return bootstrap_interval(rate, np.arange(n) if prompt is None else prompt, resamples=REFITS)


def _fit(features: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """Coefficients [2] of features [N, 2] for targets [N] in [0, 1]."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=strength, penalty="l1", solver="liblinear", fit_intercept=False, dual=False, random_state=123
    )
    twice, labels = np.concatenate([features, features]), np.repeat([1, 0], len(target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(twice, labels, sample_weight=np.concatenate([target, 1 - target]))
    return model.coef_[0]


def _chosen_strength(features: np.ndarray, target: np.ndarray) -> float:
    """Of scikit-learn's ten values of C the one with the smallest held-out cross-entropy."""
    from sklearn.model_selection import GroupKFold

    groups = np.tile(np.arange(len(target)), 2)
    folds = list(GroupKFold(FOLDS).split(groups, groups=groups))
    losses = []
    for strength in np.logspace(-4, 4, 10):
        held_out = []
        for train, test in folds:
            train, test = train[train < len(target)], test[test < len(target)]
            p = np.clip(
                1 / (1 + np.exp(-features[test] @ _fit(features[train], target[train], strength))), 1e-15, 1 - 1e-15
            )
            held_out.append(-(target[test] * np.log(p) + (1 - target[test]) * np.log(1 - p)).mean())
        losses.append(np.mean(held_out))
    return float(np.logspace(-4, 4, 10)[int(np.argmin(losses))])


def paired_difference(one: Sequence[Annotation], other: Sequence[Annotation]) -> Estimate:
    """Win rate of the other system minus that of one, on the prompts that both were judged on, paired by prompt.

    Raises:
        UserError: they have no judged prompt in common.
    """
    first, second = ({a.instruction: a.preference for a in side if a.preference is not None} for side in (one, other))
    differences = np.array([second[text] - first[text] for text in first if text in second])
    if not len(differences):
        raise UserError("the two systems have no judged prompt in common; judge them on the same prompts.")
    return clustered_mean(differences, np.arange(len(differences)))


def bradley_terry(games: Sequence[Annotation], resamples: int = 200) -> dict[str, Estimate]:
    """Elo ratings of all systems by maximum likelihood of their wins (Bradley and Terry 1952), the first one's 0.

    Fitted by choix's I-LSR (Maystre and Grossglauser 2015, "Fast and accurate inference of Plackett-Luce models"), with
    a thousandth of a win added to every pairing, so that a system that never lost has a finite rating. A tie is half a
    win for each. Intervals: bootstrap over prompts.

    Args:
        games: judged pairs, of any number of systems; generator_1 and generator_2 name who played.
        resamples: bootstrap draws.
    """
    import choix

    games = [a for a in games if a.preference is not None]
    names = list(dict.fromkeys(name for a in games for name in (a.generator_1, a.generator_2)))
    place = {name: i for i, name in enumerate(names)}
    left, right = (np.array([place[getattr(a, key)] for a in games]) for key in ("generator_1", "generator_2"))
    won = np.array([a.preference for a in games]) - 1

    def ratings(rows: np.ndarray) -> np.ndarray:
        wins = np.zeros((len(names), len(names)))
        np.add.at(wins, (right[rows], left[rows]), won[rows])
        np.add.at(wins, (left[rows], right[rows]), 1 - won[rows])
        found = choix.ilsr_pairwise_dense(wins, alpha=1e-3)
        return (found - found[0]) * ELO

    prompts = [a.instruction for a in games]
    values, draws = ratings(np.arange(len(games))), bootstrap_draws(ratings, prompts, resamples)
    return {name: percentiles(float(values[i]), draws[:, i], len(set(prompts))) for i, name in enumerate(names)}


def win_rate_lines(found: Mapping[str, Estimate]) -> list[Line]:
    """What `WinRate` computed, for people: lengths always beside win rates, and no line that says what another says."""
    labels = {
        "win_rate": ("win rate (ties half)", ".1%"),
        "length_controlled_win_rate": ("length-controlled win rate", ".1%"),
        "discrete_win_rate": ("discrete win rate", ".1%"),
        "standard_error": ("standard error of the win rate", ".1%"),
        "ties": ("ties", ".1%"),
        "swap_consistency": ("same answer in both orders", ".1%"),
        "model_length": ("model's output, characters", ".0f"),
        "reference_length": ("reference's output, characters", ".0f"),
        "judged": ("pairs with an answer", ".1%"),
    }
    same = found["discrete_win_rate"].value == found["win_rate"].value
    left_out = ["discrete_win_rate"] * same + ["judged"] * (found["judged"].value == 1)
    shown = (name for name in labels if name not in left_out and not math.isnan(found[name].value))
    return [Line(labels[name][0], found[name], labels[name][1]) for name in shown]


def _share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The mean of values [N] in [0, 1], with a bootstrap over prompts; Wilson's interval where all are equal.

    Drawing equal values anew says nothing of how far another choice of prompts would move their mean.
    """
    found = clustered_mean(values, prompts)
    return wilson_interval(found.value, found.n) if found.low == found.high else found


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def _column(pieces: list[Tensor] | Tensor) -> np.ndarray:
    """All entries of a state, which torchmetrics has made one tensor of where it has met other processes."""
    whole = torch.cat([torch.zeros(0).double(), *pieces]) if isinstance(pieces, list) else pieces
    return whole.double().cpu().numpy()
