"""Reward modelling: a scalar head on an adapter learns which of two responses people prefer."""

from collections.abc import Iterator
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from lrlhf.config import check_ranges
from lrlhf.distributed import total, total_number
from lrlhf.functional import preference_loss
from lrlhf.modules.base import AlignmentModule
from lrlhf.types import Preferences


class RewardModel(AlignmentModule):
    """Fit the adapter `reward` and its head to preference pairs by Bradley-Terry.

    The score is read at the last response token, the end-of-sequence token.

    Args:
        centering: weight of (s_chosen + s_rejected)^2, which keeps scores around 0; 0 leaves their constant free.
        kwargs: see AlignmentModule.
    """

    task = predict_task = "preference"
    role = "reward"

    def __init__(self, centering: NonNegativeFloat = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.centering = centering
        check_ranges(self)
        self.val_loss, self.val_accuracy, self.longer_accuracy = MeanMetric(), BinaryAccuracy(), MeanMetric()

    def build_roles(self) -> None:
        """[sft, reward] and a head; a head without a head start: small random weights."""
        below = self.load_sft()
        self.backbone.add_role("reward", (*below, "reward"), trainable=True, head="random", own_copy=False)

    def pair_scores(self, batch: Preferences) -> Tensor:
        """Scores [B, 2] of the chosen and of the rejected responses."""
        return torch.stack([self.backbone.scores(batch.chosen), self.backbone.scores(batch.rejected)], dim=1)

    def pair_loss(self, batch: Preferences) -> Tensor:
        """Bradley-Terry with the rows' margins, [B]."""
        chosen, rejected = self.pair_scores(batch).unbind(1)
        return preference_loss(chosen, rejected, margin=batch.margin, centering=self.centering)

    def training_step(self, batch: Preferences, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        self.supervised_step(self.losses(batch))

    def losses(self, batch: Preferences) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch; their sum is the mean over pairs."""
        pairs = total_number(len(batch))
        yield from self.losses_of(batch, lambda rows: self.pair_loss(rows).sum() / pairs)

    @torch.no_grad()
    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs, beside the accuracy of preferring the longer response."""
        with self.backbone.role("reward"):
            self.note_validation(batch, self.per_row(batch, [len(batch), 2], self.pair_scores))

    def note_validation(self, batch: Preferences, scores: Tensor) -> None:
        """Add a validation batch to the means.

        Args:
            batch: of pairs.
            scores: [B, 2] of the chosen and of the rejected responses.
        """
        chosen, rejected = scores.unbind(1)
        if len(batch):
            self.val_loss.update(preference_loss(chosen, rejected, margin=batch.margin))
            self.val_accuracy.update((chosen > rejected).int(), torch.ones_like(chosen, dtype=torch.int))
            longer = (batch.chosen.lengths - batch.rejected.lengths).sign()
            self.longer_accuracy.update(0.5 + 0.5 * longer.float())

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the number of pairs."""
        metrics = {"loss": self.val_loss, "accuracy": self.val_accuracy, "longer_accuracy": self.longer_accuracy}
        self.log_dict({f"{self.stage}/{key}": metric.compute() for key, metric in metrics.items()}, prog_bar=True)
        self.log(f"{self.stage}/pairs", total(self.longer_accuracy.weight))

    @torch.no_grad()
    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """The scores of each pair, with the texts that were scored."""
        with self.backbone.role("reward"):
            return self.described(batch, self.pair_scores(batch))

    def described(self, batch: Preferences, scores: Tensor) -> list[dict[str, Any]]:
        """A row a pair.

        Args:
            batch: of pairs.
            scores: [B, 2] of the chosen and of the rejected responses.
        """
        texts = [self.decode(side.response_ids, side.response_mask) for side in (batch.chosen, batch.rejected)]
        names = ("chosen", "rejected", "chosen_score", "rejected_score")
        columns = (*texts, *scores.T.tolist())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
