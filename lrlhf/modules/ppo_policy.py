"""Proximal policy optimization with a penalty for leaving the reference (arXiv 2309.09055, section 2).

One iteration is one Lightning batch and four statements: roll out, shape rewards, estimate advantages, optimise.

What it is: PPO-clip on the tokens of one response per prompt; policy, reference, reward model and critic are roles on
one frozen base; the penalty is a reward (callbacks), never a gradient.

Where it departs from the paper's code:
1. Minibatches are what they are called: distinct rows, divided by their token count, one optimizer step each.
2. Means, whitening and GAE run over response tokens, never over padding.
3. Dropout is off in old and new log-probs alike, so the first ratio is exactly 1.
4. One base in memory instead of four, adapters in fp32.
5. Responses are scored as the tokens that were sampled, not decoded and tokenised again; one that was cut off is
   scored with an end-of-sequence token, as the reward model was trained.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lrlhf.config import PPO
from lrlhf.distributed import any_process, rank, total, total_number, world_size
from lrlhf.errors import UserError
from lrlhf.functional import (
    append_end,
    exact_js,
    exact_kl,
    exact_total_variation,
    generalized_advantages,
    last_true,
    masked_variance,
    policy_loss,
    token_statistics,
    value_loss,
    vocabulary_divergence,
    whiten,
)
from lrlhf.functional.divergence import Divergence
from lrlhf.functional.logprobs import TokenStatistics
from lrlhf.functional.randomness import generator
from lrlhf.metrics import Means, explained_variance
from lrlhf.model.classifier import Classifier, is_classifier
from lrlhf.model.sharding import gathered
from lrlhf.modules.base import ROLLOUT, SCORE, UPDATE, AlignmentModule
from lrlhf.modules.rollout_callback import RolloutCallback
from lrlhf.modules.self_check import (
    check_base,
    check_policy_is_reference,
    check_reward_model,
    check_trainable,
    check_update,
    rounding,
    unequal_rows,
)
from lrlhf.run.handover import Handover
from lrlhf.types import Experience, Prompts, Rollout, Sequences

RewardFunction = Callable[[list[str], list[str]], Tensor]
"""Maps prompts and responses as texts to scores [B]."""


class PPOPolicy(AlignmentModule):
    """Train the adapter `policy` (and a critic) to earn reward without leaving the reference.

    Args:
        reward_model: hand-over folder of a RewardModel run; or a sequence classifier with one label, as a folder or hub
            id, which is loaded as a separate frozen model and reads conversations by its own chat template.
        reward_function: scores (prompts, responses) as texts to [B], by import path; instead of a reward model.
        ppo: how the policy learns from a rollout.
        kwargs: see AlignmentModule.
    """

    task = "prompts"
    role = "policy"

    def __init__(
        self,
        reward_model: str | None = None,
        reward_function: RewardFunction | None = None,
        ppo: PPO = PPO(),
        **kwargs: Any,
    ):
        if (reward_model is None) == (reward_function is None):
            raise UserError("PPO needs one source of reward: set model.reward_model or model.reward_function.")
        self.reward_model, self.reward_function = reward_model, reward_function
        self.foreign = reward_model is not None and is_classifier(reward_model)
        """Whether the reward model is a sequence classifier of its own."""
        super().__init__(**kwargs)
        self.ppo = ppo

    # Build

    def handover_folders(self) -> list[str]:
        """Of the SFT run and of the reward model."""
        return [folder for folder in (self.sft, None if self.foreign else self.reward_model) if folder]

    def build_roles(self) -> None:
        """Reference, policy, reward and critic as roles on one base."""
        below = self.load_sft()
        under_critic = below
        if self.foreign:
            self.classifier = Classifier(str(self.reward_model), self.dtype_name)
        elif self.reward_model is not None:
            reward = self.parents[self.reward_model]
            self._check_reward(reward, below)
            reward.load(self.backbone, "reward")
            under_critic = reward.stack
        self.backbone.add_role("reference", below)
        self.backbone.add_role("policy", (*below, "policy"), trainable=True)
        self.backbone.add_role("critic", (*under_critic, "critic"), trainable=True, head="zero")

    def _check_reward(self, reward: Handover, below: tuple[str, ...]) -> None:
        if not reward.head:
            raise UserError(f"model.reward_model={self.reward_model} was handed over by a {reward.role} run.")
        if reward.stack[: len(below)] != below or (not below and reward.stack[:1] == ("sft",)):
            raise UserError(
                f"the reward model lies on the adapters {list(reward.stack)} and the policy on {list(below)}; "
                "give model.sft the SFT run that the reward model started from."
            )
        if self.sft and reward.adapters.get("sft") != self.parents[self.sft].adapters.get("sft"):
            raise UserError(
                f"model.reward_model={self.reward_model} was trained on another SFT adapter than model.sft={self.sft}."
            )

    def identity(self) -> dict[str, Any]:
        """With a reward model of others also its fingerprint."""
        return super().identity() | ({"reward model": self.classifier.fingerprint} if self.foreign else {})

    def setup(self, stage: str) -> None:
        """Check batch sizes and sampling before the base is loaded."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.sampling.truncates:
            raise UserError(
                "PPO's ratio needs the whole distribution: leave sampling.top_k at 0, top_p at 1, temperature above 0."
            )
        if self.trainer.max_steps != -1:
            raise UserError(
                "trainer.max_steps counts optimizer steps, of which PPO takes several per iteration; "
                "bound the run by trainer.limit_train_batches and trainer.max_epochs."
            )
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        size = self.ppo.minibatch_size
        if batch_size and batch_size % size:
            raise UserError(f"model.ppo.minibatch_size={size} does not divide data.batch_size={batch_size}.")
        if size % world_size():
            raise UserError(f"model.ppo.minibatch_size={size} does not divide among {world_size()} processes.")

    def self_check(self, batch: Prompts) -> list[str]:
        """Everything is what it claims to be: base, roles, reward model, passes, update, and at step 0 the policy."""
        found = [check_trainable(self.backbone, ("policy", "critic")), check_base(self.backbone)]
        probes = [check_reward_model(self.backbone, self.tokenizer, p, self.dtype_name) for p in self.parents.values()]
        found += [probe for probe in probes if probe is not None]
        found += super().self_check(batch)
        text, allowed = unequal_rows(batch), rounding(self.dtype_name, self.quantize)
        found.append(check_update(self.backbone, lambda rows: self.statistics(rows).logprobs, text, allowed))
        if self.iteration == 0:
            log_ratio = self.logprobs(text, "policy") - self.logprobs(text, "reference")
            exact = (exact_kl, exact_js, exact_total_variation)
            divergences = zip(exact, self.divergences(text, exact), strict=True)
            found.append(check_policy_is_reference(log_ratio, {f.__name__: d for f, d in divergences}))
        return found

    # One iteration

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        """One PPO iteration."""
        with gathered(self.backbone):
            rollout = self.rollout(batch, "train", self.iteration)
            rewards = self.shape_rewards(rollout)
        experience = self.estimate_advantages(rollout, rewards)
        with record_function(UPDATE):
            self.optimize(experience)

    def rollout(self, batch: Prompts, *place: int | str) -> Rollout:
        """Sample one response per prompt; its log-probs, values and score.

        Args:
            batch: of prompts.
            place: where in the run it happens, e.g. ("train", iteration); the draws depend on it and on the seed.
        """
        with record_function(ROLLOUT):
            responses = self.sample(batch, "policy", *place)
        with record_function(SCORE):
            return self.evaluate(Sequences(batch.prompt_ids, batch.prompt_mask, *responses), batch)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, batch: Prompts) -> Rollout:
        """Log-probs of the policy, values of the critic and scores of responses.

        Args:
            sequences: prompts with their responses, whoever sampled them.
            batch: the prompts, whose texts a reward function gets.
        """
        logprobs = self.logprobs(sequences, "policy")
        with self.backbone.role("critic"):
            values = self.per_row(sequences, sequences.response_mask.shape, self._values)
        return Rollout.of(sequences, logprobs=logprobs, values=values, scores=self.score(sequences, batch))

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Rewards [B, R]: the score on the last token, then folded over the callbacks in their order.

        Args:
            rollout: of this process.
        """
        rewards = last_true(rollout.response_mask) * rollout.scores[:, None]
        callbacks = [c for c in self.trainer.callbacks if isinstance(c, RolloutCallback)]  # type: ignore[attr-defined]
        for callback in callbacks:
            rewards = callback.shape_rewards(self.trainer, self, rollout, rewards)
        finite = bool(rewards[rollout.response_mask].isfinite().all())
        if self.on_nonfinite == "stop" and any_process(not finite):
            self.refuse_nonfinite("a reward is not finite", "look at the reward model, the reward function or penalty")
        for callback in callbacks:
            callback.on_rollout_end(self.trainer, self, rollout, rewards)
        return rewards

    def estimate_advantages(self, rollout: Rollout, rewards: Tensor) -> Experience:
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
        return Experience.of(rollout, advantages=whiten(advantages, mask, total=total), returns=returns)

    def optimize(self, experience: Experience) -> None:
        """Inner epochs of minibatches, until the update is too far from the policy that sampled."""
        means, stopped = Means(), False
        for epoch in range(self.ppo.inner_epochs):
            order = generator(self.seed, "minibatches", self.iteration, epoch)
            for minibatch in experience.minibatches(self.ppo.minibatch_size, order, rank(), world_size()):
                step = Means()
                with self.backbone.training_pass(dropout=False):
                    metrics = self.optimization_step(self.losses(minibatch, step, means))
                for name, value in metrics.items():
                    means.add(name, torch.tensor([value]))
                update_kl = step.compute().get("update_kl", 0.0)
                stopped = self.ppo.target_update_kl is not None and update_kl > self.ppo.target_update_kl
                if stopped:
                    break
            if stopped:
                break
        self._log_iteration(experience, means.compute() | {"inner_epochs": epoch + 1.0})

    def losses(self, minibatch: Experience, *means: Means) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch, each in its role."""
        tokens = total(minibatch.response_mask.sum())
        if self.iteration >= self.ppo.critic_warmup:
            with self.backbone.role("policy"):
                yield from self.losses_of(minibatch, lambda piece: self.policy_objective(piece, *means).sum() / tokens)
        weight = self.ppo.value_coefficient
        with self.backbone.role("critic"):
            yield from self.losses_of(
                minibatch, lambda piece: weight * self.value_objective(piece, *means).sum() / tokens
            )

    def policy_objective(self, piece: Experience, *means: Means) -> Tensor:
        """Clipped surrogate minus the entropy bonus, [B, R], 0 off the mask."""
        mask = piece.response_mask
        new = self.statistics(piece)
        loss = policy_loss(new.logprobs, piece.logprobs, piece.advantages, clip_range=self.ppo.clip_range)
        log_ratio = (new.logprobs - piece.logprobs).detach()
        for mean in means:
            mean.add("policy_loss", loss, mask)
            mean.add("entropy", new.entropy, mask)
            mean.add("update_kl", log_ratio.expm1() - log_ratio, mask)
            mean.add("clip_fraction", (log_ratio.expm1().abs() > self.ppo.clip_range).float(), mask)
        return (loss - self.ppo.entropy_coefficient * new.entropy).masked_fill(~mask, 0)

    def value_objective(self, piece: Experience, *means: Means) -> Tensor:
        """Clipped squared error of the critic, [B, R], 0 off the mask."""
        values = self._values(piece)
        loss = value_loss(values, piece.values, piece.returns, clip_range=self.ppo.value_clip_range)
        for mean in means:
            mean.add("value_loss", loss, piece.response_mask)
        return loss.masked_fill(~piece.response_mask, 0)

    # Passes over sequences

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, role: str) -> Tensor:
        """Log-probabilities [B, R] fp32 of the response tokens under a role, at the sampling temperature.

        Args:
            sequences: prompts with their responses.
            role: policy or reference.
        """
        with self.backbone.role(role):
            return self.per_row(sequences, sequences.response_mask.shape, lambda rows: self.statistics(rows).logprobs)

    @torch.no_grad()
    def divergences(self, sequences: Sequences, functions: Sequence[Divergence]) -> list[Tensor]:
        """Exact divergences [B, R] fp32 of policy and reference over the whole vocabulary, in chunks, in one pass.

        Args:
            sequences: prompts with their responses.
            functions: of log-probabilities over the vocabulary, marked by `@over_vocabulary`.

        Returns:
            One tensor a function, 0 off the mask.
        """

        def compute(rows: Sequences) -> Tensor:
            with self.backbone.role("policy"):
                hidden, head = self.backbone.encode(rows), self.backbone.lm_head
            with self.backbone.role("reference"):
                ref_hidden, ref_head = self.backbone.encode(rows), self.backbone.lm_head
            inputs = hidden, ref_hidden, head, ref_head, rows.response_mask
            temperature = self.sampling.temperature
            return torch.stack([vocabulary_divergence(*inputs, f, temperature=temperature) for f in functions], dim=-1)

        shape = (*sequences.response_mask.shape, len(functions))
        return list(self.per_row(sequences, shape, compute).unbind(-1))

    def score(self, sequences: Sequences, batch: Prompts) -> Tensor:
        """Scores [B] fp32 of the responses: the reward model's, ours or of others, or the reward function's.

        A reward model reads its score at the end-of-sequence token and has seen no response without one; so it reads a
        response that was cut off as if it ended there. What cutting off costs is MissingEOSPenalty's to say.

        Args:
            sequences: prompts with their responses.
            batch: the prompts, whose texts a reward function gets.
        """
        if self.reward_function is None and not self.foreign:
            ended = append_end(sequences.response_ids, sequences.response_mask, self.stop_ids.to(self.device))
            complete = Sequences(sequences.prompt_ids, sequences.prompt_mask, *ended)
            with self.backbone.role("reward"):
                return self.per_row(complete, [len(complete)], self.backbone.scores)
        responses = self.decode(sequences.response_ids, sequences.response_mask)
        if self.reward_function is None:
            turns = batch.turns or tuple(({"role": "user", "content": text},) for text in batch.texts)
            talks = [[*t, {"role": "assistant", "content": r}] for t, r in zip(turns, responses, strict=True)]
            return self.classifier.scores(talks, self.device, self.micro_batch_size)
        scores = torch.as_tensor(self.reward_function(list(batch.texts), responses), dtype=torch.float32)
        if scores.shape != (len(batch),):
            raise UserError(f"the reward function returned shape {tuple(scores.shape)} for {len(batch)} responses.")
        return scores.to(self.device)

    def statistics(self, piece: Sequences) -> TokenStatistics:
        """Log-probabilities and entropies [B, R] of the response tokens in the current role."""
        return token_statistics(
            self.backbone.encode(piece),
            self.backbone.lm_head,
            piece.response_ids,
            piece.response_mask,
            temperature=self.sampling.temperature,
            entropy_trains=self.ppo.entropy_coefficient > 0,
        )

    def _values(self, piece: Sequences) -> Tensor:
        return self.backbone.values(self.backbone.encode(piece)).masked_fill(~piece.response_mask, 0)

    # Report

    def _log_iteration(self, experience: Experience, metrics: dict[str, float]) -> None:
        mask = experience.response_mask
        metrics |= self.rollout_metrics(experience)
        metrics["explained_variance"] = explained_variance(experience.values, experience.returns, mask)
        self.log_dict({k: metrics[k] for k in ("score", "length")}, prog_bar=True, logger=False)
        self.end_iteration(metrics)

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Score, response length and share of responses that ended by themselves."""
        ended = torch.isin(rollout.response_ids, self.stop_ids.to(self.device)) & last_true(rollout.response_mask)
        rows = torch.ones_like(rollout.scores, dtype=torch.bool)
        means = Means()
        means.add("score", rollout.scores)
        means.add("length", rollout.lengths)
        means.add("ended", ended.any(-1))
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
