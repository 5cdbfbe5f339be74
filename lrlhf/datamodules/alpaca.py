"""AlpacaDataModule: one class, three views of the data, shared by all modules."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
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
from lrlhf.datamodules.formats import Reading
from lrlhf.datamodules.prompts import AlpacaTemplate, Template
from lrlhf.datamodules.sampler import BatchSampler
from lrlhf.datamodules.splits import take_split
from lrlhf.datamodules.table import BAD, EMPTY, FINE, Recipe, TokenTable, View, token_table
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
        self.rows: dict[str, View] = {}
        self.dropped: Counter[str] = Counter()
        self._tables: dict[tuple, TokenTable] = {}
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
        if stage in ("fit", "validate") and "val" not in self.rows and (self.sources["val"] or self.val_split):
            self.rows["val"] = self._view("val", self.val_split, self.val_limit)
        if stage == "fit" and "train" not in self.rows:
            if self.sources["train"] is None:
                raise UserError("data.train names no file to train on.")
            self.rows["train"] = self._view("train", self.train_split, self.limit)
            if not self.rows["train"]:
                raise UserError(f"data.train={self.sources['train']}: no row is left to train on ({self._lost()}).")
        if stage in ("test", "predict"):
            if self.sources[stage] is None and self.sources["val"] is None and self.val_split is None:
                raise UserError(f"data.{stage} names no file to {stage} on, nor does data.val or data.val_split.")
            self.rows[stage] = self._view(stage, self.val_split, self.val_limit)
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
        return self._loader("val", self.val_batch_size) if self.rows.get("val") else []

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
            rows.lengths,
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

    def _view(self, name: str, split: str | None, limit: int | None) -> View:
        """The rows of one view: from its own files, else the validation files, else a split of the training files."""
        source = self.sources[name] or (self.sources["val"] if name != "train" else None)
        own = source is not None and name != "train"
        sources = source or self.sources["train"] or []
        need = RESPONSES[self._predict_task if name == "predict" else self.task]
        every_turn = self.train_on == "all" and name != "predict"
        table = self._table(tuple([sources] if isinstance(sources, str) else sources), need, every_turn)
        places = np.arange(len(records := table.column("record")))
        if not own and split is not None and self.splits is not None:
            _, first = np.unique(records, return_index=True)
            rank = np.full(len(first), -1)
            taken = take_split(table.column("key")[first], self.splits, split)
            rank[taken] = np.arange(len(taken))
            places = places[rank[records] >= 0]
            places = places[np.argsort(rank[records[places]], kind="stable")]
        return View(table, self._usable(table, places, need)[:limit])

    def _usable(self, table: TokenTable, places: np.ndarray, need: int) -> np.ndarray:
        """Those rows of a view that are kept; the others are refused, or counted by why they are left out."""
        state, prompt, response = (table.column(name)[places] for name in ("state", "prompt_tokens", "response_tokens"))
        for bad in places[state == BAD]:
            row = table.row(bad)
            self._refuse(row["place"], row["reason"])
        long_prompt = (state == FINE) & (prompt > self.max_prompt_tokens)
        long_response = (state == FINE) & ~long_prompt & (response > self.max_response_tokens)
        for reason, which in (
            ("empty outputs", state == EMPTY),
            (f"prompts over {self.max_prompt_tokens} tokens", long_prompt),
            (f"responses over {self.max_response_tokens} tokens", long_response),
        ):
            if which.any():
                self.dropped[reason] += int(which.sum())
        return places[(state == FINE) & ~long_prompt & ~long_response]

    @property
    def _predict_task(self) -> Task:
        """What the module predicts on; without one, prompts unless the data is pairs."""
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "predict_task", "preference" if self.task == "preference" else "prompts")

    def _table(self, sources: tuple[str, ...], need: int, every_turn: bool) -> TokenTable:
        """All rows of some files, with what is to be told of them."""
        what = sources, need, every_turn
        if what not in self._tables:
            recipe = Recipe(sources, self.reading, self.template, self.tokenizer, need, every_turn)
            self._tables[what] = token_table(recipe, self._refuse)
        notes = self._tables[what].notes
        for place, reason in notes["bad"]:
            self._refuse(place, reason)
        self._left_out |= Counter({(source, reason): count for source, reason, count in notes["left_out"]})
        for reason in {reason for _, reason in self._left_out}:
            self.dropped[reason] = sum(count for (_, why), count in self._left_out.items() if why == reason)
        for remark in notes["remarks"]:
            self._say(remark)
        return self._tables[what]

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

    def _lost(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "the files are empty"
