"""DivergenceCallback: measure how far the policy is from the reference, and make it pay."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor

from lrlhf.config import check_ranges
from lrlhf.distributed import total, total_number
from lrlhf.errors import UserError
from lrlhf.functional import kl
from lrlhf.functional.divergence import Divergence
from lrlhf.functional.masked import masked_mean
from lrlhf.modules.policy import PolicyModule
from lrlhf.modules.rollout_callback import RolloutCallback, stage
from lrlhf.types import Rollout, Sequences


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """A coefficient that steers the divergence to a target (Ziegler et al., arXiv 1909.08593, section 2.2).

    coefficient <- coefficient * (1 + rate * clip(divergence / target - 1, -limit, limit)), once per iteration.
    """

    target: PositiveFloat = 6.0
    """Divergence per RESPONSE (summed over its tokens, mean over responses) to hold; 6 nats in AlpacaFarm."""
    initial: PositiveFloat = 0.02
    """Coefficient of the first iteration."""
    rate: PositiveFloat = 0.1
    """Larger follows faster and oscillates; 0.1 in AlpacaFarm and Ziegler et al."""
    limit: PositiveFloat = 0.2
    """Clip of the relative error; 0.2 in AlpacaFarm and Ziegler et al."""

    def __post_init__(self):
        check_ranges(self)

    def next(self, coefficient: float, divergence: float) -> float:
        """The coefficient after an iteration whose responses had this divergence on average; NaN moves nothing.

        Args:
            coefficient: of this iteration.
            divergence: of its responses, summed over tokens, mean over responses.
        """
        if not math.isfinite(divergence):
            return coefficient
        error = min(max(divergence / self.target - 1, -self.limit), self.limit)
        return coefficient * (1 + self.rate * error)


class DivergenceCallback(RolloutCallback):
    """reward_t = reward_t - coefficient * d_t at every response token.

    Asks the policy for the reference's log-probs itself, so a run without it pays for no reference pass. Logs under the
    divergence's own name: `divergence/<name>` per token, `coefficient`, and `penalty` per response.

    Args:
        divergence: a function of two tensors by import path, of `lrlhf.functional` or your own. Those marked
            `over_vocabulary` sum over the whole vocabulary.
        coefficient: a fixed number (0.02 in the paper; 0 measures without penalising), or an AdaptiveCoefficient.
        also_log: other divergences to log on the same tokens.
    """

    def __init__(
        self,
        divergence: Divergence = kl,
        coefficient: NonNegativeFloat | AdaptiveCoefficient = 0.02,
        also_log: list[Divergence] | None = None,
    ):
        self.divergence = divergence
        self.also_log = list(also_log or [])
        self.controller = coefficient if isinstance(coefficient, AdaptiveCoefficient) else None
        self.coefficient = self.controller.initial if self.controller else float(coefficient)  # type: ignore[arg-type]
        check_ranges(self)

    @property
    def reads_logprobs(self) -> bool:  # type: ignore[override]
        """Where a divergence of sampled tokens is measured; those over the vocabulary run the policy themselves."""
        return any(not getattr(f, "over_vocabulary", False) for f in (self.divergence, *self.also_log))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to run twice, or in a stage without rollouts, where it would silently do nothing.

        Raises:
            UserError: naming what to change.
        """
        if sum(isinstance(c, DivergenceCallback) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError("two DivergenceCallbacks would penalise twice; keep one, with also_log for the others.")
        if not hasattr(pl_module, "shape_rewards"):
            raise UserError(
                f"DivergenceCallback works with modules that make rollouts, such as lrlhf.PPOPolicy; "
                f"{type(pl_module).__name__} makes none."
            )

    def shape_rewards(self, trainer: L.Trainer, policy: PolicyModule, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Subtract the penalty, log it, and move the coefficient if it adapts."""
        mask = rollout.response_mask
        values = measure(policy, rollout, rollout.logprobs, (self.divergence, *self.also_log))
        penalty = self.coefficient * values[name_of(self.divergence)]
        metrics: dict[str, Any] = {
            f"divergence/{name}": masked_mean(value, mask, total) for name, value in values.items()
        }
        rows = total_number(len(rollout))
        per_response = float(total(values[name_of(self.divergence)].sum()) / rows)
        metrics |= {"coefficient": self.coefficient, "penalty": self.coefficient * per_response}
        policy.log_dict({f"{stage(trainer)}/{k}": float(v) for k, v in metrics.items()}, batch_size=int(rows))
        if self.controller and trainer.training:
            self.coefficient = self.controller.next(self.coefficient, per_response)
        return rewards - penalty

    @property
    def state_key(self) -> str:
        """Different for each divergence: Lightning would refuse two callbacks of one key before `setup` can explain."""
        return self._generate_state_key(divergence=name_of(self.divergence))

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, which an adaptive run must not forget."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the coefficient up again where it adapts; a fixed one is what the config says."""
        if self.controller:
            self.coefficient = state_dict["coefficient"]


def measure(
    policy: PolicyModule, sequences: Sequences, logprobs: Tensor, functions: Iterable[Divergence]
) -> dict[str, Tensor]:
    """Divergences by name, each [B, R] and 0 off the mask; no reference pass that no function needs.

    Args:
        policy: the module.
        sequences: responses of the policy.
        logprobs: [B, R] of the policy.
        functions: what to measure, over sampled tokens or over the vocabulary.
    """
    exact = [f for f in functions if getattr(f, "over_vocabulary", False)]
    sampled = [f for f in functions if f not in exact]
    values = dict(zip(map(name_of, exact), policy.divergences(sequences, exact), strict=True)) if exact else {}
    if sampled:
        ref_logprobs = policy.logprobs(sequences, "reference")
        values |= {name_of(f): _on_mask(f, logprobs, ref_logprobs, sequences.response_mask) for f in sampled}
    return values


def _on_mask(function: Divergence, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The divergence at response tokens, 0 elsewhere: [B, R]."""
    values = function(logprobs[mask], ref_logprobs[mask])
    if values.shape != logprobs[mask].shape:
        raise UserError(
            f"DivergenceCallback: {name_of(function)} returned shape {tuple(values.shape)} for "
            f"{tuple(logprobs[mask].shape)} tokens; a divergence over the vocabulary needs @over_vocabulary."
        )
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, values)


def name_of(function: Divergence) -> str:
    """What a divergence is logged as."""
    return getattr(function, "__name__", type(function).__name__)
