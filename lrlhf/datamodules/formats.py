"""Reading rows: files and hub data sets of the usual layouts, every row checked, every fault named with its place.

| layout | columns |
|---|---|
| Alpaca | instruction, input (optional), output (optional where only prompts are needed) |
| pairs | instruction or prompt, input, and output_1, output_2 (or completion_a, completion_b) with a verdict |
| chosen/rejected | messages, prompt or instruction, with chosen and rejected; or whole "Human: Assistant:" dialogues |
| chat | messages: [{role, content}, ...] ending with the assistant |
| ShareGPT | conversations: [{from, value}, ...] ending with gpt; function_call and observation turns are read too |

The verdict of a pair is `preference` or `label` (1 or 2; 0 or 1.5 is a tie), `preference` as "a-is-better", or the
majority of `annotator1`, `annotator2`, ... Ties carry no preference and are dropped and counted.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrlhf.errors import UserError
from lrlhf.paths import data_file

Record = dict[str, Any]

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Who speaks, in ShareGPT's words and in those of chat templates."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, whatever its layout was.

    messages are (role, content) turns that end with the user's; instruction and input are kept where the row had them.
    responses: none (a prompt), one (to imitate), or two (chosen, rejected).
    """

    messages: tuple[tuple[str, str], ...]
    instruction: str
    input: str
    responses: tuple[str, ...]
    margin: float
    place: str
    dataset: str = ""


class BadRow(ValueError):
    """A row that cannot be used, with the reason; `read_rows` adds the place."""


class Tie(Exception):
    """A pair without a preference."""


def read_rows(source: str, ties: Counter | None = None) -> Iterator[Row]:
    """The rows of a file (.json, .jsonl, .parquet) or of a hub data set ("owner/name", or "owner/name:split").

    Args:
        source: path or id.
        ties: counts the pairs left out because neither response was preferred.

    Raises:
        UserError: no such file, an unknown layout, or a bad row, with file, row number (from 1) and reason.
    """
    for number, record in enumerate(_records(source), start=1):
        place = f"{source}, row {number}"
        try:
            yield _parse(record, place)
        except Tie:
            if ties is not None:
                ties[source] += 1
        except BadRow as error:
            raise UserError(f"{place}: {error}.") from None


def _records(source: str) -> Iterator[Any]:
    path = data_file(source)
    if path is None:
        yield from _hub_records(source)
    elif path.suffix == ".jsonl":
        yield from _json_lines(path, source)
    elif path.suffix == ".json":
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: not valid JSON ({error}).") from None
        if not isinstance(records, list):
            raise UserError(f"{source}: expected a JSON list of rows, got {type(records).__name__}.")
        yield from records
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{source}: not a parquet file ({error}).") from None
    else:
        raise UserError(f"data file {source}: unknown ending {path.suffix!r}; use .json, .jsonl or .parquet.")


def _json_lines(path: Path, source: str) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{source}, row {number}: not valid JSON ({error}).") from None


def _hub_records(source: str) -> Iterator[Any]:
    import datasets

    name, _, split = source.partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(f"data set {source} is no local file and could not be loaded from the hub{offline}.") from error


# Layouts


def _parse(record: Any, place: str) -> Row:
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with named columns, got {type(record).__name__}")
    pair = _pair(record)
    margin = record.get("margin") or 0.0
    if not isinstance(margin, int | float):
        raise BadRow(f"margin must be a number, got {margin!r}")
    if pair and "Human:" in pair[0] and not {"messages", "prompt", "instruction"} & record.keys():
        messages, pair = _dialogue(*pair)
        return Row(messages, messages[-1][1], "", pair, margin, place)
    if "messages" in record or "conversations" in record:
        messages = _turns(record)
        responses = pair
        if not pair and messages[-1][0] == "assistant":
            responses, messages = (messages[-1][1],), messages[:-1]
        if not messages or messages[-1][0] not in ("user", "tool"):
            raise BadRow("the turn before the response must be the user's or a tool's")
        return Row(messages, messages[-1][1], "", responses, margin, place)
    name = next((n for n in ("instruction", "prompt", "input") if _given(record, n)), None)
    if name is None:
        raise BadRow("no instruction, prompt, messages or conversations column, or it is empty")
    instruction = _text(record, name)
    context = _text(record, "input") if name != "input" and record.get("input") else ""
    responses = pair or tuple(_text(record, n) for n in ("output", "response", "completion") if n in record)[:1]
    content = f"{instruction}\n\n{context}" if context else instruction
    return Row((("user", content),), instruction, context, responses, margin, place, str(record.get("dataset") or ""))


def _given(record: Record, name: str) -> bool:
    return name in record and record[name] is not None and record[name] != ""


def _text(record: Record, name: str) -> str:
    value = record[name]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, got {type(value).__name__}")
    return value


def _turns(record: Record) -> tuple[tuple[str, str], ...]:
    share = "conversations" in record
    column, who, what = ("conversations", "from", "value") if share else ("messages", "role", "content")
    turns = record[column]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column} must be a non-empty list of turns")
    messages = []
    for position, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get(what), str) or not isinstance(turn.get(who), str):
            raise BadRow(f"turn {position} of {column} must have {who} and {what} as text")
        role = ROLES.get(turn[who], "")
        if not role:
            raise BadRow(f"turn {position} of {column} has the unknown role {turn[who]!r}")
        messages.append((role, turn[what]))
    return tuple(messages)


def _pair(record: Record) -> tuple[str, ...]:
    """(chosen, rejected), or nothing where the row is no pair."""
    for first, second in (("chosen", "rejected"), ("output_1", "output_2"), ("completion_a", "completion_b")):
        if first in record or second in record:
            if first not in record or second not in record:
                raise BadRow(f"a pair needs both {first} and {second}")
            pair = (_text(record, first), _text(record, second))
            return pair if first == "chosen" or _verdict(record) == 1 else pair[::-1]
    return ()


def _verdict(record: Record) -> int:
    votes = [record[name] for name in sorted(record) if re.fullmatch(r"annotator\d+", name)]
    if votes:
        if not all(isinstance(vote, int | float | str) for vote in votes):
            raise BadRow(f"annotators' votes must be numbers, got {votes!r}")
        (verdict, count), *others = Counter(votes).most_common()
        if others and others[0][1] == count:
            raise Tie
    elif "preference" in record or "label" in record:
        verdict = record["preference"] if "preference" in record else record["label"]
    else:
        raise BadRow("a pair needs a preference (1 or 2)")
    words = re.match(r"(a|b)-is-(slightly-)?better$|tie$", str(verdict))
    if words:
        verdict = {"a": 1, "b": 2, None: 0}[words.group(1)]
    if verdict in (0, 1.5, "0", "1.5") and verdict is not False:
        raise Tie
    if verdict not in (1, 2, "1", "2") or verdict is True:
        raise BadRow(f"preference must be 1 or 2 (0 or 1.5 for a tie), got {verdict!r}")
    return int(verdict)


def _dialogue(chosen: str, rejected: str) -> tuple[tuple[tuple[str, str], ...], tuple[str, str]]:
    """Two whole dialogues as the turns they share and (chosen, rejected): what follows, from the assistant's turn on.

    In a few rows of HH-RLHF the assistant went on to speak for the human; all of that belongs to its response.
    """

    def parse(text: str) -> list[tuple[str, str]]:
        parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip("\n"))
        roles = {"Human": "user", "Assistant": "assistant"}
        return [(roles[who], what.strip()) for who, what in zip(parts[1::2], parts[2::2], strict=True)]

    if chosen == rejected:
        raise Tie
    left, right = parse(chosen), parse(rejected)
    shared = next((i for i, turns in enumerate(zip(left, right, strict=False)) if turns[0] != turns[1]), 0)
    turns = (left[max(shared - 1, 0) : shared], left[shared : shared + 1], right[shared : shared + 1])
    speakers = [role for part in turns for role, _ in part]
    if speakers != ["user", "assistant", "assistant"] or min(len(left), len(right)) != shared + 1:
        raise BadRow("chosen and rejected must be one dialogue with two different last answers")

    def answer(turns: list[tuple[str, str]]) -> str:
        names = {"user": "Human", "assistant": "Assistant"}
        return "\n\n".join([turns[0][1], *(f"{names[who]}: {what}" for who, what in turns[1:])])

    return tuple(left[:shared]), (answer(left[shared:]), answer(right[shared:]))
