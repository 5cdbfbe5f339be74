"""What a config names on disk, and the sentence for what is not there: nothing is imported to say so."""

import re
from glob import glob
from pathlib import Path

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


def manifest(folder: str | Path) -> Path:
    """The manifest of a hand-over folder.

    Raises:
        UserError: no folder, or no manifest in it.
    """
    path = Path(folder).expanduser() / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} is no hand-over folder (no manifest.json in it); run the stage before first.")
    return path
