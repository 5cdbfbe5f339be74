"""What a config can tell lrlhf's classes and Lightning's trainer, read from their source: importing takes seconds."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from lrlhf import _HOMES
from lrlhf.errors import UserError

PACKAGE = Path(__file__).parents[1]
TRAINER = "lightning.Trainer"
CHECKING = ("__init__", "__post_init__", "_refuse_bad_settings")
"""Methods in which a class of lrlhf looks at its own settings."""


def settings_of(class_path: str) -> dict[str, str] | None:
    """Names and annotations of what a public class is made with; None where its source does not tell.

    Args:
        class_path: lrlhf.PPOPolicy, or PPOPolicy, or lightning.Trainer.
    """
    found = ("Trainer", _trainer()) if class_path == TRAINER else _public(class_path)
    arguments = _arguments(*found) if found else None
    if found is None or arguments is None:
        return None
    return {name: _annotation(annotation, found[1]) for name, (annotation, _) in arguments.items()}


def defaults_of(class_path: str) -> dict[str, Any]:
    """The settings that a public class of lrlhf can do without, each as it is or, where that needs imports, `...`."""
    found = _public(class_path)
    arguments = (_arguments(*found) if found else None) or {}
    return {name: _constant(default) for name, (_, default) in arguments.items() if default is not None}


def refusal(annotation: str, value: Any) -> str | None:
    """What was expected instead of a value from a config; None where it fits, or where nobody can tell without imports.

    Args:
        annotation: such as int | None, or Literal['a', 'b'].
        value: of YAML.
    """
    kinds = _kinds(ast.parse(annotation or "Any", mode="eval").body)
    if any(_may_be(kind, value) for kind in kinds):
        return None
    return " or ".join(_told(kind) for kind in kinds)


def fault(class_path: str, settings: dict[str, Any]) -> str | None:
    """What a class of lrlhf says of settings when it is made; None where it takes them, or needs others to tell.

    Args:
        class_path: lrlhf.LoRA, or LoRA.
        settings: one, some or all of its settings, values of YAML, numbers as such.
    """
    found = _public(class_path)
    for check, names in _checks(*found) if found else ():
        scope = {"UserError": UserError, "self": SimpleNamespace(**settings), **settings, **names}
        try:
            exec(compile(ast.Module([check], []), "<check>", "exec"), scope)
        except UserError as error:
            return str(error)
        except Exception:
            continue  # it needs what only the class has
    return None


def _public(class_path: str) -> tuple[str, dict[str, ast.stmt]] | None:
    """Its name and what its home defines, if it is lrlhf's."""
    package, _, name = class_path.rpartition(".")
    if package.split(".")[0] not in ("", "lrlhf") or name not in _HOMES:
        return None
    return name, _home(_HOMES[name])


def _checks(name: str, classes: dict[str, ast.stmt]) -> Iterator[tuple[ast.stmt, dict[str, Any]]]:
    """Each `if ...: raise ...` of its checking methods, and of its base class's, with the variable of a loop around.

    A loop over settings, whose values nobody knows yet, comes whole.
    """
    node = classes.get(name)
    if not isinstance(node, ast.ClassDef):
        return
    for method in [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in CHECKING]:
        for statement in method.body:
            loops: list[dict[str, Any]] = [{}]
            body = [statement]
            if isinstance(statement, ast.For) and isinstance(statement.iter, ast.Tuple):
                words = [word.value for word in statement.iter.elts if isinstance(word, ast.Constant)]
                loops, body = [{ast.unparse(statement.target): word} for word in words], statement.body
            checks = [node for node in body if _raises(node)]
            yield from ((check, names) for names in loops for check in checks)
    for base in node.bases:
        yield from _checks(ast.unparse(base), classes)


def _raises(node: ast.stmt) -> bool:
    if isinstance(node, ast.For):
        return all(map(_raises, node.body))
    return isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)


Argument = tuple[ast.expr | None, ast.expr | None]
"""Annotation and default."""


def _arguments(name: str, classes: dict[str, ast.stmt]) -> dict[str, Argument] | None:
    """What __init__ takes, of its base class too where it passes on **kwargs, or the fields of a dataclass."""
    node = classes.get(name)
    if not isinstance(node, ast.ClassDef):
        return None
    makes = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    if makes:
        own = makes[0].args
        names = own.args[1:] + own.kwonlyargs
        required: list[ast.expr | None] = [None] * (len(own.args) - 1 - len(own.defaults))
        defaults = [*required, *own.defaults, *own.kw_defaults]
        found = {a.arg: (a.annotation, default) for a, default in zip(names, defaults, strict=True)}
        above = _arguments(ast.unparse(node.bases[0]), classes) if own.kwarg and node.bases else {}
        return None if above is None else found | above
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    return {ast.unparse(f.target): (f.annotation, f.value) for f in node.body if isinstance(f, ast.AnnAssign)}


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...


def _annotation(node: ast.expr | None, names: dict[str, ast.stmt]) -> str:
    """As written, with a name for a Literal replaced by it."""
    alias = names.get(node.id) if isinstance(node, ast.Name) else None
    if isinstance(alias, ast.Assign) and ast.unparse(alias.value).startswith("Literal["):
        node = alias.value
    return ast.unparse(node) if node else ""


@cache
def _home(module: str) -> dict[str, ast.stmt]:
    """Classes and names of a module of lrlhf, or of all modules of a package in it and of those that these share."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    paths = [*sorted(path.glob("*.py")), PACKAGE / "config.py"] if path.is_dir() else [path.with_suffix(".py")]
    return {name: node for path in paths for name, node in _names(path).items()}


@cache
def _trainer() -> dict[str, ast.stmt]:
    spec = find_spec("lightning")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / "pytorch/trainer/trainer.py" if places else None
    return _names(path) if path and path.is_file() else {}


def _names(path: Path) -> dict[str, ast.stmt]:
    """Classes and assignments on the top level of a file, by name."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _kinds(node: ast.expr) -> list[ast.expr]:
    """The members of a union."""
    if isinstance(node, ast.BinOp):
        return _kinds(node.left) + _kinds(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Union", "Optional"):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        none = [ast.Constant(None)] if ast.unparse(node.value) == "Optional" else []
        return [kind for member in members for kind in _kinds(member)] + none
    return [node]


def _may_be(kind: ast.expr, value: Any) -> bool:
    """Whether a parser might take the value for this kind; numbers and truths may come as text."""
    name = ast.unparse(kind.value if isinstance(kind, ast.Subscript) else kind)
    if isinstance(value, str) and name in ("int", "float", "bool", "None"):
        value = of_text(value)
    if name == "None":
        return value is None
    if name in ("int", "float"):
        return isinstance(value, int) or (isinstance(value, float) and (name == "float" or value.is_integer()))
    if name == "bool":
        return isinstance(value, bool)
    if name == "Literal":
        return str(value) in map(str, _members(kind))
    if name in ("list", "dict"):
        return isinstance(value, list | str if name == "list" else dict | str)
    if name == "str":
        return not isinstance(value, list | dict | None)
    return True


def of_text(text: str) -> Any:
    """The number, truth or null that a text stands for, or the text."""
    try:
        number = float(text)
        return int(number) if number.is_integer() else number
    except ValueError:
        return yaml.safe_load(text) if text.isidentifier() else text


def _members(literal: Any) -> tuple[Any, ...]:
    found = ast.literal_eval(literal.slice)
    return found if isinstance(found, tuple) else (found,)


def _told(kind: ast.expr) -> str:
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Literal":
        return f"one of {', '.join(map(repr, _members(kind)))}"
    return {"None": "null"}.get(text := ast.unparse(kind), text)
