"""Supervised fine-tuning: the likelihood of demonstrations, on the response tokens only."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lrlhf.distributed import total
from lrlhf.errors import UserError
from lrlhf.functional import token_statistics
from lrlhf.modules.base import AlignmentModule
from lrlhf.types import Sequences


class SFT(AlignmentModule):
    """Fit the adapter `sft` to demonstrations: loss = -sum log p(token) / number of response tokens in the batch."""

    task = "sft"
    role = "sft"

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.sft:
            raise UserError("model.sft does not apply to SFT, which starts from model.base_model; set it to null.")
        self.val_loss = MeanMetric()

    def build_roles(self) -> None:
        """One role of one adapter."""
        self.backbone.add_role("sft", ("sft",), trainable=True, own_copy=False)

    def negative_log_likelihood(self, batch: Sequences) -> Tensor:
        """-log p of the response tokens, the end-of-sequence token included; a sum."""
        hidden = self.backbone.encode(batch)
        return -token_statistics(hidden, self.backbone.lm_head, batch.response_ids, batch.response_mask).logprobs.sum()

    def training_step(self, batch: Sequences, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        tokens = total(batch.response_mask.sum())
        with self.backbone.role("sft"), self.backbone.training_pass(dropout=True):
            pieces = (piece for _, piece in self.micro_batches(batch))
            metrics = self.descend(self.negative_log_likelihood(piece) / tokens for piece in pieces)
        self.log("loss", metrics["loss"], prog_bar=True, logger=False)
        self.end_iteration(metrics)

    @torch.no_grad()
    def validation_step(self, batch: Sequences, batch_idx: int) -> None:
        """Loss per token and perplexity on held-out demonstrations."""
        with self.backbone.role("sft"):
            for _, piece in self.micro_batches(batch):
                tokens = piece.response_mask.sum()
                self.val_loss.update(self.negative_log_likelihood(piece) / tokens.clamp(min=1), weight=tokens)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log under val/ (or test/)."""
        name, loss = "test" if self.trainer.testing else "val", self.val_loss.compute()
        self.log_dict({f"{name}/loss": loss, f"{name}/perplexity": loss.exp()}, prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        """Reset here: a metric that was reset in the inference mode of `validate` could not be updated in `fit`."""
        self.val_loss.reset()

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
