"""What a config names on disk, and the sentence for what is not there: nothing is imported to say so."""

from pathlib import Path

from lrlhf.errors import UserError


def data_file(source: str) -> Path | None:
    """The file of a data source; None where it is the id of a hub data set (owner/name).

    Raises:
        UserError: there is no such file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"data file {source} is a folder; name the file in it.")
    if path.exists():
        return path
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
