"""Supervised fine-tuning: the likelihood of demonstrations, on the response tokens only."""

from collections.abc import Iterator
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
        """-log p [B, R] of the response tokens, the end-of-sequence token included; 0 off the mask."""
        hidden = self.backbone.encode(batch)
        return -token_statistics(hidden, self.backbone.lm_head, batch.response_ids, batch.response_mask).logprobs

    def training_step(self, batch: Sequences, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        self.supervised_step(self.losses(batch))

    def losses(self, batch: Sequences) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch; their sum is the mean over tokens."""
        tokens = total(batch.response_mask.sum())
        yield from self.losses_of(batch, lambda rows: self.negative_log_likelihood(rows).sum() / tokens)

    @torch.no_grad()
    def validation_step(self, batch: Sequences, batch_idx: int) -> None:
        """Loss per token on held-out demonstrations."""
        with self.backbone.role("sft"):
            losses = self.per_row(batch, batch.response_mask.shape, self.negative_log_likelihood)
        self.val_loss.update(losses.sum(1) / batch.lengths.clamp(min=1), weight=batch.lengths)

    def on_validation_epoch_end(self) -> None:
        """Log the loss, and perplexity."""
        loss = self.val_loss.compute()
        self.log_dict({f"{self.stage}/loss": loss, f"{self.stage}/perplexity": loss.exp()}, prog_bar=True)
