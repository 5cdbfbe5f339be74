"""Expert iteration: answer n times, keep the best, imitate it; again with what was learned.

One iteration is one round: `data.batch_size` responses, `data.responses_per_prompt` to each prompt, of which the best
is a demonstration. The larger the batch, the fewer the rounds; with all prompts in one batch it is AlpacaFarm's expert
iteration (arXiv 2305.14387), with small ones RAFT (Dong et al., arXiv 2304.06767). Each round samples from the policy
as it is then. `trainer.max_epochs` and `trainer.limit_train_batches` say how many rounds.
"""

import math
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from lrlhf.config import Updates, check_ranges
from lrlhf.errors import UserError
from lrlhf.metrics import Means
from lrlhf.modules.group_policy import GroupPolicy
from lrlhf.modules.reward_source import Aggregate
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.types import Experience


class ExpertIteration(GroupPolicy):
    """Best of n, then supervised fine-tuning on it, round after round.

    Args:
        minibatch_size: demonstrations of one optimizer step; divides the prompts of a round.
        epochs: passes over the demonstrations of a round.
        reward_model: see RolloutModule.
        reward_function: see RolloutModule.
        aggregate: see RolloutModule.
        kwargs: see AlignmentModule.
    """

    def __init__(
        self,
        minibatch_size: PositiveInt = 32,
        epochs: PositiveInt = 1,
        reward_model: str | None = None,
        reward_function: RewardFunction | list[Reward] | None = None,
        aggregate: Aggregate | None = None,
        **kwargs: Any,
    ):
        updates = Updates(minibatch_size=minibatch_size, inner_epochs=epochs)
        super().__init__(reward_model, reward_function, aggregate, updates, **kwargs)
        self.minibatch_size, self.epochs = minibatch_size, epochs
        check_ranges(self)

    def check_minibatches(self, size: int) -> None:
        """Of a round's prompts, since one response to each is kept."""
        data: Any = getattr(self.trainer, "datamodule", None)
        prompts = getattr(data, "batch_size", size) // getattr(data, "responses_per_prompt", 1)
        if prompts % size or size % self.trainer.world_size:
            raise UserError(
                f"model.minibatch_size={size} does not divide the {prompts} prompts of a round (data.batch_size over "
                f"data.responses_per_prompt) among {self.trainer.world_size} processes."
            )

    def updates_read_logprobs(self, rows: int) -> bool:
        """Never: demonstrations have no ratio.

        Args:
            rows: of a rollout, in this process.
        """
        return False

    def group_advantages(self, scores: Tensor, group_size: int) -> Tensor:
        """1 for the best of each group, the first of equals, 0 for the others.

        Args:
            scores: [B], with all penalties.
            group_size: n.
        """
        best = scores.nan_to_num(-math.inf).view(-1, group_size).argmax(1)
        return torch.nn.functional.one_hot(best, group_size).float().flatten()

    def select(self, experience: Experience) -> Experience:
        """The best response to each prompt."""
        return experience.rows((experience.advantages.sum(1) > 0).nonzero()[:, 0])

    def policy_objective(self, piece: Experience, *means: Means) -> Tensor:
        """-log p [B, R] of the demonstrations, 0 off the mask."""
        loss = -self.statistics(piece).logprobs
        for mean in means:
            mean.add("negative_log_likelihood", loss, piece.response_mask)
        return loss.masked_fill(~piece.response_mask, 0)

    def log_iteration(self, experience: Experience, metrics: dict[str, float]) -> None:
        """With the score of the demonstrations; all else is of all responses."""
        means = Means()
        means.add("best_score", self.select(experience).scores)
        super().log_iteration(experience, metrics | means.compute())
