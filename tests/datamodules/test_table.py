"""Token tables: what the disk gives back is what was read, and only while nothing that decides it has changed."""

import json
import multiprocessing
import os
import pickle
import signal
import warnings
from pathlib import Path

import pytest

from lrlhf import AlpacaDataModule, TextTemplate
from lrlhf.datamodules import table
from lrlhf.errors import UserError
from tests.conftest import write_jsonl

BARE = TextTemplate("{instruction}")


class MyTemplate(TextTemplate):
    pass


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder where tables of any size are kept."""
    monkeypatch.setenv("LRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "WORTH_KEEPING", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def written(monkeypatch):
    """How many tables were written."""
    calls, write = [], table.write
    monkeypatch.setattr(table, "write", lambda *args: (calls.append(args), write(*args)))
    return calls


@pytest.fixture
def rows(tmp_path):
    said = [{"instruction": f"say {i}", "output": "ja" * i, "id": [i]} for i in range(1, 11)]
    return str(write_jsonl(tmp_path / "rows.jsonl", said))


def load(train, tokenizer, template=BARE, **settings) -> AlpacaDataModule:
    data = AlpacaDataModule(train=train, tokenizer=tokenizer, template=template, batch_size=2, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("fit")
    return data


def folders(kept: Path) -> list[str]:
    return sorted(path.name for path in kept.iterdir() if path.is_dir()) if kept.exists() else []


def test_a_table_that_is_found_again_gives_the_rows_that_were_read(kept, written, rows, tiny_llama):
    first = load(rows, tiny_llama).rows["train"][:]
    again = load(rows, tiny_llama).rows["train"][:]
    assert len(written) == 1
    assert again == first
    assert [(row.text, row.columns["id"], len(row.responses[0])) for row in first] == [
        (f"say {i}", [i], 2 * i + 1) for i in range(1, 11)
    ]


def test_rows_of_two_chunks_are_the_rows_of_one(monkeypatch, rows, tiny_llama):
    whole = load(rows, tiny_llama).rows["train"][:]
    monkeypatch.setattr(table, "CHUNK", 3)
    parts = load(rows, tiny_llama).rows["train"]
    assert parts[:] == whole
    assert list(parts.lengths) == [len(row.prompt) + len(row.responses[0]) for row in whole]


def test_small_files_are_not_kept(kept, monkeypatch, rows, tiny_llama):
    monkeypatch.setattr(table, "WORTH_KEEPING", Path(rows).stat().st_size + 1)
    load(rows, tiny_llama)
    assert not folders(kept)


def test_a_template_that_is_not_ours_is_read_anew_each_time(kept, written, rows, tiny_llama):
    for _ in range(2):
        load(rows, tiny_llama, template=MyTemplate("{instruction}"))
    assert (len(written), folders(kept)) == (2, [])


def test_what_decides_a_row_decides_which_table_is_taken(kept, rows, tiny_llama, tmp_path):
    """Each change below has a table of its own, with the rows of that change."""

    def said(**settings):
        row = load(**{"train": rows, "tokenizer": tiny_llama} | settings).rows["train"][0]
        return row.text, len(row.responses[0])

    assert said() == ("say 1", 3)
    assert said(template=TextTemplate("Q: {instruction}")) == ("Q: say 1", 3)
    assert said(columns={"output": "instruction", "instruction": "output"}) == ("ja", 6)
    assert said(train=[rows, rows]) == ("say 1", 3)
    assert load(rows, tiny_llama, task="prompts").rows["train"][0].responses == ()
    assert len(folders(kept)) == 5
    old = Path(rows).stat()
    Path(rows).write_text(Path(rows).read_text().replace("say", "ask"))
    os.utime(rows, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert said() == ("ask 1", 3)
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in Path(tiny_llama).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    saved = json.loads((other / "tokenizer.json").read_text())
    saved["normalizer"] = {"type": "Lowercase"} if saved["normalizer"] is None else None
    (other / "tokenizer.json").write_text(json.dumps(saved))
    said(tokenizer=str(other))
    assert len(folders(kept)) == 7


def test_limits_and_splits_share_one_table(kept, written, rows, tiny_llama):
    short = load(rows, tiny_llama, max_response_tokens=5).rows["train"]
    part = load(rows, tiny_llama, splits={"a": 4, "b": None}, train_split="a", limit=3).rows["train"]
    assert (len(short), len(part), len(written)) == (2, 3, 1)


def test_bad_rows_are_told_again_by_a_table_that_was_found(kept, written, tmp_path, tiny_llama):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}, {"output": "c"}]))
    skipped = [load(rows, tiny_llama, on_bad_row="skip").dropped["bad rows"] for _ in range(2)]
    assert (skipped, len(written)) == ([1, 1], 1)
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: "):
        load(rows, tiny_llama)


def test_columns_come_back_as_json_can_hold_them(kept, tmp_path, tiny_llama):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    columns = {"instruction": ["a"], "output": ["b"], "day": [datetime.date(2026, 1, 2)], "n": [[1.5]]}
    pyarrow.parquet.write_table(pa.table(columns), path)
    (row,) = load(str(path), tiny_llama).rows["train"]
    assert {name: row.columns[name] for name in ("day", "n")} == {"day": "2026-01-02", "n": [1.5]}


def test_a_view_travels_to_other_processes(kept, rows, tiny_llama):
    view = load(rows, tiny_llama).rows["train"]
    assert pickle.loads(pickle.dumps(view))[:] == view[:]
    scratch = load(rows, tiny_llama, template=MyTemplate("{instruction}"), num_workers=1)
    assert sum(len(batch) for batch in scratch.train_dataloader()) == 10


def killed_while_writing(rows, tokenizer, cache):
    os.environ["LRLHF_CACHE"], table.WORTH_KEEPING = cache, 0
    dumps = json.dumps
    table.json.dumps = lambda value, **kw: (
        os.kill(os.getpid(), signal.SIGKILL) if "bad" in value else dumps(value, **kw)
    )
    load(rows, tokenizer)


def test_a_kill_while_a_table_is_written_leaves_none_that_is_read(kept, written, rows, tiny_llama):
    process = multiprocessing.get_context("spawn").Process(
        target=killed_while_writing, args=(rows, tiny_llama, str(kept.parent))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name.endswith(".part") for name in folders(kept)] == [True]
    assert len(load(rows, tiny_llama).rows["train"]) == 10
    assert [name.endswith(".part") for name in folders(kept)] == [False]


def test_a_cache_folder_that_cannot_be_written_is_named(kept, rows, tiny_llama):
    kept.parent.write_text("a file")
    with pytest.raises(UserError, match=r"could not be written .*set \$LRLHF_CACHE"):
        load(rows, tiny_llama)
