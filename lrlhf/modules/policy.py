"""What every method that moves a policy away from a reference shares: the two roles, and passes that compare them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrlhf.functional import exact_js, exact_kl, exact_total_variation, token_statistics, vocabulary_divergence
from lrlhf.functional.divergence import Divergence
from lrlhf.functional.logprobs import TokenStatistics
from lrlhf.modules.base import AlignmentModule
from lrlhf.modules.self_check import (
    check_base,
    check_policy_is_reference,
    check_trainable,
    check_update,
    rounding,
    unequal_rows,
)
from lrlhf.types import Sequences


class PolicyModule(AlignmentModule):
    """The roles `reference` and `policy`, and log-probs and divergences under them.

    Args:
        kwargs: see AlignmentModule.
    """

    role = "policy"
    trained_roles: ClassVar[tuple[str, ...]] = ("policy",)
    """The roles whose parameters train."""

    def build_roles(self) -> None:
        """The reference, and the policy one adapter above it."""
        below = self.load_sft()
        self.backbone.add_role("reference", below)
        self.backbone.add_role("policy", (*below, "policy"), trainable=True)

    def self_check(self, batch: Any) -> list[str]:
        """Everything is what it claims to be: base, roles, passes, update, and at step 0 the policy."""
        found = [check_trainable(self.backbone, self.trained_roles), check_base(self.backbone)]
        found += super().self_check(batch)
        text, allowed = unequal_rows(getattr(batch, "chosen", batch)), rounding(self.dtype_name, self.quantize)
        found.append(check_update(self.backbone, lambda rows: self.statistics(rows).logprobs, text, allowed))
        if self.iteration == 0:
            log_ratio = self.logprobs(text, "policy") - self.logprobs(text, "reference")
            exact = (exact_kl, exact_js, exact_total_variation)
            divergences = zip(exact, self.divergences(text, exact), strict=True)
            found.append(check_policy_is_reference(log_ratio, {f.__name__: d for f, d in divergences}))
        return found

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
            return torch.stack(
                [vocabulary_divergence(*inputs, f, temperature=self.temperature) for f in functions], dim=-1
            )

        shape = (*sequences.response_mask.shape, len(functions))
        return list(self.per_row(sequences, shape, compute).unbind(-1))

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained and compared: the one that is sampled from."""
        return self.sampling.temperature

    @property
    def entropy_trains(self) -> bool:
        """Whether the entropy is a term of the loss."""
        return False

    def statistics(self, piece: Sequences) -> TokenStatistics:
        """Log-probabilities and entropies [B, R] of the response tokens in the current role."""
        return token_statistics(
            self.backbone.encode(piece),
            self.backbone.lm_head,
            piece.response_ids,
            piece.response_mask,
            temperature=self.temperature,
            entropy_trains=self.entropy_trains,
        )
