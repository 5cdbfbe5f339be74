"""What the documents name exists."""

import re
from pathlib import Path

import pytest

import lrlhf
import lrlhf.functional

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_file_that_a_document_names_exists(path):
    for name in re.findall(r"(?:configs|docs|demo/data)/[\w./-]+\.(?:yaml|md|jsonl|png)", path.read_text()):
        assert (ROOT / name).is_file() or "NAME" in name, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_public_name_that_a_document_uses_exists(path):
    for name in re.findall(r"\blrlhf\.([A-Z]\w+)", path.read_text()):
        assert hasattr(lrlhf, name), name
    for name in re.findall(r"\blrlhf\.functional\.([a-z_]+)\b", path.read_text()):
        assert hasattr(lrlhf.functional, name), name


def test_the_swap_in_the_readme_runs(tmp_path, tiny_llama, data_files, monkeypatch):
    """The Python block of the README, on the tiny model."""
    code = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Trainer" in b)
    code = code.replace("runs/mine", str(tmp_path)).replace("demo/data/prompts.jsonl", data_files["prompts"])
    code = re.sub(r'base_model="[^"]+"', f'base_model="{tiny_llama}"', code).replace(
        "smollm2-135m-instruct", tiny_llama
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "handover/manifest.json").is_file()
