"""LightningCLI with two links, one run folder, and one sentence for a config that cannot be used."""

import re
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from lrlhf.callbacks import PredictionWriter
from lrlhf.errors import UserError


class Parser(LightningArgumentParser):
    """Ends with one sentence instead of a usage text and a nested report."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what jsonargparse would print."""
        raise UserError(one_sentence(message)) from ex


def one_sentence(message: str) -> str:
    """What is wrong in a jsonargparse message: the key it is about, and the innermost reason."""
    lines = [line.strip(" -\n") for line in message.splitlines() if line.strip()]
    keys = re.findall(r"""(?:Parser key|Key|key|option|field) ['"]([\w.+-]+)['"]""", message)
    noise = r"(Problem with given class_path|Parser key|Does not validate|Given value type|Given value:)"
    reasons = [line for line in lines if not re.match(noise, line)] or lines
    reason = reasons[-1].rstrip(".")
    where = f"config key {keys[0]}: " if keys and keys[0] not in reason else ""
    return f"{where}{reason}."


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder when a run starts, without the checkpoint that this launch came from."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Only `fit` defines a run."""
        if stage == "fit":
            self.config = Namespace({**vars(self.config), "ckpt_path": None})
            super().setup(trainer, pl_module, stage)


def task_of(model: Namespace) -> str:
    """The `task` attribute of the model's class: the view of the data that it trains on."""
    from jsonargparse._util import import_object

    return getattr(import_object(model.class_path), "task", "sft")


class AlignmentCLI(LightningCLI):
    """model and data by class path; the module names its base and its view of the data, and the data follows.

    A run has one folder, `trainer.default_root_dir`: config.yaml, metrics.csv, checkpoints/, handover/.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two links, no more."""
        parser.link_arguments("model.init_args.base_model", "data.init_args.tokenizer")
        parser.link_arguments("model", "data.init_args.task", compute_fn=task_of)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """From a list of arguments, also when the process has others of its own."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The run folder, its logger, its checkpoints, and predictions that are written."""
        config = self._get(self.config_init, "trainer")
        folder = config.get("default_root_dir") or f"runs/{getattr(self.model, 'role', 'model')}"
        kwargs["default_root_dir"] = folder
        callbacks = config.get("callbacks") or []
        if self.subcommand == "fit":
            if config.get("logger") in (None, True):
                kwargs["logger"] = CSVLogger(folder, name="", version="")
            if config.get("enable_checkpointing") in (None, True) and not _has(callbacks, ModelCheckpoint):
                callbacks = [*callbacks, ModelCheckpoint(save_last=True)]
        else:
            kwargs |= {"logger": False, "enable_checkpointing": False}
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        if self.subcommand == "predict" and not _has(callbacks, PredictionWriter):
            callbacks = [*callbacks, PredictionWriter()]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _use_last_checkpoint(self) -> None:
        """Evaluate the run's own newest checkpoint unless --ckpt_path names another."""
        config = self.config_init[str(self.subcommand)]
        if config.get("ckpt_path") is not None:
            if not Path(config["ckpt_path"]).is_file() and config["ckpt_path"] not in ("best", "last", "hpc"):
                raise UserError(f"ckpt_path={config['ckpt_path']}: there is no such file.")
            return
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if not last.is_file():
            raise UserError(
                f"{self.subcommand}: no checkpoint at {last}; run fit with the same config first, or give --ckpt_path."
            )
        print(f"Using {last}")
        config["ckpt_path"] = str(last)

    before_validate = before_test = before_predict = _use_last_checkpoint


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def parse_config(path: Path) -> tuple[dict[str, Any], L.LightningModule, L.LightningDataModule]:
    """The values of a run's config.yaml, and the module and data module that it describes."""
    values = yaml.safe_load(path.read_text())
    parser = Parser()
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    built = parser.instantiate_classes(parser.parse_object({key: values[key] for key in ("model", "data")}))
    return values, built.model, built.data
