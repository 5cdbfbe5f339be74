"""What the three stages share: build the roles, optimise, save only what trains, hand over."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.profiler import record_function
from torchmetrics import Metric
from transformers import get_scheduler

from lrlhf import distributed
from lrlhf.config import DType, LoRA, Quantization, Sampling, Schedule, check_ranges
from lrlhf.errors import UserError
from lrlhf.functional.randomness import generator
from lrlhf.metrics import Means
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import respond
from lrlhf.model.precision import auto_dtype
from lrlhf.model.pretrained import fingerprint_tokenizer, load_tokenizer, stop_tokens
from lrlhf.model.quantization import refuse_paged
from lrlhf.model.sharding import FSDP2Strategy, check_strategy, gathered, shard
from lrlhf.modules.rollout_callback import stage
from lrlhf.modules.self_check import check_passes, rounding, unequal_rows
from lrlhf.run.checkpoints import refuse_other
from lrlhf.run.handover import Handover
from lrlhf.types import Preferences, Prompts, Sequences

OptimizerCallable = Callable[[Iterable], torch.optim.Optimizer]
"""Makes an optimizer of parameters."""

MARK = "lrlhf: "
ROLLOUT, SCORE, UPDATE = (MARK + phase for phase in ("rollout", "score", "update"))
"""Spans that a profiler sees: what an iteration spends its time and memory on."""


class AlignmentModule(L.LightningModule):
    """A stage of training on the roles of one backbone.

    Manual optimization in all stages: one Lightning batch is one unit of the science, cut into micro-batches that
    change memory alone, and divided once by the whole batch's count.

    Args:
        base_model: hub id, folder, GGUF file or short name of the frozen base.
        sft: hand-over folder of an SFT run whose adapter lies below this stage's; None if the base is an SFT model.
        lora: settings of new adapters; null trains full models, for comparison.
        dtype: of the frozen base; what trains is fp32 always. auto takes bfloat16 where the device multiplies it in
            hardware, else float32 (always with lora: null).
        quantize: keep the linear layers of the frozen base in 8 or 4 bits; null keeps them in `dtype`. All stages of a
            run need the same.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        micro_batch_size: rows of one forward and backward pass, per device. Memory only.
        sampling: how responses are drawn in PPO, `validate` and `predict`.
        optimizer: the paper's AdamW by default.
        schedule: the paper's linear decay by default.
        max_grad_norm: gradients of larger global norm are scaled down to it; 1.0 in the paper.
        on_nonfinite: at a loss, gradient or reward that is NaN or infinite, stop, or skip the step and count it.
    """

    task: ClassVar[Literal["sft", "preference", "prompts"]]
    """The view of the data that this module trains on; the command line links it to data.task."""
    predict_task: ClassVar[Literal["preference", "prompts"]] = "prompts"
    """The view that `predict` works on."""
    role: ClassVar[str]
    """The role that is trained, evaluated and handed over."""
    trains: ClassVar[bool] = True
    """Whether it has something to train, and so checkpoints."""

    def __init__(
        self,
        base_model: str = "smollm2-135m-instruct",
        sft: str | None = None,
        lora: LoRA | None = LoRA(),
        dtype: DType | Literal["auto"] = "float32",
        quantize: Quantization | None = None,
        gradient_checkpointing: bool = False,
        micro_batch_size: PositiveInt = 16,
        sampling: Sampling = Sampling(),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, eps=1e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(),
        max_grad_norm: PositiveFloat = 1.0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.base_model, self.sft, self.lora, self._dtype_name = base_model, sft, lora, dtype
        self.quantize = quantize
        self.gradient_checkpointing, self.micro_batch_size = gradient_checkpointing, micro_batch_size
        self.sampling, self.optimizer, self.schedule = sampling, optimizer, schedule
        self.max_grad_norm, self.on_nonfinite = max_grad_norm, on_nonfinite
        check_ranges(self)
        if lora is None and dtype not in ("float32", "auto"):
            raise UserError(f"model.dtype={dtype} with lora: null would train in {dtype}; set dtype: float32.")
        if lora is None and quantize is not None:
            raise UserError(
                "model.quantize with lora: null would train a quantised model; set lora, or quantize: null."
            )
        self.seed = 0
        self.parents = {folder: Handover.read(folder) for folder in self.handover_folders()}
        self.iteration = 0
        self.skipped = 0
        self._checked = self._handed_over = False

    # Build

    def handover_folders(self) -> list[str]:
        """The hand-over folders of earlier stages that this one starts from; their manifests are read at once."""
        return [self.sft] if self.sft else []

    def build_roles(self) -> None:
        """Define the roles of this stage on `self.backbone`, which holds the base alone so far."""
        raise NotImplementedError

    @property
    def dtype_name(self) -> DType:
        """Of the base."""
        return self.dtype_on(self.trainer.strategy.root_device.type if self._trainer else "cpu")

    def dtype_on(self, device: str) -> DType:
        """Of the base on a kind of device, on which depends what `auto` means.

        Args:
            device: cuda, or any other for the processor.
        """
        if self._dtype_name != "auto":
            return self._dtype_name
        return auto_dtype(device, whole=self.lora is None)

    def make_backbone(self) -> Backbone:
        """The base, without roles. Override it to load a base in another way."""
        return Backbone(
            self.base_model,
            lora=self.lora,
            dtype=self.dtype_name,
            quantize=self.quantize,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def configure_model(self) -> None:
        """Load the base once, then the roles; Lightning calls it before fit, validate, test and predict."""
        if "backbone" in self._modules:
            return
        self.tokenizer = load_tokenizer(self.base_model)
        self.backbone = self.make_backbone()
        end_id = getattr(self._template, "end_id", lambda tokenizer: tokenizer.eos_token_id)
        end = end_id(self.tokenizer)
        self.stop_ids = torch.tensor(stop_tokens(self.tokenizer, self.backbone.model, end, self.sampling.stop))
        for parent in self.parents.values():
            parent.check(self.backbone, fingerprint_tokenizer(self.tokenizer))
        self.build_roles()
        self.backbone.eval()
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy):
            shard(self.backbone, self.trainer.strategy.device_mesh["data_parallel"], self.trainer.strategy.gather)

    def load_sft(self) -> tuple[str, ...]:
        """Load the SFT adapter as the role `reference`, if the stage starts from one.

        Returns:
            The stack that every other adapter of this stage lies on: ("sft",), or () without one.

        Raises:
            UserError: the folder is not of an SFT run, or one of the two stages trains full models.
        """
        if not self.sft:
            return ()
        sft = self.parents[self.sft]
        if sft.role != "sft":
            raise UserError(f"model.sft={self.sft} was handed over by a {sft.role} run, not by an SFT run.")
        if self.lora is None or not sft.stack:
            raise UserError(
                f"model.sft={self.sft}: adapters and full models cannot be stacked; after full fine-tuning set "
                f"model.base_model: {sft.folder / 'model'} and model.sft: null."
            )
        sft.load(self.backbone, "reference")
        return sft.stack

    def setup(self, stage: str) -> None:
        """Take the run's seed: what is sampled depends on it and on where in the run it happens, on nothing else.

        Raises:
            UserError: a trainer that would train this module wrongly, or whose settings would be without effect.
        """
        if self.trainer.precision != "32-true":
            raise UserError(f"trainer.precision={self.trainer.precision} does not apply here; set model.dtype instead.")
        check_strategy(self.trainer.strategy, self.lora, self.quantize)
        self.seed = distributed.gather_objects(torch.initial_seed())[0] % 2**31

    def on_fit_start(self) -> None:
        """Check that the data uses the prompt template of the earlier stages, and give all processes equal weights."""
        rank_zero_info(self.backbone.summary())
        distributed.broadcast(self.backbone.trainable())
        for parent in self.parents.values():
            parent.check_template(self.template_fingerprint())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first iteration of every fit, run the self-check on its batch and keep what it found."""
        self._check_batch(batch, self.task)
        if not self._checked:
            with gathered(self.backbone):
                found = self.self_check(batch)
            self._checked = True
            if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                path = Path(self.trainer.default_root_dir) / "self_checks.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{sentence}\n" for sentence in found or ()))

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a batch of another kind than this stage works on."""
        self._check_batch(batch, self.task)

    on_test_batch_start = on_validation_batch_start

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a batch of another kind than this stage predicts on."""
        self._check_batch(batch, self.predict_task)

    def _check_batch(self, batch: Any, task: str) -> None:
        kind = {"sft": Sequences, "preference": Preferences, "prompts": Prompts}[task]
        if not isinstance(batch, kind):
            raise UserError(
                f"{type(self).__name__} takes batches of lrlhf.types.{kind.__name__}, not {type(batch).__name__}; "
                "use lrlhf.AlpacaDataModule, or a data module that collates such batches."
            )

    def self_check(self, batch: Any) -> list[str]:
        """Compare our passes with the model's own on rows of the first batch.

        Returns:
            A sentence for each check, with what it measured.

        Raises:
            UserError: they differ by more than rounding.
        """
        text = unequal_rows(getattr(batch, "chosen", batch))
        allowed, engine = rounding(self.dtype_name, self.quantize), self.sampling.engine
        return [check_passes(self.backbone, self.role, text, self.stop_ids, allowed, engine)]

    def on_train_start(self) -> None:
        """Give every process its own random numbers for dropout from here on; until now all had the same."""
        if self.global_rank:
            torch.manual_seed(self.seed + self.global_rank)

    def template_fingerprint(self) -> str | None:
        """The fingerprint of the data module's prompt template; None if the trainer was given plain data loaders."""
        return getattr(self._template, "fingerprint", None)

    @property
    def _template(self) -> Any:
        return getattr(getattr(self._trainer, "datamodule", None), "template", None)

    def numbered_rows(self, setting: str) -> tuple[Any, Callable[[list[Any]], Preferences]]:
        """The training pairs, and how they become a batch, where a batch tells which of them it holds.

        Args:
            setting: of the model, which must know a pair again; for the message.

        Raises:
            UserError: the batches do not tell.
        """
        loader: Any = self.trainer.train_dataloader
        rows: Any = getattr(loader, "dataset", None)
        collate: Any = getattr(loader, "collate_fn", None)
        if hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and collate is not None and len(rows):
            last = collate([rows[len(rows) - 1]])
            if isinstance(last, Preferences) and last.numbers.tolist() == [len(rows) - 1]:
                return rows, collate
        raise UserError(
            f"model.{setting} needs training pairs that know their place (Preferences.numbers), as those of "
            "lrlhf.AlpacaDataModule; set it to false."
        )

    # Optimise

    def configure_optimizers(self) -> Any:
        """The optimizer of everything that trains, and its schedule over the batches of this fit."""
        try:
            optimizer = self.optimizer(self.backbone.trainable())
        except (TypeError, ValueError) as error:
            raise UserError(f"model.optimizer: {str(error).rstrip('.')}.") from error
        refuse_paged(optimizer, self.device)
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("the run has no end: set trainer.max_epochs.")
        schedule = get_scheduler(self.schedule.name, optimizer, self.schedule.warmup, int(total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimization_step(self, losses: Iterable[Tensor]) -> dict[str, float]:
        """One optimizer step on the sum of the losses, each backpropagated as soon as it is made.

        Returns:
            loss, and grad_norm before clipping.

        Raises:
            UserError: a loss or the gradient is not finite; the weights are still those before the step.
        """
        optimizer = self.optimizers()
        total = 0.0
        with getattr(self.trainer.strategy, "block_backward_sync", nullcontext)():
            for loss in losses:
                self.manual_backward(loss)
                total += float(loss.detach())
        distributed.sum_gradients(self.backbone.trainable())
        total = distributed.total_number(total)
        norm = distributed.clip_gradients(self.backbone.trainable(), self.max_grad_norm)
        for name, number in (("loss", total), ("gradient norm", norm)):
            if not math.isfinite(number):
                self.refuse_nonfinite(f"the {name} is {number}", "lower the learning rate, or look at the data")
                break
        else:
            optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        return {"loss": total, "grad_norm": norm}

    def supervised_step(self, losses: Iterable[Tensor], means: Means | None = None, *, dropout: bool = True) -> None:
        """One iteration of SFT, of the reward model or of DPO: an optimizer step in the stage's role, and its log.

        Args:
            losses: of the micro-batches, made while they are taken, so that they are made in the role.
            means: what the losses note while they are made, logged too.
            dropout: of the adapters.
        """
        with record_function(UPDATE), self.backbone.role(self.role), self.backbone.training_pass(dropout=dropout):
            metrics = self.optimization_step(losses)
        self.log("loss", metrics["loss"], prog_bar=True, logger=False)
        self.end_iteration(metrics | (means.compute() if means else {}))

    def refuse_nonfinite(self, what: str, remedy: str) -> None:
        """Stop, or count a step that the caller then skips; the weights have not changed.

        Args:
            what: is not finite, for the message.
            remedy: what to try.

        Raises:
            UserError: unless `on_nonfinite` is skip.
        """
        if self.on_nonfinite == "stop":
            raise UserError(
                f"{what} in iteration {self.iteration}: training stopped before the weights changed; {remedy}, or set "
                "model.on_nonfinite: skip."
            )
        self.skipped += 1
        rank_zero_warn(f"{what} in iteration {self.iteration}: step skipped, {self.skipped} so far", stacklevel=2)

    def end_iteration(self, metrics: dict[str, float]) -> None:
        """Advance the learning-rate schedule and the iteration count by one, and log.

        Args:
            metrics: of the iteration; logged under `train/`, with the learning rate that it used.
        """
        schedule = self.lr_schedulers()
        learning_rate = float(schedule.get_last_lr()[0])  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]
        metrics = metrics | {"learning_rate": learning_rate}
        if self.on_nonfinite == "skip":
            metrics["skipped"] = float(self.skipped)
        self.log_dict({f"train/{k}": v for k, v in metrics.items()})
        self.iteration += 1

    # Evaluate

    @property
    def stage(self) -> str:
        """Before the names of what is logged: train, val or test."""
        return stage(self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Reset here: a metric that was reset in the inference mode of `validate` could not be updated in `fit`."""
        for metric in self.children():
            if isinstance(metric, Metric):
                metric.reset()

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    # Passes over a batch

    def micro_batches(self, batch: Any) -> Iterator[tuple[Tensor, Any]]:
        """Pieces of at most `micro_batch_size` rows of a batch, each with the index [N] int64 of its rows.

        Over a sharded base every process must make equally many passes: one with fewer pieces than another ends with
        pieces of one blank row, whose index is empty.

        Args:
            batch: with `micro_batches` and `blank`, such as those of `lrlhf.types`.
        """
        missing = 0
        if self.backbone.synchronised:
            missing = distributed.missing_passes(-(-len(batch) // self.micro_batch_size))
        yield from batch.micro_batches(self.micro_batch_size)
        for _ in range(missing):
            yield torch.zeros(0, dtype=torch.long), batch.blank()

    def losses_of(self, batch: Any, loss: Callable[[Any], Tensor]) -> Iterator[Tensor]:
        """The loss of each micro-batch, a scalar, computed when it is asked for.

        Args:
            batch: of this process.
            loss: from a micro-batch to a scalar.

        Returns:
            One loss a pass; that of a blank row, which only fills up the number of passes, is multiplied by 0.
        """
        for index, piece in self.micro_batches(batch):
            yield loss(piece) if len(index) else 0 * loss(piece)

    def per_row(self, batch: Any, shape: Sequence[int], compute: Callable[[Any], Tensor]) -> Tensor:
        """Run `compute` over the micro-batches of a batch and put its results back into the order of the rows.

        Args:
            batch: of B rows.
            shape: of the result, B first.
            compute: from N rows to a tensor [N, ...], whose other axes may be shorter than those of `shape`.

        Returns:
            fp32 [B, ...], 0 where no micro-batch reached.
        """
        result = torch.zeros(*shape, device=self.device)
        for index, piece in self.micro_batches(batch):
            values = compute(piece)
            if len(index):
                place: Any = (index, *(slice(size) for size in values.shape[1:]))
                result[place] = values
        return result

    # Sample

    @torch.no_grad()
    def sample(self, prompts: Prompts, role: str, *place: int | str) -> tuple[Tensor, Tensor]:
        """Responses of a role: ids and mask [B, R].

        The draws depend on the seed, `place` and the row's number in the batch over all processes, on nothing else.

        Args:
            prompts: of this process.
            role: that responds.
            place: where in the run it happens.
        """
        with self.backbone.role(role):
            return respond(
                self.backbone,
                prompts.prompt_ids,
                prompts.prompt_mask,
                sampling=self.sampling,
                stop_ids=self.stop_ids.to(self.device),
                generator=generator(self.seed, "sampling", *place),
                group_size=prompts.group_size,
            )

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, str]]:
        """AlpacaEval rows: instruction, output, generator, dataset."""
        ids, mask = self.sample(batch, self.role, "predict", batch_idx)
        return [
            {**source, "output": text, "generator": f"lrlhf-{self.role}"}
            for source, text in zip(batch.sources, self.decode(ids, mask), strict=True)
        ]

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Texts of responses, special tokens left out.

        Args:
            ids: [B, R] int64.
            mask: [B, R] bool.
        """
        return [self.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask, strict=True)]

    # Save

    def trained(self) -> dict[str, Tensor]:
        """The parameters that train, each under the name that it has in a checkpoint."""
        ids = {id(p) for p in self.backbone.trainable()}
        return {name: p for name, p in self.named_parameters() if id(p) in ids}

    def identity(self) -> dict[str, Any]:
        """Fingerprints of what a checkpoint does not store; where it is loaded they must be the same."""
        return {
            "class": type(self).__qualname__,
            "base model": self.backbone.fingerprint,
            "tokenizer": fingerprint_tokenizer(self.tokenizer),
            "lora": asdict(self.lora) if self.lora else None,
            "adapter below": {k: v for parent in self.parents.values() for k, v in parent.adapters.items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, the counts and the seed, and the identity of the rest."""
        names = self.trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        counts = {"iteration": self.iteration, "skipped": self.skipped, "seed": self.seed}
        checkpoint["lrlhf"] = counts | self.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counts again; refuse a checkpoint of something else, naming what differs."""
        refuse_other(checkpoint, self.identity(), self.trained())
        there = checkpoint["lrlhf"]
        self.iteration, self.skipped = there["iteration"], there["skipped"]
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.seed = there["seed"]

    def on_train_end(self) -> None:
        """Hand over, after the last checkpoint was saved."""
        self.hand_over()

    def on_fit_end(self) -> None:
        """Hand over what an earlier start trained and could not hand over: then there was nothing to train."""
        if not self._handed_over:
            self.hand_over()

    def hand_over(self) -> None:
        """Write the hand-over folder: what the next stage starts from.

        Raises:
            UserError: it cannot be written.
        """
        self._handed_over = True
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.trainer.default_root_dir) / "handover"
        try:
            self.write_handover(
                folder, base_model=self.base_model, dtype=self.dtype_name, template=self.template_fingerprint()
            )
        except Exception as error:
            raise UserError(
                f"{folder} could not be written ({error}). Training is done and its checkpoint is whole: mend "
                "this and start the same command (lrlhf fit --config ...) again, which writes the folder alone."
            ) from error
        rank_zero_info(f"Handed over the {self.role} role in {folder}")

    def write_handover(self, folder: Path, **about: Any) -> None:
        """Save what was trained. Collective: every process calls it, and the first writes.

        Args:
            folder: to write.
            about: base, dtype and template, for the manifest.
        """
        Handover.write(folder, self.backbone, self.role, self.tokenizer, **about)
