"""Rows as token ids in an Arrow file, which is written once and mapped into memory from then on.

So a data set takes as little memory as the rows that are in use, however large it is, and starts at once the second
time.
"""

import hashlib
import json
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from lrlhf.datamodules.collate import Tokenized
from lrlhf.datamodules.containers import BadRow, digest_of, size_of
from lrlhf.datamodules.formats import Reading, Row, read_rows
from lrlhf.datamodules.prompts import Template, encode_prompts, encode_texts, special_tokens
from lrlhf.datamodules.splits import split_key
from lrlhf.distributed import rank
from lrlhf.errors import UserError
from lrlhf.model.pretrained import cache_folder

CHUNK = 4096
"""Rows that are tokenised and written together."""
WORTH_KEEPING = 2**20
"""Bytes of data files from which their token ids are kept on the disk; smaller ones are tokenised in a moment."""
NEEDS = {1: "the sft task needs an output", 2: "the preference task needs two responses and a preference"}
FINE, BAD, EMPTY = range(3)
"""What a row of a table is: fit for use; bad, for a reason; without a response that says anything."""
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("margin", pa.float64()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("dataset", pa.string()),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("columns", pa.string()),
        ("place", pa.string()),
        ("record", pa.int64()),
        ("key", pa.uint64()),
        ("prompt_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("state", pa.int8()),
        ("reason", pa.string()),
    ]
)
"""`record` numbers the rows of the files, of which a conversation makes several here; `response_tokens` is the longest
response; `columns` is JSON, and what JSON cannot hold is in it as its text."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what is in a table.

    responses: how many a row needs. every_turn: whether each turn of the assistant becomes a row of its own.
    """

    sources: tuple[str, ...]
    reading: Reading
    template: Template
    tokenizer: Any
    responses: int
    every_turn: bool = False

    def key(self) -> str | None:
        """A hash of it, of the contents of its files and of the code that reads them.

        Returns:
            None where a table is not to be kept: small files, and templates and tokenizers whose code is not ours and
            may change from run to run.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        ours = type(self.template).__module__.startswith("lrlhf.")
        if backend is None or not ours or sum(map(size_of, self.sources)) < WORTH_KEEPING:
            return None
        parts = [
            *((source, digest_of(source)) for source in self.sources),
            (self.reading, self.template.fingerprint, self.template.end_id(self.tokenizer)),
            (self.responses, self.every_turn, self.tokenizer.chat_template, special_tokens(self.tokenizer)),
            (backend.to_str(), version("tokenizers"), version("transformers")),
            [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))],
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class TokenTable:
    """The rows of a recipe.

    Args:
        folder: that `write` wrote.
        scratch: removes the folder together with this object; None keeps it.
    """

    def __init__(self, folder: Path, scratch: tempfile.TemporaryDirectory | None = None):
        self.folder, self._scratch = folder, scratch
        self.notes: dict[str, Any] = json.loads((folder / "notes.json").read_text())
        """left_out: [source, reason, count] of rows that say nothing; bad: [place, reason] of rows that could not be
        read; remarks about the files."""
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        self._chunks = [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def __reduce__(self) -> Any:
        return TokenTable, (self.folder,)

    def column(self, name: str) -> np.ndarray:
        """All values of a column of numbers, [N].

        Args:
            name: of the column.
        """
        return np.concatenate(
            [SCHEMA.empty_table()[name].to_numpy(), *(chunk[name].to_numpy() for chunk in self._chunks)]
        )

    def row(self, place: int) -> dict[str, Any]:
        """One row, by the names of its columns.

        Args:
            place: its number, from 0.
        """
        return self._chunks[place // CHUNK].slice(place % CHUNK, 1).to_pylist()[0]


class View(Sequence[Tokenized]):
    """Some rows of a table, in an order, each made when it is asked for.

    Args:
        table: with the rows.
        places: [N] int64, which of them.
    """

    def __init__(self, table: TokenTable, places: np.ndarray):
        self.table, self.places = table, places

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the prompt and the longest response, [N] int32."""
        return (self.table.column("prompt_tokens") + self.table.column("response_tokens"))[self.places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Tokenized: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tokenized]: ...
    def __getitem__(self, number: int | slice) -> Tokenized | list[Tokenized]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self.table.row(int(self.places[number]))
        return Tokenized(
            row["prompt"],
            tuple(row["responses"]),
            row["margin"],
            row["text"],
            {"instruction": row["instruction"], "dataset": row["dataset"]},
            tuple(row["turns"]),
            json.loads(row["columns"]),
            row["place"],
            range(len(self))[number],
        )


def token_table(recipe: Recipe, bad: Callable[[str, str], None]) -> TokenTable:
    """The table of a recipe: from the cache folder, else tokenised now.

    Args:
        recipe: of the table.
        bad: takes the place and the reason of each row that cannot be read; raises to stop there.

    Raises:
        UserError: files that cannot be read, or a cache folder that cannot be written.
    """
    key = recipe.key()
    if key is None:
        scratch = tempfile.TemporaryDirectory(prefix="lrlhf-", ignore_cleanup_errors=True)
        write(recipe, Path(scratch.name), bad)
        return TokenTable(Path(scratch.name), scratch)
    folder = cache_folder() / "tokens" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                write(recipe, part, bad)
                part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder.parent} could not be written ({error.strerror}); set $LRLHF_CACHE.") from error
    return TokenTable(folder)


def write(recipe: Recipe, folder: Path, bad: Callable[[str, str], None]) -> None:
    """Read, render and tokenise all rows of a recipe.

    Args:
        recipe: of the table.
        folder: to write into; it exists.
        bad: takes the place and the reason of each row that cannot be read; raises to stop there.
    """
    notes: dict[str, Any] = {"left_out": [], "bad": [], "remarks": []}
    hashes, kept = array("Q"), Counter[str]()

    def skip(place: str, reason: str) -> None:
        bad(place, reason)
        notes["bad"].append((place, reason))

    def numbered_rows() -> Iterator[tuple[int, int, Row]]:
        for source in recipe.sources:
            counts: Counter[tuple[str, str]] = Counter()
            for row in read_rows(source, counts, recipe.reading, bad=skip, say=notes["remarks"].append):
                number, key = len(hashes), split_key(row)
                hashes.append(hash_of(row))
                kept["responses that repeat the prompt"] += row.messages[-1][1] in row.responses
                kept["pairs scored against"] += recipe.reading.margin_from_scores and row.margin < 0
                yield from ((number, key, part) for part in (row.assistant_turns() if recipe.every_turn else [row]))
            notes["left_out"] += [(*what, count) for what, count in counts.items()]

    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        rows = iter(tqdm(numbered_rows(), desc="tokenising", unit=" rows", delay=5, disable=rank() > 0))
        while chunk := list(islice(rows, CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(list(_tokenise(chunk, recipe)), schema=SCHEMA))
    kept = Counter({"rows twice": len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64)))}) + kept
    if told := ", ".join(f"{count} {what}" for what, count in kept.items() if count):
        notes["remarks"].append(f"{', '.join(recipe.sources)}: kept {told}")
    (folder / "notes.json").write_text(json.dumps(notes))


def hash_of(row: Row) -> int:
    """64 bits of a hash of what a row says."""
    said = repr((row.messages, row.responses)).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


def _tokenise(rows: Sequence[tuple[int, int, Row]], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What a table says of rows, each with its number and its `split_key`."""
    tokenizer, need = recipe.tokenizer, recipe.responses
    prompts = encode_prompts(recipe.template, [row for _, _, row in rows], tokenizer, special_tokens(tokenizer))
    answers = iter(encode_texts([text for _, _, row in rows for text in row.responses[:need]], tokenizer))
    end = recipe.template.end_id(tokenizer)
    for (number, key, row), prompt in zip(rows, prompts, strict=True):
        responses = [[*next(answers), end] for _ in row.responses[:need]]
        text, ids = ("", []) if isinstance(prompt, BadRow) else prompt
        reason = None
        if len(responses) < need:
            reason = NEEDS[need]
        elif isinstance(prompt, BadRow):
            reason = str(prompt)
        elif not ids:
            reason = "the prompt has no tokens"
        empty = need == 1 and reason is None and not row.responses[0].strip()
        yield {
            "prompt": ids,
            "responses": responses,
            "margin": row.margin,
            "text": text,
            "instruction": row.messages[-1][1],
            "dataset": row.dataset,
            "turns": [{"role": turn[0], "content": turn[1]} for turn in row.messages],
            "columns": json.dumps(row.columns, default=str),
            "place": row.place,
            "record": number,
            "key": key,
            "prompt_tokens": len(ids),
            "response_tokens": max(map(len, responses), default=0),
            "state": BAD if reason else EMPTY if empty else FINE,
            "reason": reason,
        }
