"""What one stage gives the next: adapters as plain peft folders, a head as safetensors, and a manifest that is checked.

handover/  manifest.json  sft/  reward/  head.safetensors        (a reward model)
           manifest.json  sft/  policy/  adapter/                (a policy; adapter/ is its stack as ONE peft adapter)
           manifest.json  members/1/  members/2/ ...             (an ensemble; each is a reward model's folder)
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lrlhf.distributed import rank
from lrlhf.errors import UserError
from lrlhf.model.adapters import CONFIG, concatenate, place
from lrlhf.model.backbone import Backbone
from lrlhf.model.pretrained import fingerprint_tokenizer
from lrlhf.run.folder import written_whole
from lrlhf.types import Sequences

PROBE = "A friend asked how to keep a small garden through a dry summer."
"""Scored when a reward model is handed over, and again before PPO trusts it."""


@dataclass(frozen=True)
class Handover:
    """The manifest of a hand-over folder. Fingerprints name what a role was trained on and works with."""

    folder: Path
    role: str
    stack: tuple[str, ...]
    head: bool
    base_model: str
    base: str
    tokenizer: str
    template: str | None
    adapters: dict[str, str] = field(default_factory=dict)
    probe_score: float | None = None
    dtype: str = "float32"

    @classmethod
    def read(cls, folder: str | Path) -> "Handover":
        """The manifest in `folder`.

        Raises:
            UserError: no folder, no manifest, or a damaged one.
        """
        path = Path(folder).expanduser() / "manifest.json"
        if not path.is_file() and (path.parent / CONFIG).is_file():
            return cls._of_others(path.parent)
        if not path.is_file():
            raise UserError(f"{folder} is no hand-over folder (no manifest.json in it); run the stage before first.")
        try:
            values = json.loads(path.read_text())
            if values.get("role") == "ensemble":
                raise UserError(f"{folder} is an ensemble; name one of its reward models, such as {folder}/members/1.")
            handover = cls(folder=path.parent, **{**values, "stack": tuple(values["stack"])})
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); run its stage again.") from None
        for adapter, digest in handover.adapters.items():
            if _digest(place(handover.folder, adapter)) != digest:
                raise UserError(f"{path.parent}: the adapter {adapter} is not the one that was handed over.")
        return handover

    @staticmethod
    def members(folder: str | Path) -> list[str]:
        """The hand-over folders of an ensemble's reward models; of any other the folder itself."""
        found = (Path(folder).expanduser() / "members").glob("*/manifest.json")
        return sorted((str(path.parent) for path in found), key=lambda path: int(Path(path).name)) or [str(folder)]

    @classmethod
    def write_ensemble(
        cls, folder: Path, backbone: Backbone, roles: Sequence[str], tokenizer: Any, **about: Any
    ) -> None:
        """Save the reward models of an ensemble, all or none. Collective, as `write`.

        Args:
            folder: to write; one that is there is replaced.
            backbone: with the roles.
            roles: of the members, in their order.
            tokenizer: of the base.
            about: see `write`.
        """
        together = [_together(backbone, role, tokenizer) for role in roles]
        if rank():
            return
        with written_whole(folder) as scratch:
            for number, (role, parts) in enumerate(zip(roles, together, strict=True), start=1):
                member = scratch / "members" / str(number)
                member.mkdir(parents=True)
                cls._fill(member, backbone, role, tokenizer, *parts, **about)
            manifest = {"role": "ensemble", "members": len(roles)}
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def _of_others(cls, folder: Path) -> "Handover":
        """A plain peft adapter without a manifest, as an SFT adapter; which base and tokenizer it needs is unknown.

        Raises:
            UserError: it is no LoRA adapter, or changes more than linear layers.
        """
        try:
            config = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise UserError(f"{folder / CONFIG} is damaged ({error}).") from None
        more = [name for name in ("modules_to_save", "trainable_token_indices") if config.get(name)]
        if config.get("peft_type") != "LORA" or more:
            what = f"also changes {', '.join(more)}" if more else f"is of type {config.get('peft_type')}"
            raise UserError(f"{folder}: this adapter {what}; a LoRA adapter of linear layers can be used here.")
        base = str(config.get("base_model_name_or_path"))
        rank_zero_info(f"{folder} says that it was trained on {base}; whether that is this base cannot be checked")
        return cls(folder, "sft", ("sft",), False, base, "", "", None, {"sft": _digest(folder)})

    @classmethod
    def write(cls, folder: Path, backbone: Backbone, role: str, tokenizer: Any, **about: Any) -> None:
        """Save a role that was trained; written beside and renamed, so that a kill leaves no half a folder.

        Collective: every process calls it, and the first writes.

        Args:
            folder: to write; one that is there is replaced.
            backbone: with the role.
            role: to save.
            tokenizer: of the base.
            about: base_model, by which the base was loaded; its dtype; template, the fingerprint of the prompt
                template, or None.
        """
        together = _together(backbone, role, tokenizer)
        if rank() == 0:
            with written_whole(folder) as scratch:
                cls._fill(scratch, backbone, role, tokenizer, *together, **about)

    @classmethod
    def _fill(
        cls,
        folder: Path,
        backbone: Backbone,
        role: str,
        tokenizer: Any,
        probe_score: float | None,
        weights: dict[str, torch.Tensor] | None,
        **about: Any,
    ) -> None:
        backbone.save_role(role, folder, weights)
        if (folder / "model").is_dir():
            tokenizer.save_pretrained(folder / "model")
        stack = backbone.stacks[role]
        if role == "policy" and stack:
            _write_as_one(stack, folder)
        (folder / "README.md").unlink(missing_ok=True)
        handover = cls(
            folder=folder,
            role=role,
            stack=stack,
            head=role in backbone.heads,
            base=backbone.fingerprint,
            tokenizer=fingerprint_tokenizer(tokenizer),
            adapters={adapter: _digest(folder / adapter) for adapter in stack},
            probe_score=probe_score,
            **about,
        )
        handover._write_manifest(folder)

    def write_plain(self, folder: Path) -> None:
        """A manifest beside ONE plain peft adapter of this role, by which it can be used as model.sft, and checked.

        Args:
            folder: that holds the adapter.
        """
        plain = replace(self, folder=folder, role="sft", stack=("sft",), adapters={"sft": _digest(folder)})
        plain._write_manifest(folder)

    def _write_manifest(self, folder: Path) -> None:
        values = {k: v for k, v in asdict(self).items() if k != "folder"}
        (folder / "manifest.json").write_text(json.dumps(values, indent=2) + "\n")

    def load(self, backbone: Backbone, role: str) -> None:
        """Define `role` on a backbone as the role that was handed over.

        Args:
            backbone: of the same base.
            role: the name it gets there.
        """
        backbone.load_role(role, self.stack, self.folder, head=self.head)

    def check(self, backbone: Backbone, tokenizer: str) -> None:
        """Refuse another base or tokenizer than the role was trained on, naming what differs.

        Args:
            backbone: that the role is to be loaded on.
            tokenizer: fingerprint of its tokenizer.
        """
        for what, ours, theirs in (
            ("base model", backbone.fingerprint, self.base),
            ("tokenizer", tokenizer, self.tokenizer),
        ):
            if theirs and ours != theirs and (self.stack or what == "tokenizer"):
                raise UserError(
                    f"{self.folder} was trained with another {what} (fingerprint {theirs}, here {ours}); "
                    f"use base_model: {self.base_model}, or train the stage again."
                )

    def check_template(self, template: str | None) -> None:
        """Refuse another prompt template than the role was trained on."""
        if template is not None and self.template is not None and template != self.template:
            raise UserError(
                f"{self.folder} was trained with another prompt template (fingerprint {self.template}, here "
                f"{template}); set the same data.template in every stage."
            )


@torch.no_grad()
def score_probe(backbone: Backbone, role: str, tokenizer: Any) -> float:
    """The score of a fixed text by a role with a head.

    Args:
        backbone: with the role.
        role: with a scalar head.
        tokenizer: of the base.
    """
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]], device=next(backbone.parameters()).device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with backbone.role(role):
        return float(backbone.scores(Sequences(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:])))


def _together(backbone: Backbone, role: str, tokenizer: Any) -> tuple[float | None, dict[str, torch.Tensor] | None]:
    """What all processes make together of a sharded role: the score of the probe, and the weights that train."""
    probe = score_probe(backbone, role, tokenizer) if role in backbone.heads else None
    return probe, backbone.whole_weights(role)


def _write_as_one(stack: tuple[str, ...], folder: Path) -> None:
    try:
        concatenate([folder / adapter for adapter in stack], folder / "adapter")
    except UserError as error:
        rank_zero_info(str(error))


def _digest(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; run its stage again.")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
