"""Reward models that others made: sequence classifiers of transformers, frozen, separate models beside the base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lrlhf.config import DType
from lrlhf.errors import UserError
from lrlhf.model.pretrained import fingerprint_model, first_line

Turn = dict[str, str]
"""role and content."""


def is_classifier(source: str) -> bool:
    """Whether a setting names a sequence classifier: a folder with such a model's config.json, or a hub id."""
    folder = Path(source).expanduser()
    if folder.exists():
        config = folder / "config.json"
        return config.is_file() and "ForSequenceClassification" in config.read_text()
    return source.count("/") == 1 and not folder.parent.is_dir() and not source.startswith((".", "~", "/"))


class Classifier:
    """Scores conversations as its authors meant it: by its own tokenizer and chat template.

    Args:
        source: folder, or hub id.
        dtype: of its weights.

    Raises:
        UserError: it cannot be loaded, has more than one label, or no chat template.
    """

    def __init__(self, source: str, dtype: DType):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.source = source
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(source, dtype=getattr(torch, dtype))
        except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
            raise UserError(
                f"reward_model={source}: no sequence classifier could be loaded ({first_line(error)})."
            ) from error
        if self.model.config.num_labels != 1:
            raise UserError(f"reward_model={source} has {self.model.config.num_labels} labels; a reward model has one.")
        if self.tokenizer.chat_template is None:
            raise UserError(f"reward_model={source}: its tokenizer has no chat template to render a conversation by.")
        self.model.requires_grad_(False).eval()
        self.fingerprint = fingerprint_model(self.model)
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        rank_zero_info(
            f"Reward model {source}: a separate frozen model of {count / 1e6:,.1f} M parameters beside the base, "
            f"{size / 2**30:.2f} GiB more in {dtype}, whole on every device"
        )

    @torch.no_grad()
    def scores(self, conversations: Sequence[list[Turn]], device: torch.device, batch_size: int) -> Tensor:
        """One score a conversation, fp32 [B].

        Rows run padded on the right where a token of its own pads, else one by one.

        Args:
            conversations: turns, the last one the assistant's.
            device: to run on; the model moves there.
            batch_size: conversations of one pass.
        """
        model, scores = self.model.to(device), []
        pads = self.model.config.pad_token_id
        if pads is None or pads == self.tokenizer.eos_token_id or pads != self.tokenizer.pad_token_id:
            batch_size = 1
        for start in range(0, len(conversations), batch_size):
            piece = list(conversations[start : start + batch_size])
            batch: Any = self.tokenizer.apply_chat_template(
                piece, padding=batch_size > 1, return_dict=True, return_tensors="pt"
            )
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            scores.append(model(**inputs).logits[:, 0].float())
        return torch.cat(scores) if scores else torch.zeros(0, device=device)
