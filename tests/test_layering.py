"""Who may import whom: arrows point down, no circle even for types, and each big dependency has one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lrlhf"
FILES = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}

FLOORS = (
    ("__main__",),
    ("doctor",),
    ("study",),
    ("align", "memory", "export", "chat"),
    ("report",),
    ("evaluation",),
    ("cli",),
    ("callbacks",),
    ("modules", "datamodules"),
    ("run",),
    ("model",),
    ("kernels", "functional", "config", "types", "metrics", "distributed", "rewards", "errors", "files", "__init__"),
)
"""Rooms from the roof down: each may import what lies below it, itself, and nothing beside it but on the ground."""

HOMES = {
    "peft": {"model/adapters.py"},
    "bitsandbytes": {"model/quantization.py"},
    "lightning.pytorch.cli": {"cli/lightning.py"},
    "matplotlib": {"report/drawing.py"},
    "plotly": {"report/page.py"},
    "rich": {"report/report.py", "evaluation/command.py", "chat.py"},
    "statsmodels": {"evaluation/seeds.py"},
    "submitit": {"study/command.py"},
    "gguf": {"export/gguf_file.py"},
    "openai": {"evaluation/endpoint.py"},
    "sklearn": {"evaluation/win_rate.py"},
    "choix": {"evaluation/win_rate.py"},
    "vaderSentiment": {"rewards/functions.py"},
    "math_verify": {"rewards/functions.py"},
    "transformers": {"model", "kernels/install.py", "modules/base.py", "memory/rehearsal.py", "doctor/checks.py"},
}
"""Where a big dependency may be imported: files, or whole rooms."""


def imports(path: Path) -> set[str]:
    """Modules and names that a file imports, at any depth and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def files_imported(name: str) -> set[str]:
    """Files of lrlhf that a file of it imports."""
    found = set()
    for imported in imports(FILES[name]):
        parts = imported.split(".")[1:] if imported.split(".")[0] == "lrlhf" else []
        for end in range(len(parts), 0, -1):
            path = "/".join(parts[:end])
            if hit := next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in FILES), None):
                found.add(hit)
                break
    return found - {name}


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_what_lies_below_it(name):
    ground = len(FLOORS) - 1
    above = {
        other
        for other in files_imported(name)
        if room(other) != room(name) and (floor(other) < floor(name) or floor(other) == floor(name) < ground)
    }
    assert not above


def test_no_files_import_each_other_in_a_circle_not_even_for_types():
    graph = {name: files_imported(name) for name in FILES}
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("functional/")])
def test_functional_imports_torch_and_nothing_else(name):
    allowed = {"torch", "math", "hashlib", "collections", "typing", "lrlhf"}
    assert {i.split(".")[0] for i in imports(FILES[name])} <= allowed
    assert all(other.startswith("functional/") for other in files_imported(name))


@pytest.mark.parametrize(("package", "homes"), HOMES.items())
def test_each_big_dependency_has_one_home(package, homes):
    users = {n for n in FILES if any(i == package or i.startswith(f"{package}.") for i in imports(FILES[n]))}
    assert {n for n in users if n not in homes and room(n) not in homes} == set()
    assert users


def test_settings_need_no_torch():
    assert not any(i.split(".")[0] in ("torch", "transformers", "lightning") for i in imports(FILES["config.py"]))
