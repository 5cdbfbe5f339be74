"""Direct preference optimization and its f-divergences: a policy from preference pairs, without rewards or rollouts.

What it is: the policy that maximises reward - beta D_f(policy || reference) has reward = beta f'(u) + constant, with
u = p(response) / q(response) under policy and reference. Put into Bradley-Terry's model of preferences, pairs alone fit
it: h = f'(u_chosen) - f'(u_rejected), and a loss of beta h (`lrlhf.functional.losses`). With the KL divergence
f'(u) = log u and this is DPO (Rafailov et al., arXiv 2305.18290); with others f-DPO (Wang et al., arXiv 2309.16240).

What it is not: a policy that is trained on its own responses. The pairs are somebody else's, so what it learns of
responses that neither side shows is left to chance: look at the divergence, and at what it says.

Where it departs from the papers:
1. The reference is a role on the same base, and its log-probs are computed once, before the first step.
2. Dropout is off, so that at step 0 every h is 0, up to rounding.
3. beta times our Jensen-Shannon is half of beta times f-DPO's, which leaves out the factor 1/2 of each KL.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import MeanMetric
from tqdm import tqdm

from lrlhf.config import check_ranges
from lrlhf.distributed import gather_objects, rank, total, total_number, world_size
from lrlhf.errors import UserError
from lrlhf.files import whole
from lrlhf.functional import exact_kl, kl, sigmoid_loss
from lrlhf.functional.divergence import Divergence
from lrlhf.metrics import Means
from lrlhf.model.sharding import gathered
from lrlhf.modules.policy import PolicyModule
from lrlhf.types import Preferences, ReferencePreferences

FILE = "reference_logprobs.safetensors"
ROWS = 64
"""Pairs that are looked at together while the reference's log-probs are computed."""

LOGGED = (
    "pair_loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_log_ratio",
    "rejected_log_ratio",
)
"""Means over the pairs of a batch."""

PairLoss = Callable[..., Tensor]
"""Maps differences [B] of implicit rewards, and beta, to losses [B]."""


class DPO(PolicyModule):
    """Train the adapter `policy` on preference pairs.

    Args:
        beta: how dear the divergence is; larger stays closer to the reference. 0.1 is usual.
        divergence: whose f' makes the implicit reward: lrlhf.functional.kl (DPO), js, forward_kl, alpha_divergence, or
            your own, marked by @f_divergence.
        loss: of pairs, by import path: lrlhf.functional.sigmoid_loss, ipo_loss or hinge_loss.
        label_smoothing: share of labels that are taken to be wrong; of sigmoid_loss alone.
        length_normalized: divide each implicit reward by the tokens of its response, so that long answers weigh no
            more; beta is then per token, and 10 times larger values are usual.
        nll_coefficient: weight of the chosen responses' negative log-likelihood per token (as in RPO, arXiv
            2404.19733): keeps their probability from falling along with the rejected ones'. 0 leaves it out.
        precompute_reference: compute the reference's log-probs of all training pairs before the first step, once for
            all epochs and restarts (reference_logprobs.safetensors in the run folder); else for each batch anew, which
            a run that sees few of its rows, once, may prefer.
        kwargs: see AlignmentModule.
    """

    task = "preference"

    def __init__(
        self,
        beta: PositiveFloat = 0.1,
        divergence: Divergence = kl,
        loss: PairLoss = sigmoid_loss,
        label_smoothing: NonNegativeFloat = 0.0,
        length_normalized: bool = False,
        nll_coefficient: NonNegativeFloat = 0.0,
        precompute_reference: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.beta, self.divergence, self.pair_loss_function = beta, divergence, loss
        self.label_smoothing, self.length_normalized = label_smoothing, length_normalized
        self.nll_coefficient, self.precompute_reference = nll_coefficient, precompute_reference
        check_ranges(self)
        if not hasattr(divergence, "f_derivative"):
            name = getattr(divergence, "__name__", type(divergence).__name__)
            raise UserError(
                f"model.divergence: {name} gives no implicit reward; take kl, js, forward_kl or alpha_divergence of "
                "lrlhf.functional, or mark yours by @f_divergence."
            )
        if not label_smoothing < 0.5:
            raise UserError(
                f"model.label_smoothing={label_smoothing} must be below 0.5: from there labels say nothing."
            )
        if label_smoothing and loss is not sigmoid_loss:
            raise UserError("model.label_smoothing is a setting of lrlhf.functional.sigmoid_loss; set it to 0.")
        self.reference: Tensor | None = None
        self.val_loss, self.val_accuracy, self.val_margin = MeanMetric(), MeanMetric(), MeanMetric()
        self.longer_accuracy, self.val_divergence = MeanMetric(), MeanMetric()

    # Reference

    def on_train_start(self) -> None:
        """Compute the reference's log-probs of all pairs, or take them up again."""
        super().on_train_start()
        if self.precompute_reference:
            with gathered(self.backbone):
                self.reference = self._all_reference_sums()

    def _all_reference_sums(self) -> Tensor:
        """[N, 2] fp32 of the N training pairs, by their numbers."""
        rows, collate = self.numbered_rows("precompute_reference")
        pieces = [range(start, min(start + ROWS, len(rows))) for start in range(0, len(rows), ROWS)]
        key = hashlib.sha256(json.dumps([self.identity(), self.temperature], default=str).encode())
        for piece in pieces:
            batch = collate([rows[i] for i in piece])
            for side in (batch.chosen, batch.rejected):
                key.update(side.ids.numpy().tobytes() + side.mask.numpy().tobytes())
        path = Path(self.trainer.default_root_dir) / FILE
        kept = _read(path, key.hexdigest(), len(rows))
        if all(gather_objects(kept is not None)) and kept is not None:  # all look before one begins to write
            rank_zero_info(f"The reference's log-probs of {len(rows)} pairs are taken from {path}")
            return kept.to(self.device)
        sums = torch.zeros(len(rows), 2, device=self.device)
        for piece in tqdm(pieces, desc="reference log-probs", disable=rank() > 0):
            mine = list(piece)[rank() :: world_size()]
            batch = collate([rows[i] for i in mine]).to(self.device)
            sums[mine] = self.reference_sums(batch)
        sums = total(sums)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            with whole(path) as scratch:
                save_file({"sums": sums.cpu()}, scratch, {"key": key.hexdigest()})
        return sums

    @torch.no_grad()
    def reference_sums(self, batch: Preferences) -> Tensor:
        """Log-probs [B, 2] of chosen and rejected responses under the reference, each summed over its tokens."""
        with self.backbone.role("reference"):
            return self.per_row(batch, [len(batch), 2], lambda pairs: torch.stack(self._logprobs(pairs), 1))

    def _logprobs(self, pairs: Preferences) -> list[Tensor]:
        """Sums [B] of the chosen and of the rejected responses, in the current role."""
        return [self.statistics(side).logprobs.sum(1) for side in (pairs.chosen, pairs.rejected)]

    def with_reference(self, batch: Preferences) -> ReferencePreferences:
        """The pairs with the reference's log-probs: those of the run's rows if they are there, else new ones.

        Args:
            batch: of training pairs if `self.reference` is there.
        """
        known = self.reference is not None and self.trainer.training
        sums = self.reference[batch.numbers] if known else self.reference_sums(batch)  # type: ignore[index]
        return ReferencePreferences(batch.chosen, batch.rejected, batch.margin, batch.numbers, sums)

    # Loss

    def implicit_rewards(self, pairs: ReferencePreferences) -> tuple[Tensor, Tensor]:
        """f'(u) [B, 2] fp64 of chosen and rejected, before beta; and their log-probs [B, 2] under the policy.

        Args:
            pairs: B of them.
        """
        logprobs = torch.stack(self._logprobs(pairs), 1)
        rewards = self.divergence.f_derivative((logprobs - pairs.ref_logprobs).double())  # type: ignore[attr-defined]
        if self.length_normalized:
            rewards = rewards / torch.stack([pairs.chosen.lengths, pairs.rejected.lengths], 1).clamp(min=1)
        return rewards, logprobs

    def pair_losses(self, difference: Tensor) -> Tensor:
        """Losses [B] of differences [B] of implicit rewards."""
        more = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return self.pair_loss_function(difference, beta=self.beta, **more)

    def objective(self, pairs: ReferencePreferences, count: float, tokens: Tensor, *means: Means) -> Tensor:
        """The loss of a micro-batch, a scalar.

        Args:
            pairs: of the micro-batch.
            count: pairs of the batch over all processes.
            tokens: of its chosen responses.
            means: where to note what the log tells.
        """
        rewards, logprobs = self.implicit_rewards(pairs)
        difference = rewards[:, 0] - rewards[:, 1]
        losses = self.pair_losses(difference)
        margin, log_ratios = self.beta * difference.detach(), logprobs - pairs.ref_logprobs
        columns = (losses, 0.5 + 0.5 * margin.sign(), margin, *(self.beta * rewards).T, *log_ratios.T)
        for mean in means:
            for name, column in zip(LOGGED, columns, strict=True):
                mean.add(name, column, pairs.chosen.lengths > 0)
        likelihood = self.nll_coefficient * logprobs[:, 0].sum() / tokens
        return losses.sum().float() / count - likelihood

    def training_step(self, batch: Preferences, batch_idx: int) -> None:
        """One optimizer step on one batch."""
        with gathered(self.backbone):
            pairs = self.with_reference(batch)
        means = Means(*LOGGED)
        self.supervised_step(self.losses(pairs, means), means, dropout=False)

    def losses(self, pairs: ReferencePreferences, *means: Means) -> Iterator[Tensor]:
        """The losses of one optimizer step, micro-batch by micro-batch; their sum is the mean over pairs."""
        count, tokens = total_number(len(pairs)), total(pairs.chosen.response_mask.sum())
        yield from self.losses_of(pairs, lambda piece: self.objective(piece, count, tokens, *means))

    # Evaluate

    @torch.no_grad()
    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Loss, accuracy and margin on held-out pairs, and the exact KL of policy and reference on their tokens."""
        pairs = self.with_reference(batch)
        with self.backbone.role("policy"):
            rewards = self.per_row(pairs, [len(pairs), 2], lambda piece: self.implicit_rewards(piece)[0].float())
        difference = rewards[:, 0] - rewards[:, 1]
        divergences = [(side, self.divergences(side, [exact_kl])[0]) for side in (batch.chosen, batch.rejected)]
        if not len(batch):
            return
        self.val_loss.update(self.pair_losses(difference))
        self.val_accuracy.update(0.5 + 0.5 * difference.sign())
        self.val_margin.update(self.beta * difference)
        longer = (batch.chosen.lengths - batch.rejected.lengths).sign()
        self.longer_accuracy.update(0.5 + 0.5 * longer.float())
        for side, divergence in divergences:
            self.val_divergence.update(divergence[side.response_mask])

    def on_validation_epoch_end(self) -> None:
        """Log the means, and the number of pairs."""
        metrics = {"loss": self.val_loss, "accuracy": self.val_accuracy, "margin": self.val_margin}
        metrics["longer_accuracy"] = self.longer_accuracy
        self.log_dict({f"{self.stage}/{key}": metric.compute() for key, metric in metrics.items()}, prog_bar=True)
        self.log(f"{self.stage}/divergence/exact_kl", self.val_divergence.compute())
        self.log(f"{self.stage}/pairs", total(self.longer_accuracy.weight))

    @property
    def temperature(self) -> float:
        """1: pairs are no samples of the policy; its own distribution is what is trained."""
        return 1.0


def _read(path: Path, key: str, rows: int) -> Tensor | None:
    """What an earlier start kept, if it is of these rows and this reference."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            sums = file.get_tensor("sums")
            return sums if (file.metadata() or {}).get("key") == key and len(sums) == rows else None
    except (SafetensorError, OSError):
        return None
