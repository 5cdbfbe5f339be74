"""What a user wrote in a config file: its keys, and the names that it imports."""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lrlhf.errors import UserError

RUN_KEYS = ("trainer", "model", "data", "seed_everything", "ckpt_path", "fresh")
"""Top-level keys that a stage's config is written with."""
LIGHTNING_KEYS = ("optimizer", "lr_scheduler", "weights_only", "verbose", "return_predictions")
"""Others that Lightning knows, and writes into a run's config.yaml."""


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The keys of a config file.

    Raises:
        UserError: no such file, or one that holds no YAML or no keys.
    """
    if not path.is_file():
        raise UserError(f"there is no config file {path}.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())  # type: ignore
        raise UserError(f"{path}: not valid YAML ({where}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {expected}, got {type(values).__name__}.")
    return values


def check_configs(arguments: Sequence[str]) -> None:
    """What can be said of the files after --config before anything slow is imported.

    Raises:
        UserError: a file that is missing, is no YAML, or has a key that no run has.
    """
    for option, value in pairwise([word for argument in arguments for word in argument.split("=", 1)]):
        path = Path(value)
        if option in ("--config", "-c") and (path.is_file() or path.suffix in (".yaml", ".yml")):
            keys = read_yaml(path, "keys such as trainer, model and data")
            unknown = sorted(str(key) for key in keys if key not in RUN_KEYS + LIGHTNING_KEYS)
            if unknown:
                raise UserError(
                    f"{path}: config key {unknown[0]}: there is no such key; there are {', '.join(RUN_KEYS)}."
                )


def import_function(path: str) -> Any:
    """A function by import path.

    Raises:
        UserError: there is none.
    """
    name, _, attribute = path.rpartition(".")
    try:
        return getattr(import_module(name), attribute)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{path} cannot be imported; give the import path of a function.") from None
