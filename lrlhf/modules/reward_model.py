"""Reward modelling: a scalar head on an adapter learns which of two responses people prefer."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from lrlhf.distributed import total, total_number
from lrlhf.errors import UserError
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

    task = "preference"
    role = "reward"

    def __init__(self, centering: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        if centering < 0:
            raise UserError(f"model.centering={centering} must not be negative.")
        self.centering = centering
        self.val_loss, self.val_accuracy, self.longer_accuracy = MeanMetric(), BinaryAccuracy(), MeanMetric()

    def build_roles(self) -> None:
        """[sft, reward] and a head; a head without a head start: small random weights."""
        below = self.load_sft()
        self.backbone.add_role("reward", (*below, "reward"), trainable=True, head="random", own_copy=False)

    def pair_scores(self, batch: Preferences) -> tuple[Tensor, Tensor]:
        """Scores [B] of the chosen and of the rejected responses."""
        return self.backbone.scores(batch.chosen), self.backbone.scores(batch.rejected)

    def pair_loss(self, batch: Preferences) -> Tensor:
        """Bradley-Terry with the rows' margins; a sum over pairs, blank ones left out."""
        losses = preference_loss(*self.pair_scores(batch), margin=batch.margin, centering=self.centering)
        return losses[batch.chosen.lengths > 0].sum()

    def training_step(self, batch: Preferences, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        with self.backbone.role("reward"), self.backbone.training_pass(dropout=True):
            pairs = total_number(len(batch))
            metrics = self.descend(self.pair_loss(piece) / pairs for _, piece in self.micro_batches(batch))
        self.log("loss", metrics["loss"], prog_bar=True, logger=False)
        self.end_iteration(metrics)

    @torch.no_grad()
    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs, beside the accuracy of preferring the longer response."""
        with self.backbone.role("reward"):
            for index, piece in self.micro_batches(batch):
                chosen, rejected = self.pair_scores(piece)
                if not len(index):
                    continue
                self.val_loss.update(preference_loss(chosen, rejected, margin=piece.margin))
                self.val_accuracy.update((chosen > rejected).int(), torch.ones_like(chosen, dtype=torch.int))
                longer = (piece.chosen.lengths - piece.rejected.lengths).sign()
                self.longer_accuracy.update(0.5 + 0.5 * longer.float())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log under val/ (or test/)."""
        name = "test" if self.trainer.testing else "val"
        metrics = {"loss": self.val_loss, "accuracy": self.val_accuracy, "longer_accuracy": self.longer_accuracy}
        self.log_dict({f"{name}/{key}": metric.compute() for key, metric in metrics.items()}, prog_bar=True)
        self.log(f"{name}/pairs", total(self.longer_accuracy.weight))

    def on_validation_epoch_start(self) -> None:
        """Reset here: a metric that was reset in the inference mode of `validate` could not be updated in `fit`."""
        for metric in (self.val_loss, self.val_accuracy, self.longer_accuracy):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    @torch.no_grad()
    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """The scores of each pair, with the texts that were scored."""
        with self.backbone.role("reward"):
            chosen, rejected = self.pair_scores(batch)
        texts = [self.decode(side.response_ids, side.response_mask) for side in (batch.chosen, batch.rejected)]
        names = ("chosen", "rejected", "chosen_score", "rejected_score")
        columns = (*texts, chosen.tolist(), rejected.tolist())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
