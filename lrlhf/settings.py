"""What a user wrote in a config file: its keys, and the names that it imports."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from lrlhf.errors import UserError
from lrlhf.signatures import TRAINER, fault, of_text, refusal, settings_of

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
    """What can be said of the files after --config, and of settings as options, before anything slow is imported.

    Raises:
        UserError: a file that is missing or no YAML, a key that no run or no class has, or a value that its class
            refuses whatever the others are.
    """
    kinds: dict[str, Any] = {"trainer": TRAINER}
    for option, value in pairwise([word for argument in arguments for word in argument.split("=", 1)]):
        path, (part, *keys) = Path(value), option.split(".")
        if part in ("--model", "--data") and keys in ([], ["class_path"]):
            kinds[part[2:]] = value
        elif part in ("--model", "--data", "--trainer") and keys != ["help"] and not option.endswith("+"):
            setting: Any = value
            for key in reversed([key for key in keys if key != "init_args"]):
                setting = {key: setting}
            _check_value(f"config key {part[2:]}.", kinds.get(part[2:]), setting)
        elif option in ("--config", "-c") and (path.is_file() or path.suffix in (".yaml", ".yml")):
            _check_file(path, kinds)


def _check_file(path: Path, kinds: dict[str, Any]) -> None:
    keys = read_yaml(path, "keys such as trainer, model and data")
    _check_keys(f"{path}: config key ", keys, RUN_KEYS, RUN_KEYS + LIGHTNING_KEYS)
    for part in ("model", "data", "trainer"):
        value = keys.get(part)
        if isinstance(value, dict):
            kinds[part] = value.get("class_path", kinds.get(part))
            _check_value(f"{path}: config key {part}.", kinds[part], value.get("init_args", value))


def _check_value(where: str, kind: Any, value: Any) -> None:
    """Whether a class takes the settings in a value, and the same of the values in it.

    Args:
        where: begins the message.
        kind: the class, where the value itself names none.
        value: settings, or {class_path, init_args}, or a list of them; anything else is not looked at.
    """
    for item in value if isinstance(value, list) else ():
        _check_value(where, kind, item)
    if isinstance(value, dict) and "class_path" in value:
        kind, value = value["class_path"], value.get("init_args")
    settings = settings_of(kind) if isinstance(kind, str) else None
    if settings is None or not isinstance(value, dict):
        return
    _check_keys(where, value, tuple(settings), tuple(settings))
    file = where.partition("config key ")[0]
    for key, inner in value.items():
        annotation = settings.get(key, "")
        if expected := refusal(annotation, inner):
            raise UserError(f"{where}{key}: expected {expected}, got {shorten(str(inner), 80)}.")
        if told := fault(kind, key, of_text(inner) if isinstance(inner, str) else inner):
            raise UserError(f"{file}{told}")
        for name in re.findall(r"\w+", annotation):
            _check_value(f"{where}{key}.", name, inner)


def _check_keys(where: str, keys: Iterable[Any], told: tuple[str, ...], known: tuple[str, ...]) -> None:
    for key in keys:
        if str(key).split(".")[0].removesuffix("+") not in known:
            near = get_close_matches(str(key), told, 1)
            hint = f"the nearest is {near[0]}." if near else f"there are {', '.join(told)}."
            raise UserError(f"{where}{key}: there is no such key; {hint}")


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
