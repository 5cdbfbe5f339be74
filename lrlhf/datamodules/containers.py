"""Files to records: JSON, JSON lines, CSV, parquet and saved `datasets`, alone or many together, compressed or not."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrlhf.errors import UserError
from lrlhf.paths import READABLE, data_files, ending


class BadRow(ValueError):
    """A row that cannot be used, with the reason; `read_rows` adds the place."""


Records = Iterator[tuple[int, Any]]
"""Row numbers, from 1, with the record, or with the BadRow that says why there is none."""


def read_records(source: str, encoding: str = "utf-8") -> Iterator[tuple[str, Any]]:
    """The records of a file, of all files of a folder or pattern, or of a hub data set, each with its place.

    Args:
        source: path, pattern such as data/*.jsonl, folder, or id ("owner/name", or "owner/name:split").
        encoding: of text files that say nothing else by a byte-order mark.

    Raises:
        UserError: no such file, or one that is not what its ending says.
    """
    files = data_files(source)
    for path in files if files is not None else [None]:
        name = source if path is None or (files == [path] and not Path(source).expanduser().is_dir()) else str(path)
        for number, record in _hub_records(source) if path is None else _file_records(path, name, encoding):
            yield f"{name}, row {number}", record


def _file_records(path: Path, name: str, encoding: str) -> Records:
    if path.is_dir():
        yield from _saved_records(path, name)
        return
    kind = ending(path)
    if kind == ".parquet":
        yield from _parquet_records(path, name)
    elif kind in (".csv", ".tsv"):
        rows = csv.DictReader(
            io.StringIO(_text(path, name, encoding), newline=""), delimiter="," if kind == ".csv" else "\t"
        )
        yield from enumerate((_cells(row) for row in rows), start=1)
    elif kind in (".json", ".jsonl"):
        text = _text(path, name, encoding)
        yield from _json_list(text, name) if text.lstrip().startswith("[") else _json_lines(text, name)
    else:
        raise UserError(f"data file {name}: unknown ending {path.suffix!r}; use {', '.join(READABLE)}.")


def _text(path: Path, name: str, encoding: str) -> str:
    """The whole file, unpacked and decoded, without a byte-order mark."""
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            raw = file.read()
    except (OSError, EOFError, ValueError, ImportError) as error:
        raise UserError(f"{name} could not be unpacked ({error}).") from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        return raw.decode(encoding).replace("\ufeff", "")
    except UnicodeDecodeError as error:
        row = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, row {row}: not valid {encoding}; name its encoding by data.encoding.") from None
    except LookupError:
        raise UserError(f"data.encoding={encoding}: there is no such encoding; cp1252 and latin-1 are usual.") from None


def _json_list(text: str, name: str) -> Records:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON ({error}).") from None
    yield from enumerate(records, start=1)


def _json_lines(text: str, name: str) -> Records:
    lines = text.split("\n")
    if len(lines) > 1 and _is_json(text) and not _is_json(lines[0]):
        raise UserError(f"{name}: expected a JSON list of rows, or a row a line, got one object.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, BadRow(f"not valid JSON ({error})")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _cells(row: dict[Any, Any]) -> Any:
    """Text stays text; an empty cell is no value."""
    if None in row or None in row.values():
        return BadRow(f"it has {'more' if None in row else 'fewer'} cells than the first line has names")
    return {name: cell for name, cell in row.items() if cell != ""}


def _parquet_records(path: Path, name: str) -> Records:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name}: not a parquet file ({error}).") from None


def _saved_records(path: Path, name: str) -> Records:
    """Of a folder that `datasets.save_to_disk` wrote."""
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found and len(found) > 1:
            raise UserError(f"data {name} holds the splits {', '.join(found)}; name the folder of one, in it.")
        found = found.get("train", next(iter(found.values())))
    yield from enumerate(found, start=1)


def _hub_records(source: str) -> Records:
    import datasets

    name, _, split = source.partition(":")
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(f"data set {source} is no local file and could not be loaded from the hub{offline}.") from error
    yield from enumerate(found, start=1)
