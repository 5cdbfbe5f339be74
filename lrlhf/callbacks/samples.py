"""SampleLog: a few responses of every rollout, kept in a file for people to read."""

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lrlhf.modules.rollout_callback import RolloutCallback, stage
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.types import Rollout


class SampleLog(RolloutCallback):
    """Append the first responses of every rollout to samples.jsonl in the run folder, with score and reward.

    Args:
        count: responses per rollout.
    """

    reads_logprobs = False

    def __init__(self, count: int = 4):
        self.count = count
        self._written = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A new run begins a new file."""
        self._written = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop what was written after the checkpoint that the run goes on from, or before the run."""
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            os.truncate(path, self._written)

    def state_dict(self) -> dict[str, Any]:
        """The size of the file in bytes."""
        return {"written": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the size that the file had when the checkpoint was written."""
        self._written = state_dict["written"]

    def on_rollout_end(self, trainer: L.Trainer, policy: RolloutModule, rollout: Rollout, rewards: Tensor) -> None:
        """One JSON line a response."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        prompts = policy.decode(rollout.prompt_ids[: self.count], rollout.prompt_mask[: self.count])
        responses = policy.decode(rollout.response_ids[: self.count], rollout.response_mask[: self.count])
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for prompt, response, score, reward in zip(
                prompts, responses, rollout.scores.tolist(), rewards.sum(-1).tolist(), strict=False
            ):
                row = {"stage": stage(trainer), "iteration": policy.iteration, "prompt": prompt, "response": response}
                file.write(json.dumps(row | {"score": round(score, 4), "reward": round(reward, 4)}) + "\n")
        self._written = path.stat().st_size

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "samples.jsonl"
