"""AlpacaDataModule: one class, three views of the data, shared by all modules."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lrlhf.config import check_ranges
from lrlhf.datamodules.collate import (
    Tokenized,
    collate_groups,
    collate_preferences,
    collate_prompts,
    collate_sequences,
)
from lrlhf.datamodules.containers import BadRow
from lrlhf.datamodules.formats import Reading, Row, read_rows
from lrlhf.datamodules.prompts import AlpacaTemplate, Template, encode_prompt, special_tokens
from lrlhf.datamodules.sampler import BatchSampler
from lrlhf.distributed import gather_objects
from lrlhf.errors import UserError
from lrlhf.model.pretrained import load_tokenizer

Task = Literal["sft", "preference", "prompts"]

COLLATE: dict[str, Callable[[Sequence[Tokenized]], Any]] = {
    "sft": collate_sequences,
    "preference": collate_preferences,
    "prompts": collate_prompts,
}
RESPONSES = {"sft": 1, "preference": 2, "prompts": 0}


class AlpacaDataModule(L.LightningDataModule):
    """Instructions, demonstrations or preference pairs from files or a hub id (layouts: `lrlhf.datamodules.formats`).

    Args:
        train: one or several files, folders, patterns such as data/*.jsonl, or hub ids to train on.
        val: files or ids to validate on; None takes `val_split` out of `train`.
        test: files or ids for `test`; None uses the validation rows.
        predict: files or ids for `predict`; None uses the validation rows.
        task: sft (prompt and response), preference (chosen and rejected) or prompts. The command line links it from the
            model class.
        tokenizer: base model whose tokenizer to use. The command line links it from the model.
        template: how a prompt is rendered.
        splits: named shares of the training rows, as numbers of rows, e.g. {sft: 10000, val: 2000}; null takes the
            rest. A stable hash of the prompt decides, so that no prompt lies in two splits.
        train_split: the share to train on; None takes all rows.
        val_split: the share to validate on where `val` is None.
        batch_size: rows of one optimizer step (SFT, reward model, DPO) or responses of one rollout (PPO and the other
            methods with rollouts), over all processes.
        responses_per_prompt: responses of a rollout to each of its prompts, so that there are batch_size divided by it
            prompts in one; RLOO and GRPO compare them. Training only.
        val_batch_size: rows of a validation batch.
        max_prompt_tokens: rows with longer prompts are left out and counted, never cut; 192 in the paper.
        max_response_tokens: the same for responses; 300 in the paper.
        limit: use at most so many training rows, after the split.
        val_limit: use at most so many validation, test or prediction rows.
        group_by_length: put rows of similar length into one batch.
        num_workers: processes that collate.
        columns: our names of columns, each with its name in the files, e.g. {instruction: ask, output: reply}.
        encoding: of text files.
        verdicts: whether preferences count from_zero (0 the first, 1 the second) or from_one; null looks at each file.
        margin_from_scores: take score_chosen - score_rejected as the margin of a pair.
        good_only: of answers that are judged one by one (label: true or false), imitate the good ones.
        train_on: for SFT, the last turn of the assistant in a conversation, or all of them: each then is a row of its
            own behind the turns before it, rendered as it will be when it is to be answered.
        on_bad_row: at a row that cannot be used, stop, or skip it, count it and write it to bad_rows.jsonl in the run
            folder with the reason.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        task: Task = "sft",
        tokenizer: str = "smollm2-135m-instruct",
        template: Template | None = None,
        splits: dict[str, int | None] | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        batch_size: PositiveInt = 128,
        responses_per_prompt: PositiveInt = 1,
        val_batch_size: PositiveInt = 32,
        max_prompt_tokens: PositiveInt = 192,
        max_response_tokens: PositiveInt = 300,
        limit: PositiveInt | None = None,
        val_limit: PositiveInt | None = None,
        group_by_length: bool = True,
        num_workers: NonNegativeInt = 0,
        columns: dict[str, str] | None = None,
        encoding: str = "utf-8",
        verdicts: Literal["from_zero", "from_one"] | None = None,
        margin_from_scores: bool = False,
        good_only: bool = False,
        train_on: Literal["last", "all"] = "last",
        on_bad_row: Literal["stop", "skip"] = "stop",
    ):
        super().__init__()
        for name in filter(None, (train_split, val_split)):
            if name not in (splits or {}):
                raise UserError(f"data: {name!r} is no key of data.splits, which has {sorted(splits or {})}.")
        if val_split is not None and train_split is None and val is None:
            raise UserError(f"data.val_split={val_split!r} needs data.train_split, or validation rows are trained on.")
        if val is None and val_split is not None and val_split == train_split:
            raise UserError(f"data.val_split={val_split!r} is data.train_split too; validation rows are trained on.")
        if task not in COLLATE:
            raise UserError(f"data.task={task!r} must be one of {', '.join(COLLATE)}.")
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.task, self.tokenizer_name = task, tokenizer
        self.template = template or AlpacaTemplate()
        self.splits, self.train_split, self.val_split = splits, train_split, val_split
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.responses_per_prompt = responses_per_prompt
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.limit, self.val_limit = limit, val_limit
        self.group_by_length, self.num_workers = group_by_length, num_workers
        check_ranges(self)
        if task != "prompts" and responses_per_prompt > 1:
            raise UserError(f"data.responses_per_prompt={responses_per_prompt} is for rollouts, and {task} has none.")
        self.reading = Reading(columns or {}, encoding, verdicts, margin_from_scores, good_only)
        if train_on == "all" and task != "sft":
            raise UserError(f"data.train_on=all is for SFT; the {task} task answers the last turn.")
        self.train_on, self.on_bad_row = train_on, on_bad_row
        self.rows: dict[str, list[Tokenized]] = {}
        self.dropped: Counter[str] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._bad: dict[str, str] = {}
        self._remarks: set[str] = set()
        self._seed = 0
        self._position: dict[str, int] | None = None

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Read, split, render and tokenise the rows that this stage needs."""
        stage = str(getattr(stage, "value", stage))
        trainer: Any = self.trainer
        connector = getattr(trainer, "_accelerator_connector", None)
        if connector is not None and trainer.world_size > 1 and connector.use_distributed_sampler:
            raise UserError(
                "give the Trainer use_distributed_sampler=False: rows are shared out here, by global batch."
            )
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self._special, self._end = special_tokens(self.tokenizer), self.template.end_id(self.tokenizer)
        if stage in ("fit", "validate") and "val" not in self.rows:
            self.rows["val"] = self._view("val", self.val_split)
        if stage == "fit" and "train" not in self.rows:
            if self.sources["train"] is None:
                raise UserError("data.train names no file to train on.")
            self.rows["train"] = self._view("train", self.train_split)[: self.limit]
            if not self.rows["train"]:
                raise UserError(f"data.train={self.sources['train']}: no row is left to train on ({self._lost()}).")
        if stage in ("test", "predict"):
            if self.sources[stage] is None and self.sources["val"] is None and self.val_split is None:
                raise UserError(f"data.{stage} names no file to {stage} on, nor does data.val or data.val_split.")
            self.rows[stage] = self._view(stage, self.val_split)
            if not self.rows[stage]:
                raise UserError(f"data.{stage} (or data.val) gives no row to {stage} on ({self._lost()}).")
        self._write_bad_rows()
        if sum(self.dropped.values()):
            warnings.warn(f"data: left out {self._lost()}.", stacklevel=2)

    def train_dataloader(self) -> DataLoader:
        """Shuffled by (seed, epoch); for PPO only full batches, so that every rollout has the same size."""
        world = self.trainer.world_size if self.trainer else 1
        if self.batch_size % world:
            raise UserError(f"data.batch_size={self.batch_size} does not divide among {world} processes.")
        prompts, group = self.task == "prompts", self.responses_per_prompt
        if self.batch_size % (group * world):
            raise UserError(
                f"data.responses_per_prompt={group} does not divide data.batch_size={self.batch_size} into whole groups"
                + (f" among {world} processes." if world > 1 else ".")
            )
        size = self.batch_size // group
        if prompts and len(self.rows["train"]) < size:
            raise UserError(
                f"data.batch_size={self.batch_size} is more than the {len(self.rows['train'])} prompts of data.train"
                + (f" times data.responses_per_prompt={group}" if group > 1 else "")
                + "; choose a smaller one."
            )
        return self._loader("train", size, self.group_by_length and not prompts, True, prompts)

    def val_dataloader(self) -> DataLoader | list:
        """In the order of the file; no loader where there are no validation rows."""
        return self._loader("val", self.val_batch_size) if self.rows["val"] else []

    def test_dataloader(self) -> DataLoader:
        """In the order of the file."""
        return self._loader("test", self.val_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """In the order of the file: prompts, or pairs for a reward model."""
        if self.trainer and self.trainer.world_size > 1:
            raise UserError("predict runs on one device: set trainer.devices: 1.")
        # Lightning wraps the sampler of a prediction loader, and can do so with its own kind alone.
        rows: Any = self.rows["predict"]
        return DataLoader(rows, batch_size=self.val_batch_size, collate_fn=COLLATE[self._predict_task])

    def state_dict(self) -> dict[str, int]:
        """Where training stands: the order's seed, the epoch, and how many of its batches are done."""
        assert self.trainer is not None
        epochs: Any = self.trainer.fit_loop.epoch_progress.total
        batches = self.trainer.fit_loop.epoch_loop.batch_progress
        under_way = epochs.completed < epochs.started
        start = batches.current.completed if under_way else 0
        return {"seed": self._seed, "epoch": epochs.processed, "start": start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader begin where the checkpoint says."""
        self._position = state_dict

    # Rows

    def _loader(
        self, view: str, batch_size: int, grouped: bool = False, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader:
        rows: Any = self.rows[view]
        group = self.responses_per_prompt if view == "train" else 1
        position = {"seed": gather_objects(torch.initial_seed())[0], "epoch": 0, "start": 0}
        if view == "train":
            position, self._position = self._position or position, None
            self._seed = position["seed"]
        sampler = BatchSampler(
            [row.length for row in rows],
            batch_size,
            seed=position["seed"],
            shuffle=shuffle,
            group_by_length=grouped,
            drop_last=drop_last,
            epoch=position["epoch"],
            start=position["start"],
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=partial(collate_groups, times=group) if group > 1 else COLLATE[self.task],
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )

    def _view(self, name: str, split: str | None) -> list[Tokenized]:
        """The rows of one view: from its own files, else the validation files, else a split of the training files."""
        source = self.sources[name] or (self.sources["val"] if name != "train" else None)
        if source is None and name != "train" and split is None:
            return []
        own = source is not None and name != "train"
        rows = self._read(source or self.sources["train"])
        if not own and split is not None and self.splits is not None:
            rows = take_split(rows, self.splits, split)
        need = RESPONSES[self._predict_task if name == "predict" else self.task]
        if self.train_on == "all" and name != "predict":
            rows = [turn for row in rows for turn in row.assistant_turns()]
        tokenized = [kept for row in rows if (kept := self._tokenize(row, need)) is not None]
        kept_rows = tokenized if name == "train" else tokenized[: self.val_limit]
        return [replace(row, number=number) for number, row in enumerate(kept_rows)]

    @property
    def _predict_task(self) -> Task:
        """What the module predicts on; without one, prompts unless the data is pairs."""
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "predict_task", "preference" if self.task == "preference" else "prompts")

    def _read(self, sources: str | list[str] | None) -> list[Row]:
        left_out: Counter[tuple[str, str]] = Counter()
        names = [sources] if isinstance(sources, str) else sources or []
        options: Any = {"bad": self._refuse, "say": self._say}
        rows = [row for name in names for row in read_rows(name, left_out, self.reading, **options)]
        self._left_out |= left_out
        for reason in {reason for _, reason in left_out}:
            self.dropped[reason] = sum(count for (_, why), count in self._left_out.items() if why == reason)
        twice = len(rows) - len({(repr(row.messages), row.responses) for row in rows})
        echoes = sum(row.messages[-1][1] in row.responses for row in rows)
        against = sum(row.margin < 0 for row in rows) if self.reading.margin_from_scores else 0
        kept = {"rows twice": twice, "responses that repeat the prompt": echoes, "pairs scored against": against}
        if told := ", ".join(f"{count} {what}" for what, count in kept.items() if count):
            self._say(f"{', '.join(names)}: kept {told}")
        return rows

    def _say(self, remark: str) -> None:
        """Log a remark about the data once, although several views may read the same file."""
        if remark not in self._remarks:
            self._remarks.add(remark)
            rank_zero_info(f"data: {remark}")

    def _refuse(self, place: str, reason: str) -> None:
        if self.on_bad_row == "stop":
            raise UserError(f"{place}: {reason.rstrip('.')}.")
        self._bad[place] = reason
        self.dropped["bad rows"] = len(self._bad)

    def _write_bad_rows(self) -> None:
        """The rows that were skipped, with their reasons."""
        if not self._bad or not self.trainer or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "bad_rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"row": place, "reason": reason}) for place, reason in self._bad.items())
        path.write_text("".join(f"{line}\n" for line in lines))

    def _tokenize(self, row: Row, need: int) -> Tokenized | None:
        """The row as token ids; None where it is left out."""
        try:
            if len(row.responses) < need:
                wanted = "an output" if need == 1 else "two responses and a preference"
                raise BadRow(f"the {self.task} task needs {wanted}")
            text = self.template.render(row, self.tokenizer)
            prompt = encode_prompt(self.template, row, text, self.tokenizer, self._special)
            if not prompt:
                raise BadRow("the prompt has no tokens")
        except BadRow as error:
            self._refuse(row.place, str(error))
            return None
        if need == 1 and not row.responses[0].strip():
            self.dropped["empty outputs"] += 1
            return None
        responses = tuple([*self._plain_ids(response), self._end] for response in row.responses[:need])
        if len(prompt) > self.max_prompt_tokens:
            self.dropped[f"prompts over {self.max_prompt_tokens} tokens"] += 1
            return None
        if any(len(response) > self.max_response_tokens for response in responses):
            self.dropped[f"responses over {self.max_response_tokens} tokens"] += 1
            return None
        source = {"instruction": row.messages[-1][1], "dataset": row.dataset}
        turns = tuple({"role": turn[0], "content": turn[1]} for turn in row.messages)
        return Tokenized(prompt, responses, row.margin, text, source, turns, row.columns, row.place)

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of a text, in which what looks like a special token is text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _lost(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "the files are empty"


def take_split(rows: Sequence[Row], splits: dict[str, int | None], name: str) -> list[Row]:
    """The rows of one named split: prompts are ordered by a stable hash and dealt out in the order of `splits`.

    Rows with one prompt stay together, so a split may hold a few more than its size.

    Args:
        rows: all of the training files.
        splits: sizes by name, in their order; one may be None, the rest.
        name: of the split.

    Raises:
        UserError: the rows do not suffice for all splits.
    """

    def key(row: Row) -> str:
        return hashlib.sha256(repr(row.messages).encode()).hexdigest()

    sizes = {name: size for name, size in splits.items() if size is not None}
    if len(splits) - len(sizes) > 1 or any(size < 1 for size in sizes.values()):
        raise UserError(f"data.splits={splits}: sizes must be at least 1, and at most one may be null (the rest).")
    if sum(sizes.values()) > len(rows):
        raise UserError(f"data.splits asks for {sum(sizes.values())} rows, data.train has {len(rows)}.")
    keys = {row.place: key(row) for row in rows}
    ordered = sorted(rows, key=lambda row: keys[row.place])
    start = 0
    for split, size in splits.items():
        end = start + (len(rows) - sum(sizes.values()) if size is None else size)
        while 0 < end < len(ordered) and keys[ordered[end].place] == keys[ordered[end - 1].place]:
            end += 1
        if split == name:
            if start >= end:
                raise UserError(f"data.splits={splits}: of {len(rows)} rows none is left for {name!r}.")
            return ordered[start:end]
        start = end
    raise UserError(f"data.splits has no {name!r}.")
