"""What a file is made of is read as what it is: JSON, lines, tables, many files, packed or not."""

import bz2
import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lrlhf.datamodules.containers import BadRow, read_records
from lrlhf.datamodules.formats import read_rows
from lrlhf.errors import UserError

ROWS = [{"instruction": "Grüß 007", "output": "NA"}, {"instruction": 'say "hi",\nplease', "output": "hi"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(delimiter: str) -> bytes:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, ["instruction", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": LINES.encode(),
    "blank.jsonl": ("\n" + LINES + "\n  \n").encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "wide.jsonl": LINES.encode("utf-16"),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "marked_list.json": json.dumps(ROWS).encode("utf-8-sig"),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "rows.parquet": parquet(ROWS),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.jsonl.zst": zstandard.compress(LINES.encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(table(",")),
}


def records(source: Path | str, **options) -> list:
    return [record for _, record in read_records(str(source), **options)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_what_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert records(tmp_path / name) == ROWS


def test_two_files_joined_with_their_byte_order_marks(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES.encode("utf-8-sig") * 2)
    assert records(tmp_path / "rows.jsonl") == ROWS * 2


@pytest.mark.parametrize("source", [".", "*.jsonl", "part-[0-9].jsonl"])
def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path, source):
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"instruction": f"from {number}"}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    found = list(read_records(str(tmp_path / source)))
    assert [record["instruction"] for _, record in found] == ["from 0", "from 1", "from 2"]
    assert found[1][0] == f"{tmp_path}/part-1.jsonl, row 1"


def test_sharded_parquet(tmp_path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"train-{number:05d}-of-00002.parquet").write_bytes(parquet([row]))
    assert records(tmp_path) == records(tmp_path / "train-*.parquet") == ROWS


def test_what_datasets_saved(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"a": saved, "b": saved}).save_to_disk(tmp_path / "neither")
    assert records(tmp_path / "one") == records(tmp_path / "both") == ROWS
    assert records(tmp_path / "both/test") == ROWS[:1]
    with pytest.raises(UserError, match="holds the splits a, b; name the folder of one"):
        records(tmp_path / "neither")


def test_other_encodings_are_named_by_a_setting(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" + LINES.encode("latin-1"))
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: not valid utf-8; name its encoding by data\.encoding"):
        records(tmp_path / "rows.jsonl")
    assert records(tmp_path / "rows.jsonl", encoding="latin-1") == [{}, *ROWS]
    with pytest.raises(UserError, match="data.encoding=klingon: there is no such encoding"):
        records(tmp_path / "rows.jsonl", encoding="klingon")


def test_a_line_that_is_no_json_is_one_bad_row_among_others(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES + "{oops\n" + LINES)
    found = list(read_records(str(tmp_path / "rows.jsonl")))
    assert [isinstance(record, BadRow) for _, record in found] == [False, False, True, False, False]
    assert found[2][0].endswith("row 3")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl.gz", b"not packed", "could not be unpacked"),
        ("rows.parquet", b"PAR1 no", "not a parquet file"),
        ("rows.json", b"[1, 2", "not valid JSON"),
        ("rows.json", b'{\n"data": []\n}', "expected a JSON list of rows, or a row a line, got one object"),
        ("rows.xls", b"x", "unknown ending '.xls'; use .json, .jsonl, .csv, .tsv, .parquet"),
        ("rows.csv", b"instruction,output\na,b,c\n", "row 1: it has more cells than the first line has names"),
        ("rows.csv", b"instruction,output\na\n", "row 1: it has fewer cells"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(str(tmp_path / name)))
    assert words in str(error.value)
    assert name in str(error.value)


def test_cells_of_a_table_are_text_and_empty_ones_are_nothing(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output_1,output_2,preference,input\n1,007,NA,2,\n")
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    assert (row.instruction, row.responses, row.input) == ("1", ("NA", "007"), "")
