"""A reward ensemble: k reward models on one base, k adapters and heads instead of k models.

Where its members disagree, nobody has told them what is better: that disagreement grows before a policy is seen to be
over-optimised (Coste et al., arXiv 2310.02743). Methods with rollouts log it, and `model.aggregate` can pay for it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lrlhf.config import TwoOrMore, check_ranges
from lrlhf.distributed import total_number
from lrlhf.functional.randomness import generator
from lrlhf.modules.reward_model import RewardModel
from lrlhf.run.handover import Handover
from lrlhf.types import Preferences


class RewardEnsemble(RewardModel):
    """Fit k adapters `reward_1`, `reward_2`, ... and their heads, each from a start of its own.

    All see the same batches and step together; a global gradient norm is clipped for all of them at once.

    Args:
        members: k; 3 to 5 is usual.
        bootstrap: give each member rows of its own: each row counts a Poisson(1) number of times, drawn by (seed,
            member), as if N rows had been drawn out of N with replacement.
        kwargs: see RewardModel.
    """

    role = "reward_1"

    def __init__(self, members: TwoOrMore = 3, bootstrap: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.members, self.bootstrap = members, bootstrap
        check_ranges(self)
        self.disagreement = MeanMetric()
        self._draws: dict[str, Tensor] = {}

    @property
    def roles(self) -> list[str]:
        """Of the members."""
        return [f"reward_{number}" for number in range(1, int(self.members) + 1)]

    def build_roles(self) -> None:
        """[sft, reward_i] and a head each."""
        below = self.load_sft()
        for role in self.roles:
            # without LoRA each member is a copy of the base
            self.backbone.add_role(role, (*below, role), trainable=True, head="random")

    def on_train_start(self) -> None:
        """Draw how often each pair counts for each member."""
        super().on_train_start()
        if self.bootstrap:
            ones = torch.ones(len(self.numbered_rows("bootstrap")[0]))
            self._draws = {role: torch.poisson(ones, generator(self.seed, "bootstrap", role)) for role in self.roles}

    def counts(self, role: str, numbers: Tensor) -> Tensor:
        """How often each pair counts for a member: fp32, shape of `numbers`.

        Args:
            role: of the member.
            numbers: [B] int64, of the pairs among the training rows.
        """
        if not self.bootstrap:
            return torch.ones_like(numbers, dtype=torch.float32)
        return self._draws[role].to(numbers.device)[numbers]

    def losses(self, batch: Preferences) -> Iterator[Tensor]:
        """The losses of one optimizer step of all members, member by member."""
        pairs = total_number(len(batch))

        def weighted(rows: Preferences, role: str) -> Tensor:
            return (self.pair_loss(rows) * self.counts(role, rows.numbers)).sum() / pairs

        for role in self.roles:
            with self.backbone.role(role):
                yield from self.losses_of(batch, partial(weighted, role=role))

    @torch.no_grad()
    def member_scores(self, batch: Preferences) -> Tensor:
        """Scores [B, 2, k] of the chosen and the rejected responses by every member."""
        found = []
        for role in self.roles:
            with self.backbone.role(role):
                found.append(self.per_row(batch, [len(batch), 2], self.pair_scores))
        return torch.stack(found, dim=-1)

    @torch.no_grad()
    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Loss and accuracy of the members' mean score, and their disagreement."""
        scores = self.member_scores(batch)
        self.note_validation(batch, scores.mean(-1))
        if len(batch):
            self.disagreement.update(scores.std(-1, correction=0))

    def on_validation_epoch_end(self) -> None:
        """With the standard deviation of the members' scores, mean over responses."""
        super().on_validation_epoch_end()
        self.log(f"{self.stage}/disagreement", self.disagreement.compute())

    @torch.no_grad()
    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """The mean score of each response and the members' disagreement, with the texts that were scored."""
        scores = self.member_scores(batch)
        rows = self.described(batch, scores.mean(-1))
        deviations = scores.std(-1, correction=0).tolist()
        names = ("chosen_disagreement", "rejected_disagreement")
        return [row | dict(zip(names, two, strict=True)) for row, two in zip(rows, deviations, strict=True)]

    def write_handover(self, folder: Path, **about: Any) -> None:
        """Every member as a reward model of its own.

        Args:
            folder: to write.
            about: base, dtype and template, for the manifests.
        """
        Handover.write_ensemble(folder, self.backbone, self.roles, self.tokenizer, **about)
