"""A language model in this process, which needs no server."""

from collections.abc import Sequence
from dataclasses import replace

from jsonargparse.typing import PositiveInt

from lrlhf.config import DType, Sampling
from lrlhf.datamodules.prompts import ChatTemplate, TextTemplate
from lrlhf.errors import UserError
from lrlhf.evaluation.language_model import Messages
from lrlhf.evaluation.system import System, prompt_row


class LocalModel:
    """A model in this process: a base model, or what a run handed over. Chats are rendered by its chat template.

    Args:
        model: run folder, hand-over folder, or base model (hub id, folder, GGUF file or short name).
        dtype: of its weights.
        batch_size: prompts of one pass. Memory only.
    """

    def __init__(self, model: str = "smollm2-135m-instruct", dtype: DType | None = None, batch_size: PositiveInt = 8):
        self.name = model
        self.system = System(model, dtype=dtype, batch_size=batch_size)
        self._too_long = 0

    def complete(self, prompts: Sequence[Messages], max_tokens: int) -> list[str | None]:
        """See LanguageModel."""
        greedy = Sampling(max_new_tokens=max_tokens, temperature=0, batch_size=self.system.batch_size)
        places, encoded = self._fitting(prompts, max_tokens)
        return _spread(places, self.system.respond(encoded, greedy), len(prompts))

    def choose(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[list[float] | None]:
        """See LanguageModel.

        Raises:
            UserError: two choices begin with the same token.
        """
        places, encoded = self._fitting(prompts, 1)
        first = [self.system.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in choices]
        if len(set(first)) < len(first):
            raise UserError(f"{self.name}: the choices {', '.join(choices)} do not differ in their first tokens.")
        chosen = self.system.next_token_logits(encoded, first).softmax(-1)
        return _spread(places, chosen.tolist(), len(prompts))

    def notes(self) -> list[str]:
        """How many prompts did not fit."""
        context = f"{self._too_long} prompts are longer than the {self.system.context} tokens that {self.name} takes."
        return [context] if self._too_long else []

    def _fitting(self, prompts: Sequence[Messages], new: int) -> tuple[list[int], list[list[int]]]:
        """The prompts that leave room for `new` tokens: their numbers, and their token ids."""
        self.system.backbone  # noqa: B018 loads the tokenizer
        encoded = [self._encode(messages) for messages in prompts]
        places = [i for i, ids in enumerate(encoded) if len(ids) + new <= self.system.context]
        self._too_long += len(encoded) - len(places)
        return places, [encoded[i] for i in places]

    def _encode(self, messages: Messages) -> list[int]:
        """Special tokens are the template's alone; a tokenizer without a chat template gets the plain texts."""
        turns = tuple((message["role"], message["content"]) for message in messages)
        if self.system.tokenizer.chat_template is not None:
            return self.system.encode(replace(prompt_row(""), messages=turns), ChatTemplate())
        plain = prompt_row("\n\n".join(content for _, content in turns))
        return self.system.encode(plain, TextTemplate("{instruction}\n"))


def _spread(places: Sequence[int], values: Sequence, length: int) -> list:
    """The values at their places, None elsewhere."""
    by_place = dict(zip(places, values, strict=True))
    return [by_place.get(i) for i in range(length)]
