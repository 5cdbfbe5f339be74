"""Where the scores of a rollout come from: a reward model, an ensemble of them, a model of others, or functions."""

from typing import Any, Literal

import torch
from torch import Tensor

from lrlhf.errors import UserError
from lrlhf.functional import append_end
from lrlhf.model.classifier import Classifier, is_classifier
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.run.handover import Handover
from lrlhf.types import Prompts, Sequences

Aggregate = Literal["mean", "lower_bound", "worst"]
"""mean of the members; mean minus their deviation; or the lowest: the last two distrust what members disagree on.

Coste et al., "Reward model ensembles help mitigate overoptimization" (arXiv 2310.02743), section 3.
"""


class RewardSource:
    """One source of reward.

    Args:
        module: name of the module's class, for messages.
        reward_model: see RolloutModule.
        reward_function: see RolloutModule.
        aggregate: see RolloutModule.

    Raises:
        UserError: none or several sources, or an aggregate of one score.
    """

    def __init__(
        self,
        module: str,
        reward_model: str | None,
        reward_function: RewardFunction | list[Reward] | None,
        aggregate: Aggregate | None,
    ):
        if (reward_model is None) == (reward_function is None):
            raise UserError(f"{module} needs one source of reward: set model.reward_model or model.reward_function.")
        self.reward_model = reward_model
        self.foreign = reward_model is not None and is_classifier(reward_model)
        """Whether the reward model is a sequence classifier of its own."""
        several = isinstance(reward_function, list)
        listed: Any = reward_function if isinstance(reward_function, list) else [reward_function]
        self.functions = [f if isinstance(f, Reward) else Reward(f) for f in listed if f is not None]
        names = [reward.name for reward in self.functions]
        if several and (not names or len(set(names)) < len(names)):
            raise UserError(f"model.reward_function must list functions of different names, got {names}.")
        self.folders = [] if reward_model is None or self.foreign else Handover.members(reward_model)
        """Of the reward models on our base."""
        self.roles = dict(zip(self._role_names(), self.folders, strict=True))
        """Their roles, each with its hand-over folder."""
        if aggregate is not None and len(self.folders) < 2:
            raise UserError(
                f"model.aggregate={aggregate} is for an ensemble, and model.reward_model={reward_model} has one "
                "member; train lrlhf.RewardEnsemble, or leave model.aggregate out."
            )
        self.aggregate = aggregate or "mean"
        self.stack: tuple[str, ...] = ()
        """Adapters of the (first) reward model, once it is built."""
        self.names = [f"score/{name}" for name in names] if several else ["disagreement"] if self.folders[1:] else []
        """Of the parts of a score that are logged."""
        self._parts = torch.zeros(0, 0)

    def _role_names(self) -> list[str]:
        return ["reward"] if len(self.folders) == 1 else [f"reward_{i}" for i in range(1, len(self.folders) + 1)]

    def identity(self) -> dict[str, Any]:
        """The fingerprint of a reward model of others."""
        return {"reward model": self.classifier.fingerprint} if self.foreign else {}

    def build(self, module: Any) -> None:
        """Load the reward models as roles on the module's base, or the model of others beside it.

        Args:
            module: with a backbone that has the role `reference` or can have it, and the manifests of its parents.

        Raises:
            UserError: a reward model of another SFT adapter, or none.
        """
        if self.foreign:
            self.classifier = Classifier(str(self.reward_model), module.dtype_name)
        below = module.parents[module.sft].stack if module.sft else ()
        for role, folder in self.roles.items():
            reward = module.parents[folder]
            _check(reward, folder, below, module)
            reward.load(module.backbone, role)
            self.stack = self.stack or reward.stack

    def check_columns(self, batch: Prompts) -> None:
        """The data has what the reward functions ask for.

        Args:
            batch: of prompts.

        Raises:
            UserError: naming function and column.
        """
        for reward in self.functions:
            reward.columns(batch.columns, [0] * len(batch))

    def scores(self, module: Any, sequences: Sequences, batch: Prompts) -> Tensor:
        """Scores [B] fp32 (see RolloutModule.score); their parts are kept for `parts`.

        Args:
            module: that was given to `build`.
            sequences: prompts with their responses.
            batch: the prompts.
        """
        if self.folders:
            found = self._members(module, sequences)
            self._parts = found.std(1, correction=0)[:, None] if len(self.folders) > 1 else found[:, :0]
            return self._aggregate(found)
        responses = module.decode(sequences.response_ids, sequences.response_mask)
        if self.foreign:
            turns = batch.turns or tuple(({"role": "user", "content": text},) for text in batch.texts)
            talks = [[*t, {"role": "assistant", "content": r}] for t, r in zip(turns, responses, strict=True)]
            return self.classifier.scores(talks, module.device, module.micro_batch_size)
        told = batch.texts, responses, batch.columns or ({},) * len(batch), sequences.lengths.tolist(), batch.places
        found = torch.stack([reward.scores(*told) for reward in self.functions], dim=1).to(module.device)
        self._parts = found[:, : len(self.names)]
        return found @ torch.tensor([reward.weight for reward in self.functions], device=module.device)

    def parts(self, scores: Tensor) -> Tensor:
        """The parts [B, K] of the scores [B] that were just given, K names of `names`."""
        return self._parts if len(self._parts) == len(scores) else scores.new_zeros(len(scores), 0)

    def _members(self, module: Any, sequences: Sequences) -> Tensor:
        """Scores [B, K] of K reward models; each reads a response that was cut off as if it ended there."""
        ended = append_end(sequences.response_ids, sequences.response_mask, module.stop_ids.to(module.device))
        complete = Sequences(sequences.prompt_ids, sequences.prompt_mask, *ended)
        found = []
        for role in self.roles:
            with module.backbone.role(role):
                found.append(module.per_row(complete, [len(complete)], module.backbone.scores))
        return torch.stack(found, dim=1)

    def _aggregate(self, found: Tensor) -> Tensor:
        if self.aggregate == "worst":
            return found.amin(1)
        mean = found.mean(1) if found.shape[1] > 1 else found[:, 0]
        return mean - found.std(1, correction=0) if self.aggregate == "lower_bound" else mean


def _check(reward: Handover, folder: str, below: tuple[str, ...], module: Any) -> None:
    name = f"model.reward_model={folder}"
    if not reward.head:
        raise UserError(f"{name} was handed over by a {reward.role} run.")
    if reward.stack[: len(below)] != below or (not below and reward.stack[:1] == ("sft",)):
        raise UserError(
            f"the reward model lies on the adapters {list(reward.stack)} and the policy on {list(below)}; "
            "give model.sft the SFT run that the reward model started from."
        )
    if module.sft and reward.adapters.get("sft") != module.parents[module.sft].adapters.get("sft"):
        raise UserError(f"{name} was trained on another SFT adapter than model.sft={module.sft}.")
