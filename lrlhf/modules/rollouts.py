"""What PPO, RLOO, GRPO and expert iteration share: rollouts, scores, shaped rewards, updates by minibatches.

One iteration is one Lightning batch and four statements: roll out, shape rewards, estimate advantages, optimise. A
method fills in the third, and the loss of a piece.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import record_function

from lrlhf.config import Updates
from lrlhf.distributed import any_process, rank, total, total_number, world_size
from lrlhf.errors import UserError
from lrlhf.functional import last_true, masked_variance, policy_loss
from lrlhf.functional.logprobs import TokenStatistics
from lrlhf.functional.randomness import generator
from lrlhf.metrics import Means
from lrlhf.model.sharding import gathered
from lrlhf.modules.base import ROLLOUT, SCORE, UPDATE
from lrlhf.modules.policy import PolicyModule
from lrlhf.modules.reward_source import Aggregate, RewardSource
from lrlhf.modules.rollout_callback import RolloutCallback
from lrlhf.modules.self_check import check_reward_model
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.types import Experience, Prompts, Rollout, Sequences


class RolloutModule(PolicyModule):
    """Train the adapter `policy` to earn reward without leaving the reference.

    Args:
        reward_model: hand-over folder of a RewardModel or RewardEnsemble run; or a sequence classifier with one label,
            as a folder or hub id, which is loaded as a separate frozen model and reads conversations by its own chat
            template.
        reward_function: scores (prompts, responses, ...) as texts to [B], by import path; or several, as a list of
            lrlhf.rewards.Reward; instead of a reward model.
        aggregate: how the scores of a RewardEnsemble become one.
        updates: how the policy learns from a rollout.
        kwargs: see AlignmentModule.
    """

    task = "prompts"
    experience_type: ClassVar[type[Experience]] = Experience
    """What the policy learns from."""
    dropout_in_updates: bool = False
    """Never in our methods: the first ratio would not be 1."""

    def __init__(
        self,
        reward_model: str | None = None,
        reward_function: RewardFunction | list[Reward] | None = None,
        aggregate: Aggregate | None = None,
        updates: Updates = Updates(inner_epochs=1),
        **kwargs: Any,
    ):
        self.source = RewardSource(type(self).__name__, reward_model, reward_function, aggregate)
        super().__init__(**kwargs)
        self.updates = updates

    # Build

    def handover_folders(self) -> list[str]:
        """Of the SFT run and of the reward models."""
        return [*super().handover_folders(), *self.source.folders]

    def build_roles(self) -> None:
        """The reward model's roles, the reference and the policy."""
        self.source.build(self)
        super().build_roles()

    def identity(self) -> dict[str, Any]:
        """With what the reward source adds."""
        return super().identity() | self.source.identity()

    def setup(self, stage: str) -> None:
        """Check batch sizes, sampling and reward functions before the base is loaded."""
        super().setup(stage)
        if stage != "fit":
            return
        name = type(self).__name__
        if self.sampling.truncates:
            raise UserError(
                f"{name}'s ratio needs the whole distribution: leave sampling.top_k at 0, top_p at 1, temperature "
                "above 0."
            )
        if self.trainer.max_steps != -1:
            raise UserError(
                f"trainer.max_steps counts optimizer steps, of which {name} may take several per iteration; "
                "bound the run by trainer.limit_train_batches and trainer.max_epochs."
            )
        self.check_minibatches(self.updates.minibatch_size)

    def check_minibatches(self, size: int) -> None:
        """Refuse minibatches that the rollout does not divide into.

        Args:
            size: responses of one optimizer step.

        Raises:
            UserError: naming what to change.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        batch_size, group = getattr(data, "batch_size", None), getattr(data, "responses_per_prompt", 1)
        key = f"model.{'ppo' if hasattr(self, 'ppo') else 'updates'}.minibatch_size={size}"
        if batch_size and batch_size % size:
            raise UserError(f"{key} does not divide data.batch_size={batch_size}.")
        if world_size() > 1 and size % (world_size() * group):
            groups = f" in groups of data.responses_per_prompt={group}" if group > 1 else ""
            raise UserError(f"{key} does not divide among {world_size()} processes{groups}.")

    def self_check(self, batch: Prompts) -> list[str]:
        """The reward model scores its probe as it did when it was handed over."""
        self.source.check_columns(batch)
        base, trainable, *others = super().self_check(batch)
        probes = [
            check_reward_model(self.backbone, self.tokenizer, self.parents[folder], self.dtype_name, role)
            for role, folder in self.source.roles.items()
        ]
        return [base, trainable, *(probe for probe in probes if probe is not None), *others]

    # One iteration

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        """One iteration."""
        with gathered(self.backbone):
            rollout = self.rollout(batch, "train", self.iteration)
            rewards = self.shape_rewards(rollout)
        experience = self.estimate_advantages(rollout, rewards)
        with record_function(UPDATE):
            self.optimize(experience)

    def rollout(self, batch: Prompts, *place: int | str) -> Any:
        """Sample one response to each row; its log-probs and score.

        Args:
            batch: of prompts.
            place: where in the run it happens, e.g. ("train", iteration); the draws depend on it and on the seed.
        """
        with record_function(ROLLOUT):
            responses = self.sample(batch, "policy", *place)
        with record_function(SCORE):
            return self.evaluate(Sequences(batch.prompt_ids, batch.prompt_mask, *responses), batch)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, batch: Prompts) -> Any:
        """Log-probs of the policy, NaN where nothing will read them, and scores of responses.

        Args:
            sequences: prompts with their responses, whoever sampled them.
            batch: the prompts, whose texts and columns a reward function gets.
        """
        if self.logprobs_are_read(len(sequences)):
            logprobs = self.logprobs(sequences, "policy")
        else:
            logprobs = torch.full(sequences.response_mask.shape, math.nan, device=self.device)
        scores = self.score(sequences, batch)
        parts = self.source.parts(scores)
        return Rollout.of(sequences, logprobs=logprobs, scores=scores, parts=parts, groups=batch.groups)

    @property
    def rollout_callbacks(self) -> list[RolloutCallback]:
        """Those of the trainer, in their order."""
        return [c for c in self.trainer.callbacks if isinstance(c, RolloutCallback)]  # type: ignore[attr-defined]

    def logprobs_are_read(self, rows: int) -> bool:
        """Whether a callback or an update looks at the log-probs of the policy that sampled; else no pass makes them.

        Args:
            rows: of a rollout, in this process.

        Returns:
            Always true outside of training, where whoever asks for a rollout gets all of it.
        """
        if self._trainer is None or not self.trainer.training or self.updates_read_logprobs(rows):
            return True
        return any(callback.reads_logprobs for callback in self.rollout_callbacks)

    def updates_read_logprobs(self, rows: int) -> bool:
        """Whether a rollout serves more than one step: the first has a ratio of 1, whatever was sampled.

        Args:
            rows: of a rollout, in this process.
        """
        return self.updates.inner_epochs > 1 or self.updates.minibatch_size < rows * world_size()

    def score(self, sequences: Sequences, batch: Prompts) -> Tensor:
        """Scores [B] fp32 of the responses: the reward model's, ours or of others, or the reward functions'.

        A reward model reads its score at the end-of-sequence token and has seen no response without one; so it reads a
        response that was cut off as if it ended there. What cutting off costs is MissingEOSPenalty's to say.

        Args:
            sequences: prompts with their responses.
            batch: the prompts, whose texts and columns a reward function gets.
        """
        return self.source.scores(self, sequences, batch)

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Rewards [B, R]: the score on the last token, then folded over the callbacks in their order.

        Args:
            rollout: of this process.
        """
        rewards = last_true(rollout.response_mask) * rollout.scores[:, None]
        for callback in self.rollout_callbacks:
            rewards = callback.shape_rewards(self.trainer, self, rollout, rewards)
        finite = bool(rewards[rollout.response_mask].isfinite().all())
        if self.on_nonfinite == "stop" and any_process(not finite):
            self.refuse_nonfinite("a reward is not finite", "look at the reward model, the reward function or penalty")
        for callback in self.rollout_callbacks:
            callback.on_rollout_end(self.trainer, self, rollout, rewards)
        return rewards

    def estimate_advantages(self, rollout: Any, rewards: Tensor) -> Any:
        """How much better each token or response is than expected.

        Args:
            rollout: of this process.
            rewards: [B, R], with all penalties.
        """
        raise NotImplementedError

    def optimize(self, experience: Any) -> None:
        """Inner epochs of minibatches, until the update is too far from the policy that sampled."""
        means, stopped, settings = Means(), False, self.updates
        for epoch in range(settings.inner_epochs):
            order = generator(self.seed, "minibatches", self.iteration, epoch)
            for minibatch in self.select(experience).minibatches(settings.minibatch_size, order, rank(), world_size()):
                step = Means()
                with self.backbone.training_pass(dropout=self.dropout_in_updates):
                    metrics = self.optimization_step(self.losses(minibatch, step, means))
                for name, value in metrics.items():
                    means.add(name, torch.tensor([value]))
                update_kl = step.compute().get("update_kl", 0.0)
                stopped = settings.target_update_kl is not None and update_kl > settings.target_update_kl
                if stopped:
                    break
            if stopped:
                break
        self.log_iteration(experience, means.compute() | {"inner_epochs": epoch + 1.0})

    def select(self, experience: Any) -> Any:
        """What of a rollout is learned from: all of it."""
        return experience

    def losses(self, minibatch: Any, *means: Means) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch, in the role `policy`."""
        count = self.count(minibatch)
        with self.backbone.role("policy"):
            yield from self.losses_of(minibatch, lambda piece: self.policy_objective(piece, *means).sum() / count)

    def count(self, minibatch: Sequences) -> Tensor | float:
        """What the sum of a minibatch's objectives is divided by: its response tokens over all processes."""
        return total(minibatch.response_mask.sum())

    def policy_objective(self, piece: Experience, *means: Means) -> Tensor:
        """Clipped surrogate minus the entropy bonus, [B, R], 0 off the mask."""
        mask = piece.response_mask
        new, old = self.new_and_old(piece)
        loss = policy_loss(new.logprobs, old, piece.advantages, clip_range=self.updates.clip_range)
        self.add_update(new.logprobs - old, loss, new.entropy, mask, *means)
        return (loss - self.updates.entropy_coefficient * new.entropy).masked_fill(~mask, 0)

    def new_and_old(self, piece: Experience) -> tuple[TokenStatistics, Tensor]:
        """What the policy says now, and log-probs [B, R] of the policy that sampled.

        A rollout without log-probs is one whose only step this is, so that both policies are one.
        """
        new = self.statistics(piece)
        return new, torch.where(piece.logprobs.isnan(), new.logprobs.detach(), piece.logprobs)

    def add_update(self, log_ratio: Tensor, loss: Tensor, entropy: Tensor, mask: Tensor, *means: Means) -> None:
        """Note the loss, the entropy, and how far the update has come.

        Args:
            log_ratio: [B, R], of the policy now and the policy that sampled.
            loss: [B, R].
            entropy: [B, R].
            mask: [B, R] bool.
            means: where to note them.
        """
        log_ratio = log_ratio.detach()
        ratio = log_ratio.expm1()
        high = getattr(self, "clip_range_high", None) or self.updates.clip_range
        for mean in means:
            mean.add("policy_loss", loss, mask)
            mean.add("entropy", entropy, mask)
            mean.add("update_kl", ratio - log_ratio, mask)
            mean.add("clip_fraction", ((ratio > high) | (ratio < -self.updates.clip_range)).float(), mask)

    @property
    def entropy_trains(self) -> bool:
        """If its coefficient is above 0."""
        return self.updates.entropy_coefficient > 0

    # Report

    def log_iteration(self, experience: Any, metrics: dict[str, float]) -> None:
        """Log an iteration.

        Args:
            experience: of this process.
            metrics: of the updates.
        """
        metrics |= self.rollout_metrics(experience)
        self.log_dict({k: metrics[k] for k in ("score", "length")}, prog_bar=True, logger=False)
        self.end_iteration(metrics)

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Score and its parts, response length and share of responses that ended by themselves."""
        ended = torch.isin(rollout.response_ids, self.stop_ids.to(self.device)) & last_true(rollout.response_mask)
        rows = torch.ones_like(rollout.scores, dtype=torch.bool)
        means = Means()
        means.add("score", rollout.scores)
        means.add("length", rollout.lengths)
        means.add("ended", ended.any(-1))
        for name, part in zip(self.source.names, rollout.parts.unbind(1), strict=False):
            means.add(name, part)
        deviation = masked_variance(rollout.scores, rows, total).sqrt()
        return {**means.compute(), "score_deviation": float(deviation)}

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score, length and (through the callbacks) divergence on held-out prompts, always with the same draws."""
        with gathered(self.backbone):
            rollout = self.rollout(batch, "validate", batch_idx)
            self.shape_rewards(rollout)
        metrics = {f"{self.stage}/{k}": v for k, v in self.rollout_metrics(rollout).items()}
        rows = int(total_number(len(batch)))
        self.log_dict(metrics, prog_bar=False, batch_size=rows)
        self.log(f"{self.stage}_score", metrics[f"{self.stage}/score"], prog_bar=True, logger=False, batch_size=rows)
