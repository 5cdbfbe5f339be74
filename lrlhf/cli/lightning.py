"""LightningCLI with two links, one run folder, and one sentence for a config that cannot be used."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import getfile
from pathlib import Path
from traceback import extract_tb
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lrlhf.callbacks import PredictionWriter
from lrlhf.cli.messages import NO_MODULE, OneSentence, one_sentence
from lrlhf.errors import UserError
from lrlhf.files import whole
from lrlhf.modules.base import AlignmentModule
from lrlhf.run.checkpoints import Checkpoints, is_whole, load, newest_checkpoint
from lrlhf.run.folder import CHECKPOINTS, clear, refuse_other_run
from lrlhf.run.metrics_csv import MetricsFile


class Parser(OneSentence, LightningArgumentParser):
    """The parser of a run's config: trainer, model and data."""

    def dump(self, cfg: Namespace, *arguments: Any, **options: Any) -> str:
        """Write out a config, with the linked keys (data.task, data.tokenizer) filled in: it can be run as it is."""
        cfg = cfg.clone()
        if cfg.get("data.init_args.task") and cfg.get("model.class_path"):
            cfg["data.init_args.task"] = task_of(cfg.model)
            cfg["data.init_args.tokenizer"] = cfg.get("model.init_args.base_model", cfg["data.init_args.tokenizer"])
        return super().dump(cfg, *arguments, **{"skip_link_targets": False, **options})

    def instantiate_classes(self, *arguments: Any, **options: Any) -> Namespace:
        """A setting that a class refuses is the user's to mend, however deep jsonargparse wraps the refusal."""
        try:
            return super().instantiate_classes(*arguments, **options)
        except ValueError as error:
            raise UserError(one_sentence(str(error))) from error


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder when a run starts, whole or not at all, without what is this launch's."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Only `fit` defines a run."""
        if stage != "fit":
            return
        config = Namespace({**vars(self.config), "ckpt_path": None, "fresh": False})
        path = Path(trainer.default_root_dir) / "config.yaml"
        with whole(path) as scratch:
            self.parser.save(config, scratch, skip_none=False, overwrite=True, multifile=False)


def import_name(path: str) -> Any:
    """A class or function by its import path.

    Raises:
        UserError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{path} cannot be imported; give the import path of a function.") from None


def class_of(model: Namespace) -> Any:
    """The class that a module's config names."""
    return import_name(model.class_path)


def task_of(model: Namespace) -> str:
    """The `task` attribute of the model's class: the view of the data that it trains on."""
    return getattr(class_of(model), "task", "sft") if model else "sft"


def link(parser: LightningArgumentParser) -> None:
    """The module names its base and its view of the data, and the data follows."""
    parser.link_arguments("model.init_args.base_model", "data.init_args.tokenizer")
    parser.link_arguments("model", "data.init_args.task", compute_fn=task_of)


CLI: dict[str, Any] = {
    "model_class": L.LightningModule,
    "subclass_mode_model": True,
    "save_config_callback": SaveConfig,
    "save_config_kwargs": {"save_to_log_dir": False},
    "trainer_defaults": {"max_epochs": 1, "use_distributed_sampler": False},
    "auto_configure_optimizers": False,
    "parser_class": Parser,
}
"""How LightningCLI is used here."""


class NothingLeft(Exception):
    """The run in this folder is complete."""


class AlignmentCLI(LightningCLI):
    """model and data by class path, linked.

    A run has one folder, `trainer.default_root_dir`: config.yaml, metrics.csv, checkpoints/, handover/.
    """

    def __init__(self, *arguments: Any, args: ArgsType = None, **options: Any):
        self.command = args[0] if isinstance(args, list) and args and args[0] in super().subcommands() else None
        super().__init__(*arguments, args=args, **options)  # type: ignore[misc]

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Of Lightning's four commands the one that runs: a parser for each would take four times as long to build."""
        commands = super().subcommands()
        return {self.command: commands[self.command]} if self.command in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two links and one flag."""
        link(parser)
        parser.add_argument("--fresh", action="store_true", help="fit: start over instead of going on in a run folder")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse this list of arguments, never those of the process, and check the checkpoint that it names."""
        if self.command:
            parser.inner = self._parser(self.command)  # type: ignore[attr-defined]
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        config = self.config.get(str(self.command), self.config)
        if config.get("trainer") is None:
            raise UserError("config key trainer: expected settings, such as accelerator: cpu, got null.")
        if config.get("model") is None:
            raise UserError(NO_MODULE)
        if (path := config.get("ckpt_path")) and path not in ("best", "last", "hpc"):
            config.ckpt_path = str(Path(path).expanduser())
            if issubclass(class_of(config.model), AlignmentModule):
                load(Path(config.ckpt_path))
            elif Path(config.ckpt_path).is_file() and not is_whole(Path(config.ckpt_path)):
                raise UserError(f"ckpt_path={path} is no checkpoint, or damaged; give another.")

    def before_instantiate_classes(self) -> None:
        """Lightning's `fsdp` wraps the whole module and trains wrongly with manual optimization; take ours."""
        trainer = self._get(self.config, "trainer")
        strategy = trainer.strategy
        if strategy == "fsdp" or str(getattr(strategy, "class_path", "")).endswith(".FSDPStrategy"):
            rank_zero_only(print)("trainer.strategy: fsdp is run as fsdp2, which shards the frozen base")
            trainer.strategy = "fsdp2"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The run folder, its logger, its checkpoints, and predictions that are written.

        A module that is not lrlhf's is checkpointed by Lightning's own callback.
        """
        config = self._get(self.config_init, "trainer")
        ours = isinstance(self.model, AlignmentModule)
        _refuse_unfit(self.model, self.datamodule, str(self.subcommand))
        folder = str(
            Path(config.get("default_root_dir") or f"runs/{getattr(self.model, 'role', 'model')}").expanduser()
        )
        if Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"trainer.default_root_dir={folder} is a file; name a folder for the run.")
        kwargs["default_root_dir"] = folder
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if self.subcommand == "fit":
            if config.get("logger") in (None, True):
                kwargs["logger"] = MetricsFile(folder)
            if config.get("enable_checkpointing") in (None, True) and not _has(callbacks, Checkpoint):
                lightnings = ModelCheckpoint(Path(folder) / CHECKPOINTS, save_last=True)
                callbacks = [*callbacks, Checkpoints() if ours else lightnings]
        else:
            kwargs |= {"logger": False, "enable_checkpointing": False}
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
        if self.subcommand == "predict" and ours and not _has(callbacks, PredictionWriter):
            callbacks = [*callbacks, PredictionWriter()]
        kwargs["enable_model_summary"] = bool(config.get("enable_model_summary"))
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"trainer: {one_sentence(str(error))}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """A module of the user's that cannot use the batches of our data learns what they are."""
        try:
            super()._run_subcommand(subcommand)
        except (AttributeError, TypeError) as error:
            kind = re.search("Sequences|Preferences|Prompts", str(error))
            if not kind or isinstance(self.model, AlignmentModule):
                raise
            file = getfile(type(self.model))
            lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
            where = f" (line {lines[-1]} of {file})" if lines else ""
            raise UserError(
                f"{type(self.model).__name__} cannot use batches of lrlhf.types.{kind[0]}, which "
                f"{type(self.datamodule).__name__} gives: {str(error).rstrip('.')}{where}."
            ) from error

    def before_fit(self) -> None:
        """Go on from the run folder's newest checkpoint unless told otherwise; a run's config says what `auto` was."""
        settings = self._get(self.config, "model").get("init_args") or {}
        if isinstance(self.model, AlignmentModule) and settings.get("dtype") == "auto":
            settings["dtype"] = self.model.dtype_on(self.trainer.strategy.root_device.type)
        config, run = self.config_init["fit"], Path(self.trainer.default_root_dir)
        if config["fresh"]:
            if self.trainer.is_global_zero:
                clear(run)
        elif config.get("ckpt_path") is None and (newest := self._newest(run)):
            as_long, handed_over = refuse_other_run(self.values(), run), (run / "handover/manifest.json").is_file()
            if isinstance(self.model, AlignmentModule) and load(newest).get("complete") and as_long and handed_over:
                raise NothingLeft(
                    f"{run}: complete already; raise trainer.max_epochs to go on, or start over with --fresh"
                )
            if self.trainer.is_global_zero:
                print(f"Going on from {newest}")
            config["ckpt_path"] = str(newest)

    def _newest(self, run: Path) -> Path | None:
        """Of our own checkpoints, fetched if they are elsewhere; or the one that Lightning keeps for another module."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints) and callback.mirror:
                callback.mirror.fetch(run)
        if isinstance(self.model, AlignmentModule):
            return newest_checkpoint(run)
        last = run / CHECKPOINTS / "last.ckpt"
        return last if last.is_file() else None

    def values(self) -> dict[str, Any]:
        """The resolved config as config.yaml would hold it."""
        config = self.config.get(str(self.subcommand), self.config)
        return yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))

    def _use_newest_checkpoint(self) -> None:
        """Evaluate the run's own newest checkpoint unless --ckpt_path names another."""
        config, run = self.config_init[str(self.subcommand)], Path(self.trainer.default_root_dir)
        if config.get("ckpt_path") is not None or not getattr(self.model, "trains", True):
            return
        newest = self._newest(run)
        if newest is None:
            raise UserError(
                f"{self.subcommand}: no checkpoint in {run / CHECKPOINTS}; run fit with the same config first, or give "
                "--ckpt_path."
            )
        if self.trainer.is_global_zero:
            print(f"Using {newest}")
        config["ckpt_path"] = str(newest)

    before_validate = before_test = before_predict = _use_newest_checkpoint


class ConfigCLI(AlignmentCLI):
    """Reads a run's config, with options of a command's own beside it, and makes nothing."""

    def __init__(self, command: str, add_options: Callable[[Parser], None], arguments: Sequence[str]):
        self.add_options = add_options
        names = {"prog": f"lrlhf {command}", "description": (add_options.__doc__ or "").strip()}
        super().__init__(**CLI, run=False, parser_kwargs=names, args=list(arguments))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of `fit`, and the command's."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(L.Trainer, "fit", skip=super().subcommands()["fit"])
        self.add_options(parser)  # type: ignore[arg-type]

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        """Skip the making of trainer, model and data."""


def _refuse_unfit(model: L.LightningModule, data: L.LightningDataModule | None, command: str) -> None:
    """A class that cannot run, and a module of ours without its data."""
    step = {"fit": "training_step", "validate": "validation_step"}.get(command, f"{command}_step")
    lacks = command != "predict" and not is_overridden(step, model, L.LightningModule)
    if lacks or type(model) in (L.LightningModule, AlignmentModule):
        raise UserError(
            f"config key model: {type(model).__name__} has no {step}; name a module that has, such as lrlhf.SFT."
        )
    if type(data) is L.LightningDataModule or (data is None and isinstance(model, AlignmentModule)):
        raise UserError(
            "config key data: name a data module, such as class_path: lrlhf.AlpacaDataModule with init_args.train."
        )


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def parse_config(path: Path) -> tuple[dict[str, Any], L.LightningModule, L.LightningDataModule]:
    """The values of a run's config.yaml, and the module and data module that it describes."""
    values = yaml.safe_load(path.read_text())
    parser = Parser()
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    link(parser)
    built = parser.instantiate_classes(parser.parse_object({key: values[key] for key in ("model", "data")}))
    return values, built.model, built.data


def run_stage(arguments: list[str]) -> Any:
    """One LightningCLI command; returns the CLI, whose `trainer` and `model` have run, or None if nothing was left.

    Raises:
        UserError: a config, a setting or a row that cannot be used.
    """
    try:
        return AlignmentCLI(**CLI, args=arguments)
    except NothingLeft as done:
        print(done)
        return None
    except MisconfigurationException as error:
        raise UserError(one_sentence(" ".join(str(error).split()))) from error
