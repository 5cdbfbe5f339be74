"""A model that answers or scores: what a run handed over, its reference, or a base model."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from lrlhf.config import DType, Quantization, Sampling
from lrlhf.datamodules.collate import pad
from lrlhf.datamodules.containers import BadRow
from lrlhf.datamodules.formats import Row
from lrlhf.datamodules.prompts import AlpacaTemplate, ChatTemplate, Template, encode_prompt, special_tokens
from lrlhf.errors import UserError
from lrlhf.functional.randomness import generator
from lrlhf.model.adapters import CONFIG
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import respond, stream_tokens
from lrlhf.model.precision import fast_dtype
from lrlhf.model.pretrained import fingerprint_tokenizer, load_tokenizer, stop_tokens
from lrlhf.modules.self_check import check_reward_model
from lrlhf.run.handover import Handover
from lrlhf.types import Sequences


def handover_in(source: str) -> Path | None:
    """The hand-over folder that a path names: itself, or that of a run folder; None where it names no run.

    Raises:
        UserError: a path that does not exist, or a run that has not finished.
    """
    folder = Path(source).expanduser()
    for candidate in (folder, folder / "handover"):
        if (candidate / "manifest.json").is_file() or (candidate / CONFIG).is_file():
            return candidate
    if (folder / "config.yaml").is_file() and (folder / "metrics.csv").is_file():
        raise UserError(f"{source} is a run without a hand-over; let its fit finish first.")
    if runs := sorted(str(found.parent) for found in folder.glob("*/handover")):
        raise UserError(f"{source} holds several runs; name one: {', '.join(runs)}.")
    if not folder.exists() and "/" in source and (source.count("/") > 1 or folder.parent.is_dir()):
        raise UserError(f"there is no run, hand-over or model {source}.")
    return None


class System:
    """Loads on first use.

    Args:
        source: a run folder, a hand-over folder, or a base model (hub id, folder, GGUF file or short name).
        role: what was trained, or the reference that it started from.
        dtype: of the frozen base; null takes the one that the run used, and for a base model
            what `auto` means in training (`lrlhf.model.precision.fast_dtype`).
        template: how instructions are rendered; null takes that of the run's config, and of a base model the chat
            template.
        sampling: how responses are drawn; null takes the run's, and for a base model the defaults.
        batch_size: texts of one pass. Memory only.
        beside: a system whose base is shared, where both lie on the same one: one base in memory instead of two.
    """

    def __init__(
        self,
        source: str,
        *,
        role: Literal["trained", "reference"] = "trained",
        dtype: DType | None = None,
        template: Template | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 16,
        beside: "System | None" = None,
    ):
        self.beside = beside
        self.source, self.batch_size = source, batch_size
        folder = handover_in(source)
        self.handover = None if folder is None else Handover.read(folder)
        settings = _settings(folder) if folder else {}
        if role == "reference" and not (self.handover and self.handover.stack):
            raise UserError(f"{source} has no reference to compare with; name one: outputs, a run or a base model.")
        self.template = template or settings.get("template") or (AlpacaTemplate() if folder else None)
        self.sampling = sampling or settings.get("sampling") or Sampling()
        self.quantize: Quantization | None = settings.get("quantize")
        of_run: Any = self.handover.dtype if self.handover else None
        self.dtype: DType = dtype or of_run or fast_dtype(_device())
        self.reward_model: str | None = settings.get("reward_model")
        """Hand-over of the reward model that the run trained with, if its config names one."""
        self.role = role
        self._backbone: Backbone | None = None

    @property
    def name(self) -> str:
        """For annotations: where it comes from, and its role."""
        return self.source if self.handover is None else f"{self.source}, {self.role_name}"

    @property
    def role_name(self) -> str:
        """On the backbone: sft, policy or reward as it was handed over, reference, or base."""
        return "base" if self.handover is None else self.handover.role if self.role == "trained" else "reference"

    @property
    def backbone(self) -> Backbone:
        """With the one role, on the accelerator if there is one.

        Raises:
            UserError: another base, tokenizer or prompt template than the role was trained on.
        """
        if self._backbone is None:
            base = self.handover.base_model if self.handover else self.source
            self.tokenizer = load_tokenizer(base)
            if self.template is None:
                self.template = ChatTemplate() if self.tokenizer.chat_template else AlpacaTemplate()
            self._special = special_tokens(self.tokenizer)
            if self.beside and self._shares_base_with(self.beside):
                backbone = self.beside.backbone
            else:
                backbone = Backbone(base, dtype=self.dtype, quantize=self.quantize).eval()
            self._load_role(backbone)
            self.end = self.template.end_id(self.tokenizer)
            self.stop_ids = torch.tensor(stop_tokens(self.tokenizer, backbone.model, self.end, self.sampling.stop))
            self._backbone = backbone.to(_device())
        return self._backbone

    def _shares_base_with(self, other: "System") -> bool:
        """Whether both roles fit on one base: the same, stored alike, and adapters of one name are one adapter."""
        mine, theirs = self.handover, other.handover
        if mine is None or theirs is None or self.role_name in other.backbone.stacks:
            return False
        same = all(theirs.adapters.get(name, digest) == digest for name, digest in mine.adapters.items())
        return same and (mine.base, self.dtype, self.quantize) == (theirs.base, other.dtype, other.quantize)

    def _load_role(self, backbone: Backbone) -> None:
        if self.handover is None:
            backbone.add_role(self.role_name)
            return
        self.handover.check(backbone, fingerprint_tokenizer(self.tokenizer))
        self.handover.check_template(getattr(self.template, "fingerprint", None))
        if self.role == "trained":
            self.handover.load(backbone, self.role_name)
            check_reward_model(backbone, self.tokenizer, self.handover, self.dtype)
        elif below := self.handover.stack[:-1]:
            backbone.load_role(self.role_name, below, self.handover.folder, head=False)
        else:
            backbone.add_role(self.role_name)

    def copy_config(self, folder: Path) -> None:
        """The config of the run, if there is one, so that an exported adapter keeps template and sampling."""
        if self.handover and (path := _config(self.handover.folder)):
            shutil.copy(path, folder / "config.yaml")

    @property
    def device(self) -> torch.device:
        """Of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def context(self) -> int:
        """Tokens that prompt and response may have together; a large number where the model states none."""
        return int(getattr(self.backbone.model.config, "max_position_embeddings", None) or 2**20)

    def encode(self, row: Row, template: Template | None = None) -> list[int]:
        """Token ids of a prompt, rendered by the system's own template or by another.

        Raises:
            UserError: a row that the template does not take.
        """
        self.backbone  # noqa: B018 loads the tokenizer
        template = template or self.template
        assert template is not None
        try:
            text = template.render(row, self.tokenizer)
        except BadRow as error:
            raise UserError(f"{row.place or 'a prompt'}: {error}.") from None
        return encode_prompt(template, row, text, self.tokenizer, self._special)

    @torch.no_grad()
    def respond(self, prompts: Sequence[list[int]], sampling: Sampling | None = None, seed: int = 0) -> list[str]:
        """Responses to prompts, special tokens left out; the draws depend on the seed and the prompt's number alone.

        Args:
            prompts: token ids of each.
            sampling: other than the system's own.
            seed: of the draws.

        Raises:
            UserError: a prompt that leaves no room for a response.
        """
        sampling, responses = sampling or self.sampling, []
        self._refuse_too_long(prompts, sampling)
        size = sampling.batch_size
        starts = range(0, len(prompts), size)
        for start in tqdm(starts, desc=f"answers of {self.name}", disable=len(starts) < 2):
            ids, mask = (x.to(self.device) for x in pad(prompts[start : start + size], left=True))
            with self.backbone.role(self.role_name):
                draws = generator(seed, "evaluate", start)
                stop_ids = self.stop_ids.to(self.device)
                answer = respond(self.backbone, ids, mask, sampling=sampling, stop_ids=stop_ids, generator=draws)
            kept = zip(*answer, strict=True)
            responses += [self.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in kept]
        return responses

    def stream(self, prompt: list[int], sampling: Sampling | None = None, seed: int = 0) -> Iterator[str]:
        """A response as it grows, special tokens left out; with `respond`'s draws for one prompt.

        Args:
            prompt: its token ids.
            sampling: other than the system's own.
            seed: of the draws.

        Raises:
            UserError: a prompt that leaves no room for a response.
        """
        sampling = sampling or self.sampling
        self._refuse_too_long([prompt], sampling)
        tokens: list[int] = []
        uniforms = torch.rand(1, sampling.max_new_tokens, generator=generator(seed, "evaluate", 0)).to(self.device)
        with self.backbone.role(self.role_name):
            ids, stop_ids = torch.tensor([prompt], device=self.device), self.stop_ids.to(self.device)
            drawn = stream_tokens(self.backbone, ids, sampling=sampling, stop_ids=stop_ids, uniforms=uniforms)
            for token in drawn:
                tokens.append(token)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield text.rstrip("\ufffd")  # half a character, whose other bytes are still to come
            yield text

    def _refuse_too_long(self, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        room = self.context - sampling.max_new_tokens
        if too_long := [i for i, ids in enumerate(prompts, start=1) if len(ids) > room]:
            raise UserError(
                f"{self.name}: prompt {too_long[0]} has {len(prompts[too_long[0] - 1])} tokens, {room} fit."
            )

    @torch.no_grad()
    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> Tensor:
        """Scores [N] fp32 of responses by a reward model, each read at its end-of-sequence token.

        A text that is longer than the model takes has the score nan.

        Raises:
            UserError: the run trained no reward model, or one whose scores are not finite.
        """
        if self.handover is None or not self.handover.head:
            raise UserError(f"{self.source} is no reward model; give the run folder or hand-over of a RewardModel run.")
        prompts = [self.encode(row) for row in rows]
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        answers = [[*self.tokenizer(text, **plain)["input_ids"], self.end] for text in responses]
        scores = torch.full((len(prompts),), torch.nan)
        for index in self._batches([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], "scores"):
            left, right = pad([prompts[i] for i in index], left=True), pad([answers[i] for i in index], left=False)
            with self.backbone.role(self.role_name):
                found = self.backbone.scores(Sequences(*left, *right).to(self.device)).cpu()
            if not found.isfinite().all():
                raise UserError(f"{self.source} gives scores that are not finite; train the reward model again.")
            scores[index] = found
        return scores

    @torch.no_grad()
    def next_token_logits(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
        """Logits [N, C] fp32 of C tokens after each of N prompts; nan after one that is longer than the model takes.

        Args:
            prompts: token ids of each.
            tokens: to look at.
        """
        logits = torch.full((len(prompts), len(tokens)), torch.nan)
        for index in self._batches([len(ids) for ids in prompts], f"verdicts of {self.name}"):
            ids, mask = pad([prompts[i] for i in index], left=True)
            next_token = torch.ones(len(index), 1, dtype=torch.long)  # whichever: what is before it is looked at
            text = Sequences(ids, mask, next_token, next_token.bool()).to(self.device)
            with self.backbone.role(self.role_name):
                found = self.backbone.lm_head(self.backbone.encode(text)[:, 0])
            logits[index] = found[:, list(tokens)].float().cpu()
        return logits

    def _batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
        """Numbers of the rows that fit, in pieces of similar length."""
        order = sorted((i for i, n in enumerate(lengths) if n <= self.context), key=lambda i: -lengths[i])
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=what, disable=len(starts) < 2):
            yield order[start : start + self.batch_size]


def prompt_row(instruction: str, before: Sequence[tuple[str, str]] = ()) -> Row:
    """A row of one turn, or of one after others.

    Args:
        instruction: of the user.
        before: earlier turns, each a role and its text.
    """
    return Row((*before, ("user", instruction)), instruction, "", (), 0.0, "")


def _config(handover: Path) -> Path | None:
    """The config of the run that a hand-over lies in, or that an exported adapter carries."""
    return next((p for p in (handover / "config.yaml", handover.parent / "config.yaml") if p.is_file()), None)


def _settings(handover: Path) -> dict[str, Any]:
    """Template, sampling and quantisation of the run that a hand-over lies in, as far as its config tells them."""
    path = _config(handover)
    if path is None:
        return {}
    values = yaml.safe_load(path.read_text())
    model, data = (((values or {}).get(key) or {}).get("init_args") or {} for key in ("model", "data"))
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in (("template", Template), ("sampling", Sampling), ("quantize", Quantization)):
        parser.add_argument(f"--{name}", type=kind | None)
    found = {key: (data if key == "template" else model).get(key) for key in ("template", "sampling", "quantize")}
    made = vars(parser.instantiate_classes(parser.parse_object(found)))
    return made | {"reward_model": model.get("reward_model")}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
