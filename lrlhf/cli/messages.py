"""jsonargparse's reports as one sentence: the key it is about, and the reason that says most."""

import re
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from lrlhf.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

NO_MODULE = (
    "config key model names no module, such as class_path: lrlhf.SFT; a first command is "
    "lrlhf fit --config configs/demo/sft.yaml."
)

WORDING = (
    (
        r"(?:Option|Subcommand '\w+' does not accept option) '([^']+)'(?: is not accepted)?( \(.*\))?",
        r"config key \1: there is no such key\2",
    ),
    (r"Group '([\w.]+)' does not accept option '([^']+)'( \(.*\))?", r"config key \1.\2: there is no such key\3"),
    (r"Not of type \w+: (\S+) does not conform to restriction v(.*)", r"expected a number \2, got \1"),
    (r"Not of type \w+: does not conform to restriction v(.*)\. Got value: (.*)", r"expected a number \1, got \2"),
    (r"Not of type \w+: invalid literal for int\(\) with base 10: '(.*)'", r"expected a whole number, got \1"),
    (r"Not of type \w+: could not convert string to float: '(.*)'", r"expected a number, got \1"),
    (r"Not of type \w+: (.*) does not match regular expression .*", r"expected what --help tells, got \1"),
    (r"Unable to load config '(.*?)' - .*", r"expected settings, such as accelerator: cpu, got \1"),
    (r"Expected list", r"expected a list"),
    (r"the following arguments are required: (?:\w+\.)?model", NO_MODULE.rstrip(".")),
    (
        r"[Uu]nrecognized arguments: (--?[^\s=]+).*?( \(the .*\))?",
        r"unknown option \1\2; lrlhf COMMAND --help lists them",
    ),
    (r"[Uu]nrecognized arguments: (.*)", r"unexpected argument \1"),
    (r"(?:File does not exist|Path is not a file): '(.*)'", r"there is no config file \1"),
    (r"Problem with given class_path '(.*?)': (.*)", r"class_path \1 cannot be used (\2)"),
    (r"Type .* expects a function or a callable class: (.*)\. Got value: (.*)", r"\2 cannot be imported (\1)"),
    (r"Expected an? (.*)\. Got value: (.*)", r"expected \1, got \2"),
    (r"the following arguments are required: (.*)", r"\1 must be given"),
    (
        r"Automatic gradient clipping is not supported.*",
        "trainer.gradient_clip_val does not apply here; set model.max_grad_norm instead",
    ),
    (
        r"Automatic gradient accumulation is not supported.*",
        "trainer.accumulate_grad_batches does not apply here; "
        "data.batch_size is the whole batch and model.micro_batch_size what fits in memory",
    ),
    (r"Import path does not correspond to a subclass of (\w+)", r"expected the class path of a \1"),
)
"""What jsonargparse says, and what we say."""

TYPES = (
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"NoneType", "null"),
    (r" and v(?=[<>])", " and "),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"dot import path string: [^,\s]+", "an import path"),
)
"""The same for the names of types, wherever they stand."""


UNTELLING = r"Expected an? |Not a valid subclass|Not of type \w+: (int|float)\(\) argument"
"""How objections begin that say no more than that a value is of another type."""


class OneSentence:
    """For parsers of jsonargparse: a UserError of one sentence instead of a usage text and a nested report."""

    inner: ArgumentParser | None = None
    """The parser of the one command, where there are commands; it knows the keys."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what jsonargparse would print, with the nearest key to one that does not exist."""
        unknown = re.match(
            r"(?:(?:Subcommand '\w+' does not accept o|O)ption '|[Uu]nrecognized arguments: --)([^\s'=]+)", message
        )
        grouped = re.match(r"Group '([\w.]+)' does not accept option '([^']+)'", message)
        if unknown or grouped:
            key = unknown[1] if unknown else f"{grouped[1]}.{grouped[2]}"  # type: ignore[index]
            parser: Any = self.inner or self
            message = message.rstrip(".") + _nearest(key, parser.get_defaults().keys())
        raise UserError(one_sentence(message)) from ex


class CommandParser(OneSentence, ArgumentParser):
    """Of a command that is no stage of training: --config, --print_config and --help as everywhere.

    jsonargparse makes parsers of the same class, without a command, for what is named by class path.
    """

    def __init__(self, command: str | None = None, description: str | None = None, **options: Any):
        if command is None:
            super().__init__(**options)
            return
        super().__init__(prog=f"lrlhf {command}", description=description, **options)
        self.add_argument("--config", action="config", help="YAML file of these options; several compose")


def _nearest(key: str, known: Iterable[str]) -> str:
    """What the user may have meant, of the keys that a parser knows; as text in brackets, or nothing."""
    known = [name.replace(".init_args", "") for name in known]
    if same := [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]:
        return f" (there is {same[0]})"
    group = ""
    for part in key.split("."):
        names = sorted({name.removeprefix(group).split(".")[0] for name in known if name.startswith(group)})
        if part not in names:
            near = get_close_matches(part, names, 1)
            return f" (the nearest is {near[0]})" if near else f" (there are {', '.join(names)})" if names else ""
        group += f"{part}."
    return ""


def one_sentence(message: str) -> str:
    """What is wrong in a jsonargparse message: the whole key it is about, and the innermost reason."""
    key, text = "", re.sub(r"^\s*- Expected a path but .*\n", "", message, flags=re.MULTILINE).strip()
    if named := re.match(r'Parser key "(.*?)":\s*(?:- )?', text):
        key, text = named[1].removeprefix("config"), text[named.end() :]
    reason = " ".join(_reason(text).split()).rstrip(".")
    for theirs, ours in WORDING:
        reason = re.sub(f"^{theirs}$", ours, reason)
    for theirs, ours in TYPES:
        reason = re.sub(theirs, ours, reason)
    if key and reason.startswith("config key "):
        return reason.replace("config key ", f"config key {key}.", 1) + "."
    return f"config key {key}: {reason}." if key else f"{reason}."


def _reason(text: str) -> str:
    """Of the types that a value could have had, the one whose objection says most."""
    header, found, rest = text.partition("Errors:\n")
    if not found:
        return text
    indent = len(header) - len(header.rstrip(" "))
    inside = takewhile(lambda line: line.startswith(" " * (indent + 1)), rest.splitlines())
    reasons = re.split(r"^- ", textwrap.dedent("\n".join(inside)), flags=re.MULTILINE)[1:]
    telling = [reason for reason in reasons if not re.match(UNTELLING, reason)]
    value = rest.splitlines()[-1].partition("Given value: ")[2]
    if telling and telling[0].startswith(("Type ", "Not of type ")) and "Got value" not in telling[0]:
        return one_sentence(f"{telling[0].strip().rstrip('.')}. Got value: {value}")
    if telling:
        return one_sentence(telling[0])
    kinds = [re.sub("^(Expected an?|Not a valid) ", "", reason.splitlines()[0]) for reason in reasons]
    return f"expected {' or '.join(kinds)}, got {textwrap.shorten(value, 80)}"
