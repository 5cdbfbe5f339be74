"""Who may import whom: arrows point down, and each big dependency has one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lrlhf"
FILES = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}


def imports(path: Path, *, typing: bool = False) -> set[str]:
    """Modules that a file imports at any depth; those under `if TYPE_CHECKING` only when asked for."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not typing:
            skipped |= {id(child) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def importers(package: str) -> set[str]:
    return {n for n, p in FILES.items() if any(i == package or i.startswith(package + ".") for i in imports(p))}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("functional/")])
def test_functional_imports_torch_and_nothing_else(name):
    allowed = {"torch", "math", "hashlib", "collections", "typing", "lrlhf"}
    found = imports(FILES[name])
    assert {i.split(".")[0] for i in found} <= allowed
    assert all(i.startswith("lrlhf.functional") for i in found if i.startswith("lrlhf"))


@pytest.mark.parametrize(
    ("package", "homes"),
    [("peft", {"adapters.py"}), ("vaderSentiment", {"rewards.py"}), ("bitsandbytes", {"quantization.py"})],
)
def test_each_big_dependency_has_one_home(package, homes):
    assert importers(package) == homes


def test_modules_and_data_modules_meet_in_batch_types_alone():
    assert not {n for n in importers("lrlhf.datamodules") if n.startswith(("modules/", "callbacks/"))}
    assert not {n for n in importers("lrlhf.modules") if n.startswith(("datamodules/", "callbacks/", "functional/"))}
    assert not {n for n in importers("lrlhf.backbone") if n.startswith("datamodules/")}


def test_only_the_command_line_knows_the_command_line():
    above = {"cli.py", "align.py", "comparison.py", "planning/command.py", "planning/rehearsal.py"}
    assert importers("lrlhf.lightning_cli") | importers("lrlhf.cli") <= above
