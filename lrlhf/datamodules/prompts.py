"""How a row becomes the text that a model reads: a template is anything with `render(row)` and a `fingerprint`."""

import hashlib
import string
from abc import ABC, abstractmethod
from typing import Any

from lrlhf.datamodules.formats import BadRow, Row
from lrlhf.errors import UserError


class Template(ABC):
    """Renders the prompt of a row. Subclass it for a format of your own; the response follows the text directly."""

    adds_special_tokens = True
    """Whether the tokenizer adds its begin-of-sequence token to the text."""

    @abstractmethod
    def render(self, row: Row, tokenizer: Any) -> str:
        """The prompt's text."""

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
        if len(row.messages) != 1:
            raise BadRow("several turns or a system message need data.template: lrlhf.datamodules.ChatTemplate")
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
        turns = [{"role": role, "content": content} for role, content in row.messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    @property
    def signature(self) -> str:
        """The tokenizer's fingerprint covers the template's text."""
        return "chat"
