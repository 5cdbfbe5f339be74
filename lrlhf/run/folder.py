"""A run's folder: which of its settings make it the run that it is, and how to empty it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import yaml

from lrlhf.errors import UserError

CHECKPOINTS = "checkpoints"
"""Of a run's checkpoints, inside its folder."""

OWN = (
    CHECKPOINTS,
    "handover",
    "metrics.csv",
    "samples.jsonl",
    "self_checks.txt",
    "reference_logprobs.safetensors",
    "config.yaml",
)
"""What a fit writes into its folder."""

LENGTH = ("trainer.max_epochs", "trainer.limit_train_batches", "trainer.max_time")
"""May change between two launches: a finished run then goes on."""

FREE = ("micro_batch_size", "gradient_checkpointing", "val_batch_size", "num_workers", "val_limit")
"""Settings of model and data that change memory and speed, or what is looked at, but not what is learned."""


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when it is whole; a fault or a kill leaves the old one.

    Args:
        folder: to write; one that is there is replaced at the end.
    """
    for left in folder.parent.glob(f"{escape(folder.name)}.*.part"):  # of a process that was killed
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    scratch, old = (folder.with_name(f"{folder.name}{ending}.{os.getpid()}.part") for ending in ("", ".old"))
    for left in (scratch, old):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.is_dir():
            folder.rename(old)
        scratch.rename(folder)
    finally:
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def clear(run: Path) -> None:
    """Remove what an earlier fit wrote."""
    for name in OWN:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_other_run(values: dict[str, Any], run: Path) -> bool:
    """Compare a config with the one that the run in this folder was started with.

    Args:
        values: the resolved config of this launch.
        run: the run folder.

    Returns:
        Whether the two train equally long.

    Raises:
        UserError: a setting differs that decides what is learned.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds checkpoints and no config.yaml; start over with --fresh, or give --ckpt_path.")
    there, here = _flat(yaml.safe_load(path.read_text())), _flat(values)
    changed = sorted(key for key in there | here if there.get(key) != here.get(key))
    refused = [key for key in changed if _matters(key)]
    if refused:
        told = "; ".join(f"{key}: {_short(there.get(key))}, now {_short(here.get(key))}" for key in refused[:5])
        raise UserError(
            f"{run} holds a run with other settings ({told}); go on with its own, choose another "
            "trainer.default_root_dir, or start over with --fresh."
        )
    return not any(key in LENGTH for key in changed)


def _matters(key: str) -> bool:
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    return key == "trainer.callbacks" or (first in ("model", "data", "seed_everything") and last not in FREE)


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; how often the run is saved does not make it another run."""
    if key == "trainer.callbacks":
        listed = values if isinstance(values, list) else [values] if values else []
        own = [c for c in listed if not str(c.get("class_path", "")).endswith(("Checkpoints", "ModelCheckpoint"))]
        return {key: own}
    if not isinstance(values, dict) or not values:
        return {key: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{key}.{name}" if key else name)
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
