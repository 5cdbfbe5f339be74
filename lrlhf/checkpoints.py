"""Checkpoint files: a kill or a full disk while one is written leaves the one before whole; verified before use."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lrlhf.errors import UserError

FOLDER = "checkpoints"
"""Of a run's checkpoints, inside its folder."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for reading and writing: atomic, verified, and free of pickled classes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, flush to the disk, rename.

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
        raise UserError(f"{path} is no checkpoint, or damaged; give another file of the run's {FOLDER}/.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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
    """Where a run keeps the state after so many iterations."""
    return run / FOLDER / f"iteration={iteration:06d}.ckpt"


def all_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    return sorted((run / FOLDER).glob("iteration=*.ckpt"), reverse=True)


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
        raise UserError(f"every checkpoint in {run / FOLDER} is damaged; start over with --fresh.")
    return None


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """What the system said, which torch wraps in a message about positions."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
