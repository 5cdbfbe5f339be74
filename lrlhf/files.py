"""Files that are written whole or not at all: a fault or a kill leaves the one that was there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without a fault.

    Args:
        path: of the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.unlink(missing_ok=True)
    yield scratch
    scratch.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON in UTF-8.

    Args:
        path: of the file; its folder is made.
        value: of what JSON knows, and dataclasses.
    """
    with whole(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=asdict) + "\n", encoding="utf-8")
