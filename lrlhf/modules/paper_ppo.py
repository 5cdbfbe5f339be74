"""PPO with the defects of the paper's code, each by its name and none by default: a replica to compare with.

The code of arXiv 2309.09055 (alpaca_farm_lora) does not train as its text says. `PaperPPO` without defects is
`PPOPolicy`, bit for bit; each defect puts back one thing that the code does. docs/paper.md tells which of them other
settings give, and which have no effect on what is learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from lrlhf.config import PPO
from lrlhf.distributed import clip_gradients, world_size
from lrlhf.errors import UserError
from lrlhf.functional import value_loss
from lrlhf.metrics import Means
from lrlhf.modules.ppo_policy import PPOPolicy
from lrlhf.types import CriticExperience, CriticRollout, Prompts, Sequences

Defect = Literal[
    "repeated_micro_batches", "padded_statistics", "dropout_in_updates", "bfloat16_adapters", "retokenized_scores"
]


class _FullWidth:
    """Rows with all their columns, padding too."""

    def rows(self, index: Tensor) -> Self:
        """The rows of `index` [N] int64, uncut."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})  # type: ignore[type-var,arg-type]


@dataclass(frozen=True, slots=True)
class PaddedSequences(_FullWidth, Sequences):
    """Sequences whose padding counts."""


@dataclass(frozen=True, slots=True)
class PaddedExperience(_FullWidth, CriticExperience):
    """Experience whose padding counts."""


class PaperPPO(PPOPolicy):
    """`PPOPolicy` with defects of the paper's code.

    repeated_micro_batches: an optimizer step sees ONE micro-batch, `ppo.minibatch_size / micro_batch_size` times, its
    gradient summed, never divided, and clipped after every pass. padded_statistics: responses are padded to
    `sampling.max_new_tokens`, and whitening, GAE and the means of the losses run over the padding. dropout_in_updates:
    new log-probs and values are made with the adapters' dropout, old ones without. bfloat16_adapters: adapters and
    their optimizer's moments are rounded to bfloat16 after every step. retokenized_scores: the reward model reads the
    response as decoded text that was tokenised again.

    Args:
        defects: by name.
        ppo: as in PPOPolicy.
        kwargs: see PPOPolicy.

    Raises:
        UserError: a defect that could have no effect under the other settings, or that they contradict.
    """

    def __init__(self, defects: Sequence[Defect] = (), ppo: PPO = PPO(), **kwargs: Any):
        super().__init__(ppo=ppo, **kwargs)
        self.defects = frozenset(defects)
        self.repeats = 1
        if self.defects & {"dropout_in_updates", "bfloat16_adapters"} and self.lora is None:
            raise UserError("model.defects: dropout_in_updates and bfloat16_adapters are of adapters; set model.lora.")
        if "dropout_in_updates" in self.defects and not (self.lora and self.lora.dropout):
            raise UserError("model.defects: dropout_in_updates needs a model.lora.dropout above 0; the paper's is 0.1.")
        if "padded_statistics" in self.defects and ppo.critic == "head":
            raise UserError("model.defects: padded_statistics needs ppo.critic: adapter, as the paper has it.")
        if "retokenized_scores" in self.defects and not self.source.folders:
            raise UserError(
                "model.defects: retokenized_scores is of a reward model of lrlhf; others read texts anyway."
            )
        if "repeated_micro_batches" in self.defects:
            self.repeats, left = divmod(ppo.minibatch_size, self.micro_batch_size)
            if left or not self.repeats:
                raise UserError(
                    f"model.defects: repeated_micro_batches needs a model.micro_batch_size={self.micro_batch_size} "
                    f"that divides ppo.minibatch_size={ppo.minibatch_size}."
                )
            self.updates = self.ppo = replace(ppo, minibatch_size=self.micro_batch_size)
        self.dropout_in_updates = "dropout_in_updates" in self.defects
        self.pads = "padded_statistics" in self.defects

    def setup(self, stage: str) -> None:
        """Refuse more than one process, which the paper's code has not."""
        super().setup(stage)
        if world_size() > 1 and self.defects:
            raise UserError("model.defects are of code that runs in one process; set trainer.devices: 1.")

    def build_roles(self) -> None:
        """With adapters that bfloat16 can hold, if that is a defect."""
        super().build_roles()
        self._round_adapters({})

    # Scores

    def score(self, sequences: Sequences, batch: Prompts) -> Tensor:
        """Scores [B] fp32, of the decoded text where that is a defect.

        Our reward models read their score at an end token, which is appended; the paper's at the last word.
        """
        if "retokenized_scores" not in self.defects:
            return super().score(sequences, batch)
        responses = self.decode(sequences.response_ids, sequences.response_mask)
        begins = bool(getattr(self._template, "adds_special_tokens", True))
        read = [
            torch.tensor(self.tokenizer(text + said, add_special_tokens=begins)["input_ids"], device=self.device)
            for text, said in zip(batch.texts, responses, strict=True)
        ]
        counts = [torch.ones_like(row, dtype=torch.bool) for row in read]
        ids, mask = (pad_sequence(x, batch_first=True, padding_side="left") for x in (read, counts))
        ended = torch.full((len(read), 1), int(self.stop_ids[0]), device=self.device)
        return super().score(Sequences(ids, mask, ended, torch.ones_like(ended, dtype=torch.bool)), batch)

    # Padding

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, batch: Prompts) -> CriticRollout:
        """As in PPOPolicy, of responses that are as wide as they may be where padding counts."""
        if self.pads:
            more = self.sampling.max_new_tokens - sequences.response_ids.shape[1]
            ids, mask = (F.pad(x, (0, more)) for x in (sequences.response_ids, sequences.response_mask))
            sequences = PaddedSequences(sequences.prompt_ids, sequences.prompt_mask, ids, mask)
        return super().evaluate(sequences, batch)

    def _values(self, piece: Sequences) -> Tensor:
        """[B, R], off the mask too where padding counts."""
        if not self.pads:
            return super()._values(piece)
        return self.backbone.values(self.backbone.encode_padded(piece, self.tokenizer.pad_token_id or 0))

    def estimate_advantages(self, rollout: CriticRollout, rewards: Tensor) -> CriticExperience:
        """As in PPOPolicy; where padding counts, as if it were response."""
        if not self.pads:
            return super().estimate_advantages(rollout, rewards)
        whole = replace(rollout, response_mask=torch.ones_like(rollout.response_mask))
        found = super().estimate_advantages(whole, rewards)
        return PaddedExperience.of(found, response_mask=rollout.response_mask)

    def count(self, minibatch: Sequences) -> Tensor | float:
        """Response tokens; where padding counts, all positions."""
        return float(minibatch.response_mask.numel()) if self.pads else super().count(minibatch)

    def value_objective(self, piece: CriticExperience, *means: Means) -> Tensor:
        """[B, R], off the mask too where padding counts."""
        if not self.pads:
            return super().value_objective(piece, *means)
        loss = value_loss(self._values(piece), piece.values, piece.returns, clip_range=self.ppo.value_clip_range)
        for mean in means:
            mean.add("value_loss", loss, torch.ones_like(piece.response_mask))
        return loss

    # Steps

    def losses(self, minibatch: CriticExperience, *means: Means) -> Iterator[Tensor]:
        """As in PPOPolicy, as often as micro-batches are repeated; gradients are clipped before each repetition."""
        for repetition in range(self.repeats):
            if repetition:
                clip_gradients(self.backbone.trainable(), self.max_grad_norm)
            yield from super().losses(minibatch, *means)

    def optimization_step(self, losses: Any) -> dict[str, float]:
        """As in AlignmentModule, then the rounding."""
        metrics = super().optimization_step(losses)
        self._round_adapters(self.optimizers().state)  # type: ignore[union-attr]
        return metrics

    @torch.no_grad()
    def _round_adapters(self, states: Mapping[Any, dict[str, Any]]) -> None:
        """Round adapters, and what an optimizer keeps of them, to what bfloat16 can hold, if that is a defect.

        Args:
            states: of the optimizer, by parameter.
        """
        if "bfloat16_adapters" not in self.defects:
            return
        heads = {id(p) for p in self.backbone.heads.parameters()}
        for parameter in self.backbone.trainable():
            if id(parameter) in heads:
                continue
            for tensor in (parameter, *states.get(parameter, {}).values()):
                if tensor.shape == parameter.shape:
                    tensor.copy_(tensor.bfloat16())
