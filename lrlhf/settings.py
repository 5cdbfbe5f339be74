"""What a user wrote in a config file: its keys, and the names that it imports."""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lrlhf.errors import UserError


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
