"""Records to rows: the usual layouts, every row checked, every fault named with its place.

| layout | columns |
|---|---|
| Alpaca | instruction, input (or context), output; system and history ([question, answer] pairs) are turns before it |
| other names | prompt, question, query or problem; response, completion, answer or solution |
| pairs | a prompt, and output_1, output_2 (or completion_a, completion_b) with a verdict |
| chosen/rejected | texts or turns behind a prompt (text, turns, messages); or conversations that differ at the end |
| chat | messages: [{role, content}, ...] ending with the assistant |
| ShareGPT | conversations: [{from, value}, ...] ending with gpt, and system; with function_call and observation |
| any chat | tools: descriptions of what may be called, for the chat template |

The verdict of a pair is `preference` or `label`, `preference` as "a-is-better", or the majority of `annotator1`,
`annotator2`, ... Ties carry no preference and are dropped and counted. A column that could be context is used, or its
row is refused; other columns are named once.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lrlhf.datamodules.containers import BadRow, read_records
from lrlhf.errors import UserError

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

PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input")
CONTEXTS = ("input", "context")
CHATS = ("messages", "conversations")
SCORES = ("score_chosen", "score_rejected")
RESPONSES = ("output", "response", "completion", "answer", "solution")
PAIRS = (("chosen", "rejected"), ("output_1", "output_2"), ("completion_a", "completion_b"))
MATTERS = {*PROMPTS, *CONTEXTS, *CHATS, "system", "history", "tools"}
"""Columns that could be context of the response."""

Turn = tuple[Any, ...]
"""(role, content), or (role, content, more) where a turn says more, such as tool_calls."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, whatever its layout was.

    messages are turns (role, content[, more]) that end with the user's; instruction and input are kept where the row
    had them. responses: none (a prompt), one (to imitate), or two (chosen, rejected). columns: all others that hold
    something, as they are, for reward functions. tools: what the assistant may call, as chat templates take it.
    """

    messages: tuple[Turn, ...]
    instruction: str
    input: str
    responses: tuple[str, ...]
    margin: float
    place: str
    dataset: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    def assistant_turns(self) -> Iterator["Row"]:
        """A row for each turn of the assistant that says text, the turns before it as its prompt; the last is this.

        A turn that calls a tool is context, as is one that follows another of the assistant.
        """
        for i, turn in enumerate(self.messages):
            asked = i > 0 and self.messages[i - 1][0] in ("user", "tool")
            if turn[0] == "assistant" and len(turn) == 2 and asked:
                before = self.messages[:i]
                yield replace(self, messages=before, instruction=before[-1][1], input="", responses=(turn[1],))
        yield self


@dataclass(frozen=True)
class Reading:
    """How columns are understood."""

    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns, each with the name that it has in the files."""
    encoding: str = "utf-8"
    """Of text files."""
    verdicts: Literal["from_zero", "from_one"] | None = None
    """Whether verdicts count 0, 1 or 1, 2; None looks at the whole file."""
    margin_from_scores: bool = False
    """Take score_chosen - score_rejected as the margin."""
    good_only: bool = False
    """Of answers that are judged one by one (`label` true or false), take the good ones as demonstrations."""


class LeftOut(Exception):
    """A row that cannot be trained on, for a reason that is counted."""


def refuse(place: str, reason: str) -> None:
    """What happens to a bad row where nobody says otherwise.

    Raises:
        UserError: always.
    """
    raise UserError(f"{place}: {reason}.")


def read_rows(
    source: str,
    counts: Counter | None = None,
    reading: Reading = Reading(),
    *,
    bad: Callable[[str, str], None] = refuse,
    say: Callable[[str], None] = lambda remark: None,
) -> Iterator[Row]:
    """The rows of a file, folder or pattern of files, or hub data set (see `containers`).

    Args:
        source: path, pattern or id.
        counts: by (source, reason), rows that were left out because they say nothing: ties, equal responses.
        reading: how columns are understood.
        bad: takes the place and the reason of a bad row; raises, or lets it be left out.
        say: takes a remark about the whole source: how verdicts were read, which columns were not used.

    Raises:
        UserError: no such file, an unknown layout, or a bad row, with file, row number (from 1) and reason.
    """
    from_zero: bool | None = None
    unused: set[str] = set()
    for place, record in read_records(source, reading.encoding):
        try:
            if isinstance(record, BadRow):
                raise record
            if from_zero is None and _has_verdict(record, reading):
                from_zero = _verdicts_count_from_zero(source, reading, say)
            columns = Columns(record, reading.columns)
            row = _parse(columns, place, reading, bool(from_zero))
            if any(
                re.search("[\ud800-\udfff]", text) for text in (*row.responses, *(turn[1] for turn in row.messages))
            ):
                raise BadRow("a text holds half of a surrogate pair, which is no character")
            unused |= columns.unused()
            yield replace(row, columns=columns.beside())
        except LeftOut as reason:
            if counts is not None:
                counts[source, str(reason)] += 1
        except BadRow as error:
            bad(place, str(error))
    if unused:
        say(f"{source}: columns not used: {', '.join(sorted(unused))}")


class Columns:
    """A record that knows which of its columns were looked at.

    Args:
        record: from a file.
        names: our names of columns, each with the record's own.
    """

    def __init__(self, record: Any, names: dict[str, str]):
        if not isinstance(record, dict):
            raise BadRow(f"expected an object with named columns, got {type(record).__name__}")
        for ours, theirs in names.items():
            if theirs not in record:
                raise BadRow(f"data.columns.{ours}: there is no column {theirs}, only {', '.join(map(str, record))}")
        renamed = set(names.values())
        self.values = {name: value for name, value in record.items() if name not in renamed}
        self.values |= {ours: record[theirs] for ours, theirs in names.items()}
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def given(self, name: str) -> bool:
        """Whether there is something in it."""
        return self.values.get(name) not in (None, "", [], ())

    def take(self, name: str) -> Any:
        """Its value, which counts as used from now on."""
        self.used.add(name)
        return self.values[name]

    def text(self, name: str) -> str:
        """Its text.

        Raises:
            BadRow: it is none.
        """
        value = self.take(name)
        if not isinstance(value, str):
            raise BadRow(f"{name} must be text, got {type(value).__name__}")
        return value

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of several that is given."""
        return next((name for name in names if self.given(name)), None)

    def beside(self) -> dict[str, Any]:
        """What is given beside the prompt: a reward function may ask for it by name."""
        return {str(name): value for name, value in self.values.items() if self.given(name) and name not in MATTERS}

    def unused(self) -> set[str]:
        """Columns with something in them that nobody looked at."""
        return {str(name) for name in self.values if self.given(name)} - self.used


# Layouts


def _parse(columns: Columns, place: str, reading: Reading, from_zero: bool) -> Row:
    sides = _sides(columns, from_zero)
    margin = _margin(columns, reading)
    kind = next((name for name in ("dataset", "subset") if name in columns), None)
    dataset = str(columns.take(kind) or "") if kind else ""
    if sides and isinstance(sides[0], str) and "Human:" in sides[0] and not columns.first((*CHATS, *PROMPTS)):
        messages, answers = _dialogue(*sides)
        return Row(messages, messages[-1][1], "", answers, margin, place, dataset)
    messages, instruction, context = _prompt(columns, needed=not (sides and _are_turns(sides[0])))
    messages = _before(columns, messages)
    responses: tuple[str, ...] = ()
    if sides:
        messages, responses = _answers(sides, messages)
    elif messages and messages[-1][0] == "assistant":
        messages, responses = messages[:-1], (_said(messages[-1]),)
    elif name := next((name for name in RESPONSES if name in columns), None):
        responses = _single(columns, name, reading)
    if not messages or messages[-1][0] not in ("user", "tool"):
        raise BadRow("the turn before the response must be the user's or a tool's")
    parts = [part for part in (instruction, context) if part] or [turn[1] for turn in messages]
    tools = _tools(columns)
    _refuse_lost_context(columns, parts, responses)
    return Row(messages, instruction or messages[-1][1], context, responses, margin, place, dataset, tools=tools)


def _tools(columns: Columns) -> tuple[dict[str, Any], ...]:
    """What may be called: a list of descriptions, or its JSON text."""
    if not columns.given("tools"):
        return ()
    value = columns.take("tools")
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"tools is no valid JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools must be a list of descriptions")
    return tuple(tools)


def _prompt(columns: Columns, needed: bool) -> tuple[tuple[Turn, ...], str, str]:
    """The turns of the prompt; its instruction and input where it has no others."""
    if chat := next((name for name in CHATS if columns.values.get(name) is not None), None):
        return _turns(columns.take(chat), chat), "", ""
    name = columns.first(PROMPTS)
    if name is None and not needed:
        return (), "", ""
    if name is None:
        hint = "; text alone does not say where a response begins" if columns.given("text") else ""
        raise BadRow(f"no instruction, prompt, messages or conversations column, or it is empty{hint}")
    if _are_turns(columns.values[name]):
        return _turns(columns.take(name), name), "", ""
    instruction = columns.text(name)
    other = columns.first(tuple(context for context in CONTEXTS if context != name))
    context = columns.text(other) if other else ""
    return (("user", f"{instruction}\n\n{context}" if context else instruction),), instruction, context


def _before(columns: Columns, messages: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns behind what `system` and `history` say."""
    for pair in reversed(columns.take("history") if columns.given("history") else ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("history must be a list of [question, answer] texts")
        messages = ("user", pair[0]), ("assistant", pair[1]), *messages
    if columns.given("system"):
        system = ("system", columns.text("system"))
        if messages[:1] != (system,):
            messages = (system, *messages)
    if [turn[0] for turn in messages[1:]].count("system"):
        raise BadRow("a system message must come first, and there can be one")
    return messages


def _refuse_lost_context(columns: Columns, parts: list[str], responses: tuple[str, ...]) -> None:
    """A column that could be context must say what the row says already: one of its texts, or all of its prompt.

    Args:
        columns: of the row.
        parts: the texts of its prompt.
        responses: its responses.
    """
    for name in sorted(MATTERS & columns.unused()):
        value = columns.take(name)
        texts = [turn[1] for turn in _turns(value, name)] if _are_turns(value) else [str(value)]
        known = all(text in (*parts, *responses) or all(part in text for part in parts) for text in texts)
        if not known:
            raise BadRow(f"{name} could be context and has no place beside the others; drop it, or set data.columns")


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def _turns(value: Any, column: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} must be a non-empty list of turns")
    return tuple(_turn(turn, f"turn {position} of {column}") for position, turn in enumerate(value, start=1))


def _turn(turn: Any, name: str) -> Turn:
    """One turn; in ShareGPT's words where it, or its column, speaks them."""
    said = turn if isinstance(turn, dict) else {}
    share = "from" in said or (name.endswith(" conversations") and "role" not in said)
    who, what = ("from", "value") if share else ("role", "content")
    more = {key: said[key] for key in ("tool_calls", "tool_call_id", "name") if said.get(key)}
    role, content = said.get(who), said.get(what)
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"{name} must have {who} and {what} as text")
    if role not in ROLES:
        raise BadRow(f"{name} has the unknown role {role!r}")
    return (ROLES[role], content, more) if more else (ROLES[role], content)


def _part(part: Any, name: str) -> str:
    """The text of a part of a turn."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise BadRow(f"{name} has a part of type {part.get('type')!r}; text alone can be used")
    return text


def _said(turn: Turn) -> str:
    if turn[0] != "assistant" or len(turn) > 2:
        raise BadRow("a response must be one turn of the assistant, of text alone")
    return turn[1]


def _single(columns: Columns, name: str, reading: Reading) -> tuple[str, ...]:
    """The response of a row that has one, unless it is judged to be bad."""
    if isinstance(columns.values.get("label"), bool):
        if not reading.good_only:
            raise BadRow(
                f"label judges one {name}, which is no demonstration; set data.good_only: true to imitate the good ones"
            )
        if not columns.take("label"):
            raise LeftOut("responses judged bad")
    if not _are_turns(columns.values[name]):
        return (columns.text(name),)
    if len(turns := _turns(columns.take(name), name)) != 1:
        raise BadRow(f"{name} must be one turn of the assistant")
    return (_said(turns[0]),)


# Pairs


def _sides(columns: Columns, from_zero: bool) -> tuple[Any, Any] | None:
    """What was chosen and what was rejected, texts or turns; None where the row is no pair."""
    for first, second in PAIRS:
        if first in columns or second in columns:
            if first not in columns or second not in columns:
                raise BadRow(f"a pair needs both {first} and {second}")
            pair = tuple(
                columns.take(name) if _are_turns(columns.values[name]) else columns.text(name)
                for name in (first, second)
            )
            if type(pair[0]) is not type(pair[1]):
                raise BadRow(f"{first} and {second} must both be texts, or both lists of turns")
            chosen, rejected = pair if first == "chosen" or _verdict(columns, from_zero) == 1 else pair[::-1]
            if chosen == rejected:
                raise LeftOut("pairs of equal responses")
            return chosen, rejected
    return None


def _answers(sides: tuple[Any, Any], prompt: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[str, str]]:
    """The prompt and the two last turns of conversations that hold the prompt, or not."""
    if isinstance(sides[0], str):
        return prompt, sides
    chosen, rejected = (_turns(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
    shared = chosen[:-1]
    prompt = prompt[:-1] if prompt[-1:] == chosen[-1:] else prompt
    if shared != rejected[:-1]:
        raise BadRow("chosen and rejected must be one conversation with two different last turns")
    if shared and prompt and shared[-len(prompt) :] != prompt and shared != prompt[-len(shared) :]:
        raise BadRow("the turns before the last of chosen are not those of the prompt")
    longer = shared if len(shared) > len(prompt) else prompt
    return longer, (_said(chosen[-1]), _said(rejected[-1]))


def _margin(columns: Columns, reading: Reading) -> float:
    if reading.margin_from_scores:
        scores: list[Any] = [columns.take(name) if name in columns else None for name in SCORES]
        if not all(isinstance(score, int | float) for score in scores):
            raise BadRow("data.margin_from_scores needs numbers in score_chosen and score_rejected")
        return float(scores[0] - scores[1])
    margin = columns.take("margin") if columns.given("margin") else 0.0
    if not isinstance(margin, int | float):
        raise BadRow(f"margin must be a number, got {margin!r}")
    return margin


def _has_verdict(record: Any, reading: Reading) -> bool:
    """Whether a record is a pair of which a verdict says which is better."""
    first = {reading.columns.get(name, name) for name, _ in PAIRS[1:]}
    return isinstance(record, dict) and bool(first & record.keys())


def _verdicts_count_from_zero(source: str, reading: Reading, say: Callable[[str], None]) -> bool:
    """Whether 0 is the first and 1 the second: told, or because the source, read for it, says 0 and never 2."""
    preference, label = (reading.columns.get(name, name) for name in ("preference", "label"))
    records = (record for _, record in read_records(source, reading.encoding) if _has_verdict(record, reading))
    values = {str(record.get(preference, record.get(label))).removesuffix(".0") for record in records}
    if "0" not in values:
        return reading.verdicts == "from_zero"
    from_zero = reading.verdicts == "from_zero" or (reading.verdicts is None and not values & {"2", "1.5"})
    read = "0 the first, 1 the second" if from_zero else "1 the first, 2 the second, 0 a tie"
    say(f"{source}: verdicts are read as {read}; data.verdicts: {'from_one' if from_zero else 'from_zero'} changes it")
    return from_zero


def _verdict(columns: Columns, from_zero: bool) -> int:
    """1 for the first, 2 for the second."""
    votes = [columns.take(name) for name in sorted(map(str, columns.values)) if re.fullmatch(r"annotator\d+", name)]
    if votes:
        if not all(isinstance(vote, int | float | str) for vote in votes):
            raise BadRow(f"annotators' votes must be numbers, got {votes!r}")
        (verdict, count), *others = Counter(votes).most_common()
        if others and others[0][1] == count:
            raise LeftOut("ties")
    elif "preference" in columns or "label" in columns:
        verdict = columns.take("preference" if "preference" in columns else "label")
    else:
        raise BadRow("a pair needs a preference (1 or 2)")
    words = re.match(r"(a|b)-is-(slightly-)?better$|tie$", str(verdict))
    if words:
        verdict = {"a": 1, "b": 2, None: 1.5}[words.group(1)]
    elif from_zero and str(verdict).removesuffix(".0") in ("0", "1", "2"):
        verdict = {"0": 1, "1": 2, "2": 1.5}[str(verdict).removesuffix(".0")]
    if verdict in (0, 1.5, "0", "1.5") and verdict is not False:
        raise LeftOut("ties")
    if verdict not in (1, 2, "1", "2") or verdict is True:
        told = "0 or 1 (2 for a tie)" if from_zero else "1 or 2 (0 or 1.5 for a tie)"
        raise BadRow(f"preference must be {told}, got {verdict!r}")
    return int(verdict)


def _dialogue(chosen: str, rejected: str) -> tuple[tuple[tuple[str, str], ...], tuple[str, str]]:
    """Two whole dialogues as the turns they share and (chosen, rejected): what follows, from the assistant's turn on.

    In a few rows of HH-RLHF the assistant went on to speak for the human; all of that belongs to its response.
    """

    def parse(text: str) -> list[tuple[str, str]]:
        parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip("\n"))
        roles = {"Human": "user", "Assistant": "assistant"}
        return [(roles[who], what.strip()) for who, what in zip(parts[1::2], parts[2::2], strict=True)]

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
