"""Rewards that are not the reward model's: a penalty for responses that do not end, a limit, running moments."""

import math
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor

from lrlhf.config import check_ranges
from lrlhf.distributed import total, total_number
from lrlhf.functional import last_true
from lrlhf.modules.rollout_callback import RolloutCallback
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.types import Rollout


class MissingEOSPenalty(RolloutCallback):
    """Subtract `penalty` at the last token of a response that was cut off by the length limit.

    Args:
        penalty: in units of the score; 1.0 is usual. Larger makes the policy end sooner.
    """

    reads_logprobs = False

    def __init__(self, penalty: NonNegativeFloat = 1.0):
        self.penalty = penalty
        check_ranges(self)

    def shape_rewards(self, trainer: L.Trainer, policy: RolloutModule, rollout: Rollout, rewards: Tensor) -> Tensor:
        """A response ends if its last token is one of the policy's stop tokens."""
        last = last_true(rollout.response_mask)
        ended = torch.isin(rollout.response_ids, policy.stop_ids.to(rewards.device))
        return rewards - self.penalty * (last & ~ended)


class RewardLimit(RolloutCallback):
    """Clip every reward to [-limit, limit]: an outlier of the reward model moves the policy no further than that."""

    reads_logprobs = False

    def __init__(self, limit: PositiveFloat = 5.0):
        self.limit = limit
        check_ranges(self)

    def shape_rewards(self, trainer: L.Trainer, policy: RolloutModule, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Applied where it stands in the list of callbacks."""
        return rewards.clamp(-self.limit, self.limit)


class NormalizeScores(RolloutCallback):
    """Replace each score by (score - mean) / deviation, of all scores that training has seen up to now.

    Reward models differ in offset and scale; after this a coefficient means the same for each. Running moments by Chan
    et al. (1979), equation 2.1; population deviation. Validation uses them and leaves them as they are.

    Args:
        center: also subtract the mean.
    """

    reads_logprobs = False

    def __init__(self, center: bool = True):
        self.center = center
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def shape_rewards(self, trainer: L.Trainer, policy: RolloutModule, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Moves the score at the last token; what other callbacks added stays."""
        scores = rollout.scores
        if trainer.training:
            self._add(scores.double())
        deviation = math.sqrt(self.squares / self.count) if self.squares else 1.0
        normalized = (scores - (self.mean if self.center else 0.0)) / deviation
        return torch.where(last_true(rollout.response_mask), rewards + (normalized - scores)[:, None], rewards)

    def _add(self, scores: Tensor) -> None:
        count, mean = int(total_number(len(scores))), float(total(scores.sum()))
        if not math.isfinite(mean):
            return
        mean /= count
        seen = self.count + count
        squares = float(total((scores - mean).square().sum()))
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / seen
        self.mean += (mean - self.mean) * count / seen
        self.count = seen

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the moments up again."""
        self.count, self.mean, self.squares = state_dict["count"], state_dict["mean"], state_dict["squares"]
