"""What a language model must be able to do to judge, to split and to verify."""

from collections.abc import Sequence
from typing import Protocol

Messages = list[dict[str, str]]
"""A chat: {"role": "system" | "user" | "assistant", "content": text}."""


class LanguageModel(Protocol):
    """Answers prompts. A prompt that it cannot answer gives None, never an exception and never a guess."""

    name: str
    """For annotations and reports."""

    def complete(self, prompts: Sequence[Messages], max_tokens: int) -> list[str | None]:
        """Greedy answers.

        Args:
            prompts: N chats.
            max_tokens: of an answer.
        """

    def choose(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[list[float] | None]:
        """The probability of each choice as the first token of an answer, of all choices together 1.

        Args:
            prompts: N chats.
            choices: C words, whose first tokens differ.

        Returns:
            N lists of C probabilities.
        """

    def notes(self) -> list[str]:
        """Sentences about what it did: prompts without an answer, tokens, cost."""
