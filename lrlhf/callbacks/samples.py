"""People look rather than read: a few responses of every rollout, kept as they were."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from torch import Tensor

from lrlhf.callbacks.rollout import RolloutCallback, stage
from lrlhf.types import Rollout

if TYPE_CHECKING:
    from lrlhf.modules.ppo_policy import PPOPolicy


class SampleLog(RolloutCallback):
    """Append the first responses of every rollout to samples.jsonl in the run folder, with score and reward.

    Args:
        count: responses per rollout.
    """

    def __init__(self, count: int = 4):
        self.count = count

    def on_rollout_end(self, trainer: L.Trainer, policy: "PPOPolicy", rollout: Rollout, rewards: Tensor) -> None:
        """One JSON line a response."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        prompts = policy.decode(rollout.prompt_ids[: self.count], rollout.prompt_mask[: self.count])
        responses = policy.decode(rollout.response_ids[: self.count], rollout.response_mask[: self.count])
        path = Path(trainer.default_root_dir) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for prompt, response, score, reward in zip(
                prompts, responses, rollout.scores.tolist(), rewards.sum(-1).tolist(), strict=False
            ):
                row = {"stage": stage(trainer), "iteration": policy.iteration, "prompt": prompt, "response": response}
                file.write(json.dumps(row | {"score": round(score, 4), "reward": round(reward, 4)}) + "\n")
