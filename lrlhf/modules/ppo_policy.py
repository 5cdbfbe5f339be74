"""Proximal policy optimization with a penalty for leaving the reference (arXiv 2309.09055, section 2).

One iteration is one Lightning batch and four statements: roll out, shape rewards, estimate advantages, optimise
(`RolloutModule.training_step`).

What it is: PPO-clip on the tokens of the responses; policy, reference, reward model and critic are roles on one frozen
base; the penalty is a reward (callbacks), never a gradient.

Where it departs from the paper's code (docs/paper.md; `PaperPPO` puts each back by name):
1. Minibatches are what they are called: distinct rows, divided by their token count, one optimizer step each.
2. Means, whitening and GAE run over response tokens, never over padding.
3. Dropout is off in old and new log-probs alike, so the first ratio is exactly 1.
4. One base in memory instead of four, adapters in fp32.
5. Responses are scored as the tokens that were sampled, not decoded and tokenised again; one that was cut off is
   scored with an end-of-sequence token, as the reward model was trained.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrlhf.config import PPO
from lrlhf.distributed import total
from lrlhf.functional import generalized_advantages, value_loss, whiten
from lrlhf.metrics import Means, explained_variance
from lrlhf.modules.reward_source import Aggregate
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.types import CriticExperience, CriticRollout, Prompts, Sequences


class PPOPolicy(RolloutModule):
    """Train the adapter `policy` (and a critic) to earn reward without leaving the reference.

    Args:
        reward_model: hand-over folder of a RewardModel or RewardEnsemble run; or a sequence classifier with one label,
            as a folder or hub id, which is loaded as a separate frozen model and reads conversations by its own chat
            template.
        reward_function: scores (prompts, responses, ...) as texts to [B], by import path; or several, as a list of
            lrlhf.rewards.Reward; instead of a reward model.
        aggregate: how the scores of a RewardEnsemble become one.
        ppo: how the policy learns from a rollout.
        kwargs: see AlignmentModule.
    """

    trained_roles = ("policy", "critic")
    experience_type = CriticExperience

    def __init__(
        self,
        reward_model: str | None = None,
        reward_function: RewardFunction | list[Reward] | None = None,
        aggregate: Aggregate | None = None,
        ppo: PPO = PPO(),
        **kwargs: Any,
    ):
        super().__init__(reward_model, reward_function, aggregate, updates=ppo, **kwargs)
        self.ppo = ppo

    def build_roles(self) -> None:
        """With a critic, which starts as the (first) reward model where there is one."""
        super().build_roles()
        below = self.source.stack or self.backbone.stacks["reference"]
        if self.ppo.critic == "head":
            self.backbone.add_role("critic", below, trainable="head", head="zero")
        else:
            first = next(iter(self.source.roles), None)
            self.backbone.add_role("critic", (*below, "critic"), trainable=True, head="zero", like=first)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, batch: Prompts) -> CriticRollout:
        """Log-probs of the policy, values of the critic and scores of responses.

        Args:
            sequences: prompts with their responses, whoever sampled them.
            batch: the prompts, whose texts and columns a reward function gets.
        """
        mask = sequences.response_mask
        with self.backbone.role("critic"):
            if self.ppo.critic == "head":
                head: Any = self.backbone.heads["critic"]
                shape = (*mask.shape, head.in_features)
                states = self.per_row(sequences, shape, self.backbone.encode).masked_fill(~mask[..., None], 0)
                values = self.backbone.values(states).masked_fill(~mask, 0)
            else:
                states = torch.zeros(*mask.shape, 0, device=self.device)
                values = self.per_row(sequences, mask.shape, self._values)
        return CriticRollout.of(super().evaluate(sequences, batch), values=values, states=states)

    def estimate_advantages(self, rollout: CriticRollout, rewards: Tensor) -> CriticExperience:
        """Whiten rewards in scale, GAE, whiten advantages.

        Args:
            rollout: of this process.
            rewards: [B, R], with all penalties.

        Returns:
            The rollout with advantages of mean 0 and variance 1 over the response tokens of all processes, and returns.
        """
        mask = rollout.response_mask
        scaled = whiten(rewards, mask, center=False, total=total) if self.ppo.whiten_rewards else rewards
        advantages, returns = generalized_advantages(
            scaled, rollout.values, mask, discount=self.ppo.discount, trace_decay=self.ppo.trace_decay
        )
        return CriticExperience.of(rollout, advantages=whiten(advantages, mask, total=total), returns=returns)

    def losses(self, minibatch: CriticExperience, *means: Means) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch, each in its role."""
        tokens = self.count(minibatch)
        if self.iteration >= self.ppo.critic_warmup:
            yield from super().losses(minibatch, *means)
        weight = self.ppo.value_coefficient
        with self.backbone.role("critic"):
            yield from self.losses_of(
                minibatch, lambda piece: weight * self.value_objective(piece, *means).sum() / tokens
            )

    def value_objective(self, piece: CriticExperience, *means: Means) -> Tensor:
        """Clipped squared error of the critic, [B, R], 0 off the mask."""
        if self.ppo.critic == "head":
            values = self.backbone.values(piece.states).masked_fill(~piece.response_mask, 0)
        else:
            values = self._values(piece)
        loss = value_loss(values, piece.values, piece.returns, clip_range=self.ppo.value_clip_range)
        for mean in means:
            mean.add("value_loss", loss, piece.response_mask)
        return loss.masked_fill(~piece.response_mask, 0)

    def _values(self, piece: Sequences) -> Tensor:
        return self.backbone.values(self.backbone.encode(piece)).masked_fill(~piece.response_mask, 0)

    def log_iteration(self, experience: CriticExperience, metrics: dict[str, float]) -> None:
        """With how well the critic predicts."""
        mask = experience.response_mask
        metrics["explained_variance"] = explained_variance(experience.values, experience.returns, mask)
        super().log_iteration(experience, metrics)
