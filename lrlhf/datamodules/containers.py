"""Files to records: JSON, JSON lines, CSV, parquet and saved `datasets`, alone or many together, compressed or not."""

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from lrlhf.errors import UserError

READABLE = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Endings of data files; those of text may be followed by one of COMPRESSED."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def ending(path: Path) -> str:
    """What a data file is, by its name, whatever it is compressed by."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def data_files(source: str) -> list[Path] | None:
    """The files of a data source; None where it is the id of a hub data set (owner/name).

    A folder that `datasets.save_to_disk` wrote comes as it is, another as the data files in it, in their order.

    Raises:
        UserError: there is no such file, or none in the folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return [path]
        found = sorted(file for file in path.iterdir() if ending(file) in READABLE)
        if not found:
            raise UserError(f"data {source} is a folder without data files ({', '.join(READABLE)}); name a file.")
        return found
    if path.exists():
        return [path]
    if re.search(r"[*?]|\[.*\]", source):
        found = sorted(map(Path, glob(str(path))))
        if not found:
            raise UserError(f"data {source}: no file matches.")
        return found
    if path.suffix or source.count("/") != 1:
        raise UserError(f"data file {source} does not exist.")
    return None


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
        rows = csv.DictReader(_lines(path, name, encoding, ""), delimiter="," if kind == ".csv" else "\t")
        yield from enumerate((_cells(row) for row in rows), start=1)
    elif kind in (".json", ".jsonl"):
        yield from _json_records(_lines(path, name, encoding, "\n"), name)
    else:
        raise UserError(f"data file {name}: unknown ending {path.suffix!r}; use {', '.join(READABLE)}.")


def _lines(path: Path, name: str, encoding: str, newline: str) -> Iterator[str]:
    """Lines with their ends as they are read, unpacked and decoded, without byte-order marks.

    Args:
        path: of the file.
        name: of the file in messages.
        encoding: where no byte-order mark says another.
        newline: as `open` takes it.
    """
    try:
        with _unpacked(path) as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                encoding = "utf-16"
        with _unpacked(path) as file:
            for line in io.TextIOWrapper(file, encoding, newline=newline):
                yield line.replace("\ufeff", "")
    except UnicodeDecodeError:
        raise UserError(
            f"{name}, row {_undecodable(path, encoding)}: not valid {encoding}; name its encoding by data.encoding."
        ) from None
    except LookupError:
        raise UserError(f"data.encoding={encoding}: there is no such encoding; cp1252 and latin-1 are usual.") from None
    except Exception as error:  # every way of packing has errors of its own
        raise UserError(f"{name} could not be unpacked ({error}).") from None


def _unpacked(path: Path) -> Any:
    import fsspec

    return fsspec.open(str(path), "rb", compression="infer")


def _undecodable(path: Path, encoding: str) -> int:
    """The first line, from 1, that cannot be decoded."""
    with _unpacked(path) as file:
        raw = file.read()
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        return raw[: error.start].count(b"\n") + 1
    return 1


def _json_records(lines: Iterator[str], name: str) -> Records:
    """Of a list, which is read whole, or of lines, one after the other."""
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    for number, line in itertools.islice(filled, 1):
        if line.lstrip().startswith("["):
            yield from _json_list("\n" * (number - 1) + line + "".join(lines), name)
            return
        others = list(filled) if not _is_json(line) else filled
        if isinstance(others, list) and others and _is_json(line + "".join(line for _, line in others)):
            raise UserError(f"{name}: expected a JSON list of rows, or a row a line, got one object.")
        for place, text in itertools.chain([(number, line)], others):
            try:
                yield place, json.loads(text)
            except json.JSONDecodeError as error:
                yield place, BadRow(f"not valid JSON ({error})")


def _json_list(text: str, name: str) -> Records:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON ({error}).") from None
    yield from enumerate(records, start=1)


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
    yield from enumerate(_hub_data(source), start=1)


def _hub_data(source: str) -> Any:
    import datasets

    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(f"data set {source} is no local file and could not be loaded from the hub{offline}.") from error


def digest_of(source: str) -> str:
    """A hash of everything that `read_records` would read, and of the names of its files.

    Args:
        source: path, pattern, folder, or id.

    Raises:
        UserError: no such file.
    """
    if data_files(source) is None:
        return str(_hub_data(source)._fingerprint)
    digest = hashlib.sha256()
    for path in _plain_files(source):
        digest.update(f"{path}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def size_of(source: str) -> int:
    """Bytes of the files that `read_records` would read; of a hub data set, many.

    Args:
        source: path, pattern, folder, or id.

    Raises:
        UserError: no such file.
    """
    return 2**40 if data_files(source) is None else sum(path.stat().st_size for path in _plain_files(source))


def _plain_files(source: str) -> list[Path]:
    """The files of a source that lies on this machine, those in saved `datasets` too."""
    found = [sorted(path.rglob("*.*")) if path.is_dir() else [path] for path in data_files(source) or ()]
    return [path for paths in found for path in paths if path.is_file()]
