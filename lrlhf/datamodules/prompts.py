"""How a row becomes the text that a model reads: a template is anything with `render(row)` and a `fingerprint`."""

import hashlib
import json
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from lrlhf.datamodules.containers import BadRow
from lrlhf.datamodules.formats import Row
from lrlhf.errors import UserError
from lrlhf.model.pretrained import end_of_turn


class Template(ABC):
    """Renders the prompt of a row. Subclass it for a format of your own; the response follows the text directly."""

    adds_special_tokens = True
    """Whether the tokenizer adds its begin-of-sequence token to the text."""

    @abstractmethod
    def render(self, row: Row, tokenizer: Any) -> str:
        """The prompt's text.

        Args:
            row: of the data.
            tokenizer: of the base.
        """

    def end_id(self, tokenizer: Any) -> int:
        """The token that ends a response."""
        return tokenizer.eos_token_id

    @property
    @abstractmethod
    def signature(self) -> str:
        """Text that differs between any two templates that render differently."""

    @property
    def fingerprint(self) -> str:
        """A hash that hand-over manifests compare."""
        return hashlib.sha256(f"{type(self).__name__}{self.signature}".encode()).hexdigest()[:16]


class TextTemplate(Template):
    """A format string with {instruction}, and another with {instruction} and {input}, for single-turn rows."""

    def __init__(self, without_input: str, with_input: str | None = None):
        """Args: without_input: for rows whose input is empty; with_input: for the others (default: joined)."""
        for name, text, allowed in (
            ("without_input", without_input, {"instruction"}),
            ("with_input", with_input or without_input, {"instruction", "input"}),
        ):
            try:
                found = {key for _, key, _, _ in string.Formatter().parse(text) if key is not None}
            except ValueError as error:
                raise UserError(f"template.{name} is no format string ({error}).") from None
            if "instruction" not in found or found - allowed:
                raise UserError(
                    f"template.{name} must use {{instruction}} and may use {sorted(allowed)}; it uses {sorted(found)}."
                )
        self.without_input = without_input
        self.with_input = with_input

    def render(self, row: Row, tokenizer: Any) -> str:
        """The instruction, with the input where there is one."""
        if len(row.messages) != 1 or row.tools:
            raise BadRow("several turns, a system message or tools need data.template: lrlhf.datamodules.ChatTemplate")
        if row.input and self.with_input is not None:
            return self.with_input.format(instruction=row.instruction, input=row.input)
        return self.without_input.format(instruction=row.messages[0][1])

    @property
    def signature(self) -> str:
        """Both strings."""
        return f"{self.without_input}\0{self.with_input}"


class AlpacaTemplate(TextTemplate):
    """The two prompts of Stanford Alpaca, which AlpacaFarm and arXiv 2309.09055 use."""

    def __init__(self):
        super().__init__(
            without_input="Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:",
            with_input="Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
            "\n\n### Input:\n{input}\n\n### Response:",
        )


class ChatTemplate(Template):
    """The tokenizer's own chat template, with the generation prompt; takes any number of turns."""

    adds_special_tokens = False

    def render(self, row: Row, tokenizer: Any) -> str:
        """All turns, then the header of the assistant's."""
        if tokenizer.chat_template is None:
            raise UserError("data.template: this tokenizer has no chat template; use AlpacaTemplate or TextTemplate.")
        turns = [{"role": turn[0], "content": turn[1], **(turn[2] if len(turn) > 2 else {})} for turn in row.messages]
        options: Any = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = tokenizer.apply_chat_template(turns, tools=list(row.tools) or None, **options)
            if row.tools and text == tokenizer.apply_chat_template(turns, **options):
                raise BadRow("the chat template of this tokenizer says nothing of tools; drop the column")
        except (TemplateError, TypeError) as error:
            raise BadRow(f"the chat template does not take these turns ({error})") from None
        return text

    def end_id(self, tokenizer: Any) -> int:
        """What the template writes at the end of the assistant's turn."""
        return end_of_turn(tokenizer)

    @property
    def signature(self) -> str:
        """The tokenizer's fingerprint covers the template's text."""
        return "chat"


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that a tokenizer takes for special tokens, wherever they stand."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def encode_prompts(
    template: Template, rows: Sequence[Row], tokenizer: Any, special: list[str]
) -> list[tuple[str, list[int]] | BadRow]:
    """Many rows rendered, and their token ids by `encode_prompt`, which the tokenizer makes together.

    Args:
        template: of the prompts.
        rows: with the texts that people wrote.
        tokenizer: of the base.
        special: its `special_tokens`.

    Returns:
        For each row its text and its token ids, or the reason why it cannot be used.
    """

    def alone(row: Row) -> tuple[str, list[int] | None] | BadRow:
        try:
            text = template.render(row, tokenizer)
            plain = not row.tools and not _spell_special(row, special)
            return text, None if plain else encode_prompt(template, row, text, tokenizer, special)
        except BadRow as error:
            return error

    found = [alone(row) for row in rows]
    texts = [prompt[0] for prompt in found if not isinstance(prompt, BadRow) and prompt[1] is None]
    together = iter(tokenizer(texts, add_special_tokens=template.adds_special_tokens)["input_ids"] if texts else ())
    return [
        prompt if isinstance(prompt, BadRow) else (prompt[0], next(together) if prompt[1] is None else prompt[1])
        for prompt in found
    ]


def encode_prompt(template: Template, row: Row, text: str, tokenizer: Any, special: list[str]) -> list[int]:
    """Token ids of a rendered prompt: special tokens are the template's alone, never what somebody typed.

    Args:
        template: that rendered `text`.
        row: with the texts that people wrote.
        text: the rendered prompt.
        tokenizer: of the base.
        special: its `special_tokens`.

    Raises:
        BadRow: its tools hold what this tokenizer takes for a special token.
    """
    tools = json.dumps(row.tools, ensure_ascii=False)
    if any(token in tools for token in special):
        raise BadRow("tools holds text that this tokenizer takes for a special token")
    if not _spell_special(row, special):
        return tokenizer(text, add_special_tokens=template.adds_special_tokens)["input_ids"]
    written = _written(row)
    marks = [f"\ue000{i}\ue001" for i in range(len(written))]
    turns = [(turn[0], mark, *turn[2:]) for turn, mark in zip(row.messages, marks[2:], strict=True)]
    marked = replace(row, messages=tuple(turns), instruction=marks[0], input=row.input and marks[1])
    ids: list[int] = []
    for piece in re.split("(\ue000\\d+\ue001)", template.render(marked, tokenizer)):
        typed = piece in marks
        said = written[marks.index(piece)] if typed else piece
        first = template.adds_special_tokens and not ids
        ids += tokenizer(said, add_special_tokens=first, split_special_tokens=typed)["input_ids"]
    return ids


def _written(row: Row) -> list[str]:
    """The texts of a prompt that people wrote."""
    return [row.instruction, row.input, *(turn[1] for turn in row.messages)]


def _spell_special(row: Row, special: list[str]) -> bool:
    """Whether one of them holds what the tokenizer takes for a special token."""
    return any(token in said for said in _written(row) for token in special)


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts in which what looks like a special token is text.

    Args:
        texts: to encode.
        tokenizer: of the base.
    """
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
