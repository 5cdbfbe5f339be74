"""Rewards that are not the reward model's: a penalty for responses that do not end, and a limit."""

from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from lrlhf.callbacks.rollout import RolloutCallback
from lrlhf.errors import UserError
from lrlhf.functional import last_true
from lrlhf.types import Rollout

if TYPE_CHECKING:
    from lrlhf.modules.ppo_policy import PPOPolicy


class MissingEOSPenalty(RolloutCallback):
    """Subtract `penalty` at the last token of a response that was cut off by the length limit.

    Args:
        penalty: in units of the score; 1.0 is usual. Larger makes the policy end sooner.
    """

    def __init__(self, penalty: float = 1.0):
        if penalty < 0:
            raise UserError(f"MissingEOSPenalty: penalty={penalty} must not be negative.")
        self.penalty = penalty

    def shape_rewards(self, trainer: L.Trainer, policy: "PPOPolicy", rollout: Rollout, rewards: Tensor) -> Tensor:
        """A response ends if its last token is one of the policy's stop tokens."""
        last = last_true(rollout.response_mask)
        ended = torch.isin(rollout.response_ids, policy.stop_ids.to(rewards.device))
        return rewards - self.penalty * (last & ~ended)


class RewardLimit(RolloutCallback):
    """Clip every reward to [-limit, limit]: an outlier of the reward model moves the policy no further than that."""

    def __init__(self, limit: float = 5.0):
        if limit <= 0:
            raise UserError(f"RewardLimit: limit={limit} must be positive.")
        self.limit = limit

    def shape_rewards(self, trainer: L.Trainer, policy: "PPOPolicy", rollout: Rollout, rewards: Tensor) -> Tensor:
        """Applied where it stands in the list of callbacks."""
        return rewards.clamp(-self.limit, self.limit)
