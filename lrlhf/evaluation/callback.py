"""WinRateCallback: the policy against its reference on held-out prompts, as a curve."""

import math
import re
from typing import Any

import lightning as L
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lrlhf.config import check_ranges
from lrlhf.distributed import gather_objects, rank
from lrlhf.errors import UserError
from lrlhf.evaluation.head_to_head import measure
from lrlhf.evaluation.judges import Judge, Order, annotate, higher
from lrlhf.evaluation.pairs import Annotation, Pair
from lrlhf.model.sharding import gathered
from lrlhf.modules.rollout_callback import RolloutCallback
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.types import Prompts, Rollout, Sequences

LOGGED = ("win_rate", "length_controlled_win_rate", "model_length", "reference_length")


class WinRateCallback(RolloutCallback):
    """Judge the responses of each validation against the reference's, which are sampled once, with the same draws.

    Logs val/win_rate/JUDGE with val/win_rate_low and _high (95 % interval over prompts), the length-controlled rate and
    both mean lengths in characters. A judge that fails stops no training: it is said, and this validation has no rate.

    Args:
        judge: by class path; null takes the score that the policy is trained on, which costs nothing.
        every: validations; their distance is trainer.val_check_interval.
        order: see `lrlhf.evaluation.HeadToHead`.
    """

    reads_logprobs = False

    def __init__(self, judge: Judge | None = None, every: PositiveInt = 1, order: Order = "both"):
        self.judge, self.every, self.order = judge, every, order
        check_ranges(self)
        self.name = re.sub(r"[^\w.-]+", "_", judge.name) if judge else "score"
        self._validations = 0
        self._rollout: Rollout | None = None
        self._references: dict[int, tuple[list[str], list[float]]] = {}
        self._judged: list[tuple[Pair, float | None]] = []

    @property
    def state_key(self) -> str:
        """Another for each judge, so that a run may have several."""
        return self._generate_state_key(judge=self.name)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is judged yet."""
        self._judged = []

    def on_rollout_end(self, trainer: L.Trainer, policy: RolloutModule, rollout: Rollout, rewards: Tensor) -> None:
        """Keep the validation's rollout until its prompts are at hand."""
        self._rollout = None if trainer.training or not self._due(trainer) else rollout

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Prompts,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pair the policy's responses with the reference's."""
        if self._rollout is None:
            return
        policy: RolloutModule = pl_module
        rollout, self._rollout = self._rollout, None
        if batch_idx not in self._references:
            with gathered(policy.backbone):
                ids, mask = policy.sample(batch, "reference", "validate", batch_idx)
                scores = [math.nan] * len(batch)
                if self.judge is None:  # else nobody asks for them
                    scores = policy.score(Sequences(batch.prompt_ids, batch.prompt_mask, ids, mask), batch).tolist()
            self._references[batch_idx] = policy.decode(ids, mask), scores
        before, before_scores = self._references[batch_idx]
        after = policy.decode(rollout.response_ids, rollout.response_mask)
        for i, source in enumerate(batch.sources):
            pair = Pair(source["instruction"], before[i], after[i], "reference", "policy")
            self._judged.append((pair, higher(before_scores[i], float(rollout.scores[i]))))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge on the first process, and log everywhere."""
        if not self._due(trainer):
            self._validations += not trainer.sanity_checking
            return
        self._validations += 1
        judged = [pair for part in gather_objects(self._judged) for pair in part]
        metrics = gather_objects(self._measure(judged) if rank() == 0 else None)[0]
        pl_module.log_dict(metrics)

    def _due(self, trainer: L.Trainer) -> bool:
        return not trainer.sanity_checking and self._validations % self.every == 0

    def _measure(self, judged: list[tuple[Pair, float | None]]) -> dict[str, float]:
        try:
            if self.judge is None:
                annotations = [Annotation(**vars(pair), preference=preference) for pair, preference in judged]
            else:
                annotations = annotate(self.judge, [pair for pair, _ in judged], self.order)
            found = measure(annotations)
        except UserError as error:
            rank_zero_warn(f"WinRateCallback: {error}", stacklevel=2)
            return {f"val/win_rate/{self.name}": math.nan}
        metrics = {f"val/{name}/{self.name}": found[name].value for name in LOGGED}
        rate = found["win_rate"]
        return metrics | {f"val/win_rate_low/{self.name}": rate.low, f"val/win_rate_high/{self.name}": rate.high}
