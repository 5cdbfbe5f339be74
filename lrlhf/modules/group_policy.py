"""RLOO and GRPO: policy gradients whose baseline is the other responses to the same prompt; no critic.

What they are: `data.responses_per_prompt` responses to each prompt, each scored as a whole; the score, with all
penalties summed into it, minus what the group scored is the advantage of every token of the response.

Where they depart from their papers:
1. A divergence can be a reward (DivergenceCallback), as in RLOO and PPO, or a term of the loss, as in GRPO's paper, or
   both; nothing is penalised where neither is set.
2. RLOO's updates are clipped as PPO's are, by the ratio of the whole response, so that a rollout can serve several
   steps; the first step of a rollout is REINFORCE exactly, with a ratio of 1.
"""

from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor

from lrlhf.config import Updates, check_ranges
from lrlhf.distributed import total, total_number
from lrlhf.errors import UserError
from lrlhf.functional import bregman, group_normalized, leave_one_out, policy_loss
from lrlhf.metrics import Means
from lrlhf.modules.reward_source import Aggregate
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.types import Experience, ReferenceExperience, Rollout


class GroupPolicy(RolloutModule):
    """What RLOO and GRPO share: groups of responses, and one advantage for a whole response.

    Args:
        reward_model: see RolloutModule.
        reward_function: see RolloutModule.
        aggregate: see RolloutModule.
        updates: see RolloutModule.
        kwargs: see AlignmentModule.
    """

    def __init__(
        self,
        reward_model: str | None = None,
        reward_function: RewardFunction | list[Reward] | None = None,
        aggregate: Aggregate | None = None,
        updates: Updates = Updates(inner_epochs=1),
        **kwargs: Any,
    ):
        super().__init__(reward_model, reward_function, aggregate, updates, **kwargs)

    def setup(self, stage: str) -> None:
        """A group needs two responses at least."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "responses_per_prompt", 2) < 2:
            raise UserError(
                f"{type(self).__name__} compares the responses to one prompt: set data.responses_per_prompt to 2 or "
                "more, such as 4."
            )

    def group_advantages(self, scores: Tensor, group_size: int) -> Tensor:
        """Advantages [B] of whole responses.

        Args:
            scores: [B], with all penalties.
            group_size: n.
        """
        raise NotImplementedError

    def estimate_advantages(self, rollout: Rollout, rewards: Tensor) -> Experience:
        """The advantage of a response stands at each of its tokens.

        Args:
            rollout: of this process, in groups.
            rewards: [B, R], with all penalties.

        Raises:
            UserError: groups of one response.
        """
        if rollout.group_size < 2:
            raise UserError(f"{type(self).__name__} got groups of one response; set data.responses_per_prompt.")
        advantages = self.group_advantages(rewards.sum(1), rollout.group_size)
        return Experience.of(rollout, advantages=advantages[:, None] * rollout.response_mask)

    def log_iteration(self, experience: Experience, metrics: dict[str, float]) -> None:
        """With the share of groups that teach something: those whose advantages are not all 0."""
        largest = experience.advantages.abs().amax(1).view(-1, experience.group_size).amax(1)
        means = Means()
        means.add("groups_with_signal", (largest > 0).float())
        super().log_iteration(experience, metrics | means.compute())


class RLOO(GroupPolicy):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): unbiased, nothing to tune.

    The loss of a response is -advantage * ratio of its probabilities, clipped as PPO's; the mean over responses.

    Args:
        kwargs: see GroupPolicy.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    def group_advantages(self, scores: Tensor, group_size: int) -> Tensor:
        """Each score minus the mean of the others of its group.

        Args:
            scores: [B], with all penalties.
            group_size: n.
        """
        return leave_one_out(scores, group_size)

    def count(self, minibatch: Any) -> Tensor | float:
        """Responses over all processes."""
        return total_number(len(minibatch))

    def policy_objective(self, piece: Experience, *means: Means) -> Tensor:
        """Clipped surrogate of whole responses minus the entropy bonus, [B]."""
        mask = piece.response_mask
        new, old = self.new_and_old(piece)
        loss = policy_loss(new.logprobs.sum(1), old.sum(1), piece.advantages[:, 0], clip_range=self.updates.clip_range)
        self.add_update(new.logprobs - old, loss[:, None].expand(mask.shape), new.entropy, mask, *means)
        return loss - self.updates.entropy_coefficient * new.entropy.masked_fill(~mask, 0).sum(1)


class GRPO(GroupPolicy):
    """Group relative policy optimization (arXiv 2402.03300), and its variants by name.

    Dr. GRPO (arXiv 2503.20783): scale_advantages: false, average: constant. DAPO (arXiv 2503.14476): average: tokens,
    clip_range_high: 0.28, divergence_coefficient: 0.

    Args:
        scale_advantages: divide by the deviation of the group, as in GRPO's paper.
        average: over what the loss is a mean: responses (each response's mean over its own tokens, as in GRPO's paper:
            long wrong answers cost less a token); tokens (all tokens of a minibatch alike, as in DAPO); constant (sums
            divided by sampling.max_new_tokens, as in Dr. GRPO).
        clip_range_high: how far a probability may rise in an update where it should; null takes updates.clip_range.
        divergence_coefficient: weight of k3 (`functional.bregman`) of policy and reference as a term of the loss; 0.04
            in GRPO's paper. Its value estimates KL(policy || reference); its gradient, on the policy's own samples, is
            that of KL(reference || policy), and the mean of a group, which counts the response itself, leaves (n - 1) /
            n of the reward against it: the optimum is another than PPO's. 0 leaves it out, and the reference pass. For
            any other divergence take lrlhf.DivergenceCallback, which makes it a reward.
        kwargs: see GroupPolicy.
    """

    def __init__(
        self,
        scale_advantages: bool = True,
        average: Literal["responses", "tokens", "constant"] = "responses",
        clip_range_high: PositiveFloat | None = None,
        divergence_coefficient: NonNegativeFloat = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.scale_advantages, self.average = scale_advantages, average
        self.clip_range_high, self.divergence_coefficient = clip_range_high, divergence_coefficient
        check_ranges(self)
        if clip_range_high is not None and clip_range_high < self.updates.clip_range:
            raise UserError(
                f"model.clip_range_high={clip_range_high} is below model.updates.clip_range={self.updates.clip_range}."
            )

    @property
    def experience_type(self) -> type[Experience]:  # type: ignore[override]
        """With the reference's log-probs where they are part of the loss."""
        return ReferenceExperience if self.divergence_coefficient else Experience

    def group_advantages(self, scores: Tensor, group_size: int) -> Tensor:
        """Each score minus the mean of its group, divided by its deviation.

        Args:
            scores: [B], with all penalties.
            group_size: n.
        """
        return group_normalized(scores, group_size, scale=self.scale_advantages)

    def estimate_advantages(self, rollout: Rollout, rewards: Tensor) -> Experience:
        """With the reference's log-probs where the divergence is part of the loss.

        Args:
            rollout: of this process, in groups.
            rewards: [B, R], with all penalties.
        """
        experience = super().estimate_advantages(rollout, rewards)
        if not self.divergence_coefficient:
            return experience
        return ReferenceExperience.of(experience, ref_logprobs=self.logprobs(rollout, "reference"))

    def count(self, minibatch: Any) -> Tensor | float:
        """Response tokens over all processes, or responses, or responses of the greatest length there may be."""
        if self.average == "tokens":
            return total(minibatch.response_mask.sum())
        return total_number(len(minibatch)) * (self.sampling.max_new_tokens if self.average == "constant" else 1)

    def policy_objective(self, piece: Any, *means: Means) -> Tensor:
        """Clipped surrogate plus the divergence minus the entropy bonus, [B, R], 0 off the mask."""
        mask = piece.response_mask
        new, old = self.new_and_old(piece)
        loss = policy_loss(
            new.logprobs,
            old,
            piece.advantages,
            clip_range=self.updates.clip_range,
            clip_range_high=self.clip_range_high,
        )
        self.add_update(new.logprobs - old, loss, new.entropy, mask, *means)
        if self.divergence_coefficient:
            divergence = bregman(new.logprobs, piece.ref_logprobs)
            for mean in means:
                mean.add("loss_divergence", divergence, mask)
            loss = loss + self.divergence_coefficient * divergence
        objective = (loss - self.updates.entropy_coefficient * new.entropy).masked_fill(~mask, 0)
        return objective / piece.lengths[:, None].clamp(min=1) if self.average == "responses" else objective
