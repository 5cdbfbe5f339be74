"""The hook through which penalties, bonuses and other rewards reach a method with rollouts."""

from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from lrlhf.types import Rollout


class RolloutCallback(L.Callback):
    """Subclass it and implement one method; the module (`policy`) folds rewards over its callbacks in list order."""

    reads_logprobs: ClassVar[bool] = True
    """Whether it looks at `rollout.logprobs`. False saves the pass that makes them where no update needs them either;
    they are NaN then."""

    def shape_rewards(self, trainer: L.Trainer, policy: Any, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Rewards [B, R] in, NEW rewards [B, R] out; also called in validation (see trainer.training)."""
        return rewards

    def on_rollout_end(self, trainer: L.Trainer, policy: Any, rollout: Rollout, rewards: Tensor) -> None:
        """Look, log, write; change nothing. rewards [B, R] are final."""


def stage(trainer: L.Trainer) -> str:
    """Before the names of what is logged: train, val or test."""
    return "train" if trainer.training else "test" if trainer.testing else "val"
