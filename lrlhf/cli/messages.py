"""jsonargparse's reports as one sentence: the key it is about, and the reason that says most."""

import re
import textwrap
from itertools import takewhile

WORDING = (
    (r"(?:Option|Subcommand '\w+' does not accept option) '([^']+)'.*", r"config key \1: there is no such key"),
    (r"[Uu]nrecognized arguments: (--?[^\s=]+).*", r"unknown option \1; lrlhf COMMAND --help lists them"),
    (r"[Uu]nrecognized arguments: (.*)", r"unexpected argument \1"),
    (r"(?:File does not exist|Path is not a file): '(.*)'", r"there is no config file \1"),
    (r"Problem with given class_path '(.*?)': (.*)", r"class_path \1 cannot be used (\2)"),
    (r"Type .* expects a function or a callable class: (.*)\. Got value: (.*)", r"\2 cannot be imported (\1)"),
    (r"Expected an? (.*)\. Got value: (.*)", r"expected \1, got \2"),
    (r"the following arguments are required: (.*)", r"\1 must be given"),
    (r"Import path does not correspond to a subclass of (\w+)", r"expected the class path of a \1"),
)
"""What jsonargparse says, and what we say."""

TYPES = (
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"NoneType", "null"),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"dot import path string: [^,\s]+", "an import path"),
)
"""The same for the names of types, wherever they stand."""


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
    telling = [reason for reason in reasons if not re.match("Expected an? |Not a valid subclass", reason)]
    value = rest.splitlines()[-1].partition("Given value: ")[2]
    if telling and telling[0].startswith("Type ") and "Got value" not in telling[0]:
        return one_sentence(f"{telling[0].strip().rstrip('.')}. Got value: {value}")
    if telling:
        return one_sentence(telling[0])
    kinds = [re.sub("^(Expected an?|Not a valid) ", "", reason.splitlines()[0]) for reason in reasons]
    return f"expected {' or '.join(kinds)}, got {textwrap.shorten(value, 80)}"
