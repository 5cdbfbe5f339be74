"""What a user wrote in a config file: its keys, and the names that it imports."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from lrlhf.cli.signatures import TRAINER, defaults_of, fault, of_text, refusal, settings_of
from lrlhf.errors import UserError
from lrlhf.paths import data_files, manifest

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


def check_configs(arguments: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """What can be said of the files after --config, and of settings as options, before anything slow is imported.

    Returns:
        of model and data, if there is any, the class ("" if none is named) and what it is made with.

    Raises:
        UserError: a file that is missing or no YAML, a key that no run or no class has, or a value that its class
            refuses whatever the others are.
    """
    kinds: dict[str, Any] = {"trainer": TRAINER}
    together: dict[str, dict[str, Any]] = {}
    for where, part, kind, settings in _given(arguments):
        kinds[part] = "" if kind == "null" else kind or kinds.get(part, "")
        _check_value(where, kinds[part], settings)
        together[part] = _merged(together.get(part, {}), settings if isinstance(settings, dict) else {})
    return {part: (kinds[part], settings) for part, settings in together.items() if part != "trainer"}


def check_run(command: str, arguments: Sequence[str]) -> None:
    """As `check_configs`, and what can be said of all settings of model and data together.

    For `plan` a module must be named, and no more: neither data nor earlier stages need be there.

    Raises:
        UserError: settings that contradict each other, or a data file or hand-over folder that is not there.
    """
    given = check_configs(arguments)
    if any(re.match(r"-h$|--(\w+\.)*help\b", word) for word in arguments):
        return
    if not given.get("model", ("",))[0] and not _other_configs(arguments):
        first = "fit" if command in ("validate", "test", "predict") else command
        raise UserError(
            f"{command}: config key model names no module, such as class_path: lrlhf.SFT; a first command is "
            f"lrlhf {first} --config configs/demo/sft.yaml."
        )
    if command == "plan" or any(re.match(r"--(\w+\.)*print_config\b", word) for word in arguments):
        return
    for kind, together in given.values():
        known = settings_of(kind) or ()
        settings = {key: _parsed(value) for key, value in together.items() if key in known}
        if told := fault(kind, defaults_of(kind) | settings):
            raise UserError(told)
        for key in ("sft", "reward_model"):
            for folder in _listed(settings.get(key)):
                manifest(folder)
        for key in ("train", "val") if command in ("fit", "verify-resume") else ():
            for source in _listed(settings.get(key)):
                data_files(source)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any, Any]]:
    """What each file and option says of trainer, model and data, in their order.

    Yields:
        how a message about it begins, the part, its class if it is named there, and settings.
    """
    for option, value in _options(arguments):
        path, (part, *keys) = Path(value).expanduser(), option.split(".")
        if part in ("--model", "--data", "--trainer") and not keys:
            _refuse_no_settings(f"config key {part[2:]}", part[2:], value)
        if part in ("--model", "--data") and keys in ([], ["class_path"]):
            yield "", part[2:], value, None
        elif part in ("--model", "--data", "--trainer") and keys != ["help"] and not option.endswith("+"):
            setting: Any = value
            for key in reversed([key for key in keys if key != "init_args"]):
                setting = {key: setting}
            yield f"config key {part[2:]}.", part[2:], None, setting
        elif option in ("--config", "-c") and (path.is_file() or path.suffix in (".yaml", ".yml")):
            values = read_yaml(path, "keys such as trainer, model and data")
            _check_keys(f"{path}: config key ", values, RUN_KEYS, RUN_KEYS + LIGHTNING_KEYS)
            for part in [part for part in ("model", "data", "trainer") if part in values]:
                inner = "null" if values[part] is None else values[part]
                if isinstance(inner, dict):
                    settings = inner.get("init_args", inner)
                    yield f"{path}: config key {part}.", part, inner.get("class_path"), settings
                else:
                    _refuse_no_settings(f"{path}: config key {part}", part, inner)
                    yield "", part, inner, None


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word with the one behind it, --name=value as two."""
    return pairwise([word for argument in arguments for word in argument.split("=", 1)])


def _other_configs(arguments: Sequence[str]) -> bool:
    """Whether a --config is something that was not looked into, for the parser to judge."""
    return any(
        name in ("--config", "-c") and not Path(value).expanduser().is_file() for name, value in _options(arguments)
    )


def _refuse_no_settings(where: str, part: str, value: Any) -> None:
    """Of model and data a class may stand alone; the trainer has settings and no class."""
    if part == "trainer" and not str(value).startswith("{"):
        raise UserError(f"{where}: expected settings, such as accelerator: cpu, got {value}.")
    if part != "trainer" and not isinstance(value, str):
        raise UserError(f"{where}: expected class_path and init_args, got {value}.")


def _read(value: Any) -> Any:
    """A value as YAML means it, where it may have come as the text of an option."""
    return of_text(value) if isinstance(value, str) else value


def _parsed(value: Any) -> Any:
    """As `_read`, of a setting that is no free text: a list or keys may have come as text too."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value  # the parser says what is wrong with it
    return _read(value)


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Settings and later ones; an option may set one key of several."""
    both = {key: value for key, value in after.items() if isinstance(value, dict) and isinstance(before.get(key), dict)}
    return before | after | {key: _merged(before[key], value) for key, value in both.items()}


def _listed(value: Any) -> list[str]:
    """The texts of a setting that may be null, one text or several."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


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
        if told := fault(kind, {key: _read(inner)}):
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
