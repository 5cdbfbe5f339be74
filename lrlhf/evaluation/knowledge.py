"""What is known about a topic: pages cut into passages, in SQLite with full-text search."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from lrlhf.datamodules.containers import BadRow, read_records
from lrlhf.errors import UserError
from lrlhf.files import whole

PASSAGE = 256
"""Words of a passage at most (Min et al. 2023, arXiv 2305.14251, section 4.1, which cuts at 256 tokens)."""


class Knowledge:
    """Passages of pages by title.

    Args:
        source: SQLite file that `build` wrote, or jsonl {title, text} to build one from, beside it, when it changed.

    Raises:
        UserError: no such file, a file of another kind, or a row without title and text.
    """

    def __init__(self, source: str):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"knowledge {source} does not exist; give jsonl with title and text, or a built .sqlite.")
        database = path if path.suffix in (".sqlite", ".db") else path.with_suffix(".sqlite")
        if database != path and not (database.is_file() and database.stat().st_mtime >= path.stat().st_mtime):
            build(str(path), database)
        try:
            self._file = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
            self.pages = self._file.execute("SELECT count(DISTINCT title) FROM passages").fetchone()[0]
        except sqlite3.Error as error:
            raise UserError(
                f"knowledge {database} cannot be read ({error}); build it from jsonl {{title, text}}."
            ) from None

    def has(self, title: str) -> bool:
        """Whether there is a page of this title."""
        return bool(self.passages(title, "", 1))

    def passages(self, title: str, query: str, k: int = 5) -> list[str]:
        """The k passages of a page that match a query best by BM25, then others of the page in their order.

        Args:
            title: of the page, as it stands in the source.
            query: any text; its words are looked for.
            k: passages at most.
        """
        found: dict[int, str] = {}
        name, words = re.findall(r"[^\W_]+", title), dict.fromkeys(re.findall(r"\w+", query.lower()))
        if name and words:  # in quotes FTS5 takes a word for nothing but a word
            wanted = " OR ".join(f'"{word}"' for word in words)
            match = f'title : "{" ".join(name)}" AND text : ({wanted})'
            best = "WHERE passages MATCH ? AND title = ? ORDER BY bm25(passages, 0, 1) LIMIT ?"
            found = dict(self._file.execute(f"SELECT rowid, text FROM passages {best}", (match, title, k)))
        rest = self._file.execute(
            "SELECT p.rowid, p.text FROM passages p JOIN titles t ON p.rowid = t.passage WHERE t.title = ? LIMIT ?",
            (title, k + len(found)),
        )
        return list({**found, **{n: text for n, text in rest if n not in found}}.values())[:k]


def build(source: str, path: Path) -> None:
    """Write a database of a jsonl file {title, text}, whole or not at all.

    Args:
        source: of the pages; text may also be a list of passages, which are kept as they are.
        path: of the database.
    """
    with whole(path) as scratch, closing(sqlite3.connect(scratch)) as file:
        try:
            file.execute("CREATE VIRTUAL TABLE passages USING fts5(title, text)")
        except sqlite3.OperationalError as error:
            raise UserError(
                f"this Python's SQLite has no full-text search ({error}); use another build of Python."
            ) from None
        file.execute("CREATE TABLE titles (title TEXT, passage INTEGER)")
        for place, row in read_records(source):
            if isinstance(row, BadRow):
                raise UserError(f"{place}: {row}.")
            for text in _passages(place, row):
                number = file.execute("INSERT INTO passages VALUES (?, ?)", (row["title"], text)).lastrowid
                file.execute("INSERT INTO titles VALUES (?, ?)", (row["title"], number))
        file.execute("CREATE INDEX by_title ON titles (title)")
        file.commit()


def _passages(place: str, row: object) -> list[str]:
    text = row.get("text") if isinstance(row, dict) else None
    told = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    if not (isinstance(row, dict) and isinstance(row.get("title"), str) and isinstance(text, str | list)):
        raise UserError(f"{place}: expected title and text, got {told}.")
    if isinstance(text, list):
        return [str(passage) for passage in text]
    words = text.split()
    return [" ".join(words[start : start + PASSAGE]) for start in range(0, len(words), PASSAGE)]
