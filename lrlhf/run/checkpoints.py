"""Checkpoints between iterations, from which a run goes on exactly as if it had never stopped.

A kill or a full disk while one is written leaves the one before whole; each is verified before use.
"""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lrlhf.config import TwoOrMore, check_ranges
from lrlhf.distributed import any_process, gather_objects, rank, world_size
from lrlhf.errors import UserError
from lrlhf.run.folder import CHECKPOINTS
from lrlhf.run.mirror import Mirror
from lrlhf.run.state import DeferredSignals, random_state, set_random_state


class Checkpoints(Checkpoint):
    """Save what trains and where the run is, after an iteration with its logging and validation, before the next.

    Files lie in checkpoints/ of the run folder: iteration=000012.ckpt is the state after 12 iterations, best.ckpt that
    of the best validation. SIGINT, SIGTERM and SLURM's signal wait for the end of the iteration, save, and leave; a
    second SIGINT leaves at once.

    Args:
        every: iterations between two checkpoints; a kill loses at most so many.
        keep: number of newest checkpoints to keep, at least 2: if one is damaged there is another.
        monitor: a metric of validation by which best.ckpt is kept, e.g. val/accuracy; None keeps none.
        mode: whether a smaller or a larger value of `monitor` is better.
        mirror: where the run folder is copied to after each checkpoint, such as s3://bucket/run; `fit` in a folder
            without checkpoints begins by fetching it.
    """

    def __init__(
        self,
        every: PositiveInt = 1,
        keep: TwoOrMore = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        mirror: str | None = None,
    ):
        self.every, self.keep, self.monitor, self.mode = every, keep, monitor, mode
        check_ranges(self)
        self.mirror = Mirror(mirror) if mirror else None
        self.best: float | None = None
        self._random: dict[str, Any] | None = None
        self._signals = DeferredSignals()

    # Between two iterations

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move to the front of the callbacks, and take over the reading and writing of checkpoints.

        In front, because a checkpoint is written when an iteration starts: what other callbacks do at that moment
        belongs to the iteration that follows.
        """
        if not hasattr(pl_module, "iteration"):
            raise UserError(
                f"Checkpoints counts the iterations of lrlhf's modules, which {type(pl_module).__name__} has none of; "
                "use lightning.pytorch.callbacks.ModelCheckpoint."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take the signals; tell Lightning that nothing of the saved iteration is left to do.

        Raises:
            UserError: a run that starts anew, and a mirror that holds another.
        """
        if self.mirror and not pl_module.iteration and self.mirror.checkpoints():
            raise UserError(
                f"{self.mirror.url} holds the checkpoints of a run, and this one starts anew; remove them, or choose "
                "another Checkpoints.mirror."
            )
        self._signals.take()
        if trainer.fit_loop.restarting:
            trainer.fit_loop.epoch_loop.reset_restart_stage()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Go on from here, or save what is here; leave if a signal asked for it."""
        stopping = any_process(bool(self._signals.received))
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        elif pl_module.iteration:
            self._save(trainer, pl_module.iteration, pl_module.iteration % self.every == 0 or stopping)
        if stopping:
            if trainer.is_global_zero:
                print(f"Stopped after {pl_module.iteration} iterations; the same command goes on from there")
            self._signals.deliver()
            raise SIGTERMException

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a metric that validation does not give."""
        if self.monitor and not trainer.sanity_checking and self.monitor not in trainer.callback_metrics:
            raise UserError(
                f"Checkpoints: there is no metric {self.monitor!r}; validation gives "
                f"{', '.join(sorted(k for k in trainer.callback_metrics if k.startswith('val')))}."
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end of the run, before the module hands over: a hand-over that fails costs no training."""
        self._save(trainer, pl_module.iteration, True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back; copy what was handed over."""
        self._signals.release()
        if stage == "fit" and trainer.train_dataloader is not None:
            self._push(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._signals.release()

    def _save(self, trainer: L.Trainer, iteration: int, due: bool) -> None:
        """best.ckpt first: a kill in between then repeats the comparison."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run = Path(trainer.default_root_dir)
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is not None and self._is_better(float(value)):
            self.best, due = float(value), True
            trainer.save_checkpoint(run / CHECKPOINTS / "best.ckpt", weights_only=False)
        if due:
            trainer.save_checkpoint(checkpoint_path(run, iteration), weights_only=False)
            if trainer.is_global_zero:
                for old in all_checkpoints(run)[self.keep :]:
                    old.unlink()
            self._push(trainer)

    def _push(self, trainer: L.Trainer) -> None:
        if self.mirror and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.mirror.push(Path(trainer.default_root_dir))

    def _is_better(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.mode == "max" else value < self.best)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with it."""
        self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the generators and the logs' positions, and put Lightning's loops between two iterations."""
        checkpoint["complete"] = settle_loops(checkpoint["loops"]["fit_loop"])
        checkpoint["random"] = gather_objects(random_state())
        checkpoint["loggers"] = [getattr(logger, "state_dict", dict)() for logger in trainer.loggers]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Generators come last, when the first iteration starts; logs go back to where they were."""
        if trainer.state.fn == "fit" and "random" in checkpoint:
            states = checkpoint["random"]
            if len(states) == world_size():
                self._random = states[rank()]
            elif trainer.is_global_zero:
                print(
                    f"Saved by {len(states)} processes, gone on by {world_size()}: dropout, and code of your own that "
                    "uses the global generators, draw anew from here; sampling does not"
                )
            for logger, state in zip(trainer.loggers, checkpoint["loggers"], strict=False):
                if hasattr(logger, "load_state_dict"):
                    logger.load_state_dict(state)


def settle_loops(loops: dict[str, Any]) -> bool:
    """Write into Lightning's loop positions that the last iteration is wholly done and the next not begun.

    Lightning saves in the middle of its bookkeeping and decides on restart how much of it was left; here nothing is
    left. Its epoch loop counts one stepped batch too many when it restarts within an epoch, so one is taken off.

    Args:
        loops: the `fit_loop` entry of a checkpoint; changed in place.

    Returns:
        Whether the run is complete, that is, no epoch is under way.
    """
    epochs, batches = loops["epoch_progress"]["total"], loops["epoch_loop.batch_progress"]
    complete = epochs["completed"] == epochs["started"]
    if complete:
        batches["current"] = dict.fromkeys(batches["current"], 0)
    for counts in (batches["total"], batches["current"]):
        counts |= dict.fromkeys(counts, counts["completed"])
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= not complete
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for counts in (validation["total"], validation["current"]):
        counts |= dict.fromkeys(counts, 0)
    return complete


def refuse_other(checkpoint: dict[str, Any], identity: dict[str, Any], trained: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint of something else than what is here.

    Args:
        checkpoint: with `state_dict` and, under `lrlhf`, the identity that it was saved with.
        identity: by name, what is not in a checkpoint and must be the same.
        trained: by name, the tensors that train.

    Raises:
        UserError: naming what differs.
    """
    if "lrlhf" not in checkpoint:
        raise UserError("this checkpoint was not written by lrlhf.")
    for what, here in identity.items():
        there = checkpoint["lrlhf"].get(what)
        if there != here:
            raise UserError(
                f"this checkpoint has another {what} ({_differing(there, here)}); go on with the settings that the "
                "run started with."
            )
    ours = {name: tensor.shape for name, tensor in trained.items()}
    theirs = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    differing = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    if differing:
        raise UserError(
            f"this checkpoint does not hold the {len(ours)} tensors that train here: {len(differing)} differ in name "
            f"or shape, e.g. {differing[0]}; go on with the settings that the run started with."
        )


def _differing(there: Any, here: Any) -> str:
    """What differs, as text: the entries of two mappings, or the two values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in there | here if there.get(key) != here.get(key)]
        return ", ".join(f"{key}: {there.get(key)}, here {here.get(key)}" for key in keys)
    return f"{there}, here {here}"


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for reading and writing: atomic, verified, and free of pickled classes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, flush to the disk, rename.

        Args:
            checkpoint: of Lightning: tensors and plain values.
            path: of the file.
            storage_options: not used.

        Raises:
            UserError: the disk is full or not writable; the checkpoint before is untouched.
        """
        path = Path(path)
        scratch = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
            _flush_folder(path.parent)
        except (OSError, RuntimeError) as error:
            _remove(scratch)
            raise UserError(
                f"{path} could not be written ({_reason(error)}); the checkpoints before it are whole: make room and "
                "start the same command again."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values; nothing in the file is executed, whatever `weights_only` says.

        Raises:
            UserError: the file is missing, damaged, or holds classes.
        """
        return load(Path(path))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after verifying it.

    Raises:
        UserError: the file is missing, damaged, or holds classes.
    """
    if not path.is_file():
        raise UserError(f"ckpt_path={path}: there is no such file.")
    if not is_whole(path):
        raise UserError(f"{path} is no checkpoint, or damaged; give another file of the run's {CHECKPOINTS}/.")
    try:
        # mapped, so that the processes of a machine share what they read; Windows could not remove a mapped file
        return torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except Exception as error:
        raise UserError(f"{path} holds more than tensors and plain values; lrlhf wrote no such file.") from error


def is_whole(path: Path) -> bool:
    """Whether the checksum (CRC-32) of every record in a file of torch.save is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, RuntimeError):
        return False


def checkpoint_path(run: Path, iteration: int) -> Path:
    """Where a run keeps the state after so many iterations.

    Args:
        run: the run folder.
        iteration: how many iterations are done.
    """
    return run / CHECKPOINTS / f"iteration={iteration:06d}.ckpt"


def all_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    found = (run / CHECKPOINTS).glob("iteration=*.ckpt")
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest one that is whole; says which are not. None if there is none at all.

    Raises:
        UserError: there are some, and all are damaged.
    """
    found = all_checkpoints(run)
    for path in found:
        if is_whole(path):
            return path
        print(f"{path} is damaged; using the one before it")
    if found:
        raise UserError(f"every checkpoint in {run / CHECKPOINTS} is damaged; start over with --fresh.")
    return None


def _flush_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: before that, a rename in it may be lost by a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The operating system's own words, which torch wraps into an error about file positions."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
