"""What lrlhf's classes can be told in a config, read from their source: importing them takes seconds."""

import ast
from functools import cache
from pathlib import Path

from lrlhf import _HOMES

PACKAGE = Path(__file__).parent


def settings_of(class_path: str) -> dict[str, str] | None:
    """Names and annotations of what a public class is made with; None where its source in lrlhf does not tell.

    Args:
        class_path: lrlhf.PPOPolicy, or PPOPolicy.
    """
    package, _, name = class_path.rpartition(".")
    return _settings(name) if package.split(".")[0] in ("", "lrlhf") and name in _HOMES else None


@cache
def _settings(name: str) -> dict[str, str] | None:
    """Arguments of __init__, of its base class too where it passes on **kwargs, or the fields of a dataclass."""
    node = _classes().get(name)
    if node is None:
        return None
    makes = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    if makes:
        own = makes[0].args
        found = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in own.args[1:] + own.kwonlyargs}
        above = _settings(ast.unparse(node.bases[0])) if own.kwarg and node.bases else {}
        return None if above is None else found | above
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    return {f.target.id: ast.unparse(f.annotation) for f in fields}  # type: ignore[union-attr]


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """Every class of the package by name."""
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
