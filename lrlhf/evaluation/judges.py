"""Judges: which of two outputs is better. Name one in YAML by class path, or subclass Judge."""

import ast
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from lrlhf.config import DType
from lrlhf.errors import UserError
from lrlhf.evaluation.language_model import LanguageModel, Messages
from lrlhf.evaluation.pairs import Annotation, Pair, read_annotations
from lrlhf.evaluation.system import System, prompt_row

Order = Literal["both", "hash"]


class Judge(ABC):
    """Prefers one of two outputs."""

    name: str
    """For annotations and reports."""
    sees_order = True
    """Whether the answer may depend on which output stands first."""

    @abstractmethod
    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """One answer a pair: 1 the first output, 2 the second, 1.5 a tie, anything between; None without an answer."""

    def notes(self) -> list[str]:
        """Sentences about what it did: answers it could not give, tokens, cost."""
        return []


def annotate(judge: Judge, pairs: Sequence[Pair], order: Order = "both") -> list[Annotation]:
    """Ask a judge about every pair.

    Equal outputs are a tie without asking. A pair without an answer in each order has no preference: with one order
    alone a judge that prefers a position would be believed.

    Args:
        judge: to ask.
        pairs: of outputs.
        order: both shows each pair twice, the second time swapped, and takes the mean, which cancels a preference for
            a position; hash shows it once, swapped for half of the instructions, as AlpacaEval does.
    """
    both = judge.sees_order and order == "both"
    asked: list[tuple[int, bool]] = []
    for number, pair in enumerate(pairs):
        if pair.output_1 != pair.output_2:
            swap = judge.sees_order and order == "hash" and pair.hash_swaps
            asked += [(number, False), (number, True)] if both else [(number, swap)]
    said = judge.prefer([pairs[number].swapped if swap else pairs[number] for number, swap in asked])
    answers: dict[int, list[float | None]] = {}
    for (number, swap), answer in zip(asked, said, strict=True):
        answers.setdefault(number, []).append(answer if answer is None or not swap else 3 - answer)
    return [_annotation(judge, pair, answers.get(number, [1.5])) for number, pair in enumerate(pairs)]


def _annotation(judge: Judge, pair: Pair, answers: list[float | None]) -> Annotation:
    given = [answer for answer in answers if answer is not None]
    preference = sum(given) / len(given) if len(given) == len(answers) else None
    return Annotation(**vars(pair), annotator=judge.name, preference=preference, answers=tuple(answers))


class RewardModelJudge(Judge):
    """Prefers the output with the higher score of a reward model.

    Args:
        reward_model: run folder or hand-over of a RewardModel run.
        dtype: of the frozen base; null takes the run's.
        batch_size: responses of one pass. Memory only.
    """

    sees_order = False

    def __init__(self, reward_model: str, dtype: DType | None = None, batch_size: PositiveInt = 16):
        self.name = f"reward model {reward_model}"
        self.system = System(reward_model, dtype=dtype, batch_size=batch_size)

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1 or 2, 1.5 for equal scores."""
        rows, n = [prompt_row(pair.instruction) for pair in pairs], len(pairs)
        texts = [*(pair.output_1 for pair in pairs), *(pair.output_2 for pair in pairs)]
        scores = self.system.score(rows * 2, texts).tolist()
        return [higher(one, two) for one, two in zip(scores[:n], scores[n:], strict=True)]


class FunctionJudge(Judge):
    """Prefers the output to which a reward function gives the higher score, such as `lrlhf.rewards.vader_sentiment`.

    Args:
        function: (prompts, responses) as texts to scores [B], by import path.
    """

    sees_order = False

    def __init__(self, function: Callable):
        self.name = getattr(function, "__name__", type(function).__name__)
        self.function = function

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1 or 2, 1.5 for equal scores; None where a score is no number."""
        prompts = [pair.instruction for pair in pairs]
        first, second = (
            [float(score) for score in self.function(prompts, [getattr(pair, key) for pair in pairs])] if pairs else []
            for key in ("output_1", "output_2")
        )
        return [higher(one, two) for one, two in zip(first, second, strict=True)]


class RecordedJudge(Judge):
    """Annotations that were made before, by people or by another judge; a pair that is not among them has no answer.

    Args:
        annotations: file in AlpacaEval's format; either order of the two outputs is found.
    """

    sees_order = False

    def __init__(self, annotations: str):
        recorded = read_annotations(annotations)
        self.name = " and ".join(sorted({a.annotator for a in recorded} - {""})) or Path(annotations).stem
        self._known: dict[tuple[str, str, str], float | None] = {}
        for a in recorded:
            self._known[a.instruction, a.output_2, a.output_1] = None if a.preference is None else 3 - a.preference
            self._known[a.instruction, a.output_1, a.output_2] = a.preference

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """As recorded."""
        return [self._known.get((pair.instruction, pair.output_1, pair.output_2)) for pair in pairs]


class LanguageModelJudge(Judge):
    """Asks a language model, local or behind an endpoint, with AlpacaEval's prompts.

    Args:
        model: the language model, by class path.
        answer: choose asks for one of two identifiers and weighs by their probabilities, as AlpacaEval 2; rank asks for
            a ranked list and takes it as it is, as AlpacaEval 1.
        choices: the identifiers of the two outputs; m and M in AlpacaEval 2.
        prompt: file with a prompt of your own, in the form of those in `lrlhf/evaluation/prompts`; null takes
            AlpacaEval's.
    """

    def __init__(
        self,
        model: LanguageModel,
        answer: Literal["choose", "rank"] = "choose",
        choices: tuple[str, str] = ("m", "M"),
        prompt: str | None = None,
    ):
        self.model, self.answer, self.choices = model, answer, choices
        self.name = f"{model.name}, {answer}"
        shipped = resources.files("lrlhf.evaluation") / "prompts" / f"{answer}.txt"
        try:
            self._text = Path(prompt).expanduser().read_text(encoding="utf-8") if prompt else shipped.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"judge prompt {prompt} cannot be read ({error}).") from None
        if missing := [key for key in ("instruction", "output_1", "output_2") if f"{{{key}}}" not in self._text]:
            raise UserError(f"judge prompt {prompt}: it lacks {{{missing[0]}}}.")

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1 + the probability that the second is better, or the rank of the first."""
        prompts = [self._prompt(pair) for pair in pairs]
        if self.answer == "rank":
            answers = self.model.complete(prompts, max_tokens=100)
            return [None if answer is None else read_ranking(answer) for answer in answers]
        return [None if chosen is None else 1 + chosen[1] for chosen in self.model.choose(prompts, self.choices)]

    def notes(self) -> list[str]:
        """The model's."""
        return self.model.notes()

    def _prompt(self, pair: Pair) -> Messages:
        """The texts go in at once, so that what looks like a place in one of them stays text."""
        values = {**vars(pair), "choice_1": self.choices[0], "choice_2": self.choices[1]}
        places = "|".join(("instruction", "output_1", "output_2", "choice_1", "choice_2"))
        text = re.sub(rf"\{{({places})\}}", lambda found: values[found[1]], self._text)
        system, mark, user = text.partition("\n=====\n") if "\n=====\n" in self._text else ("", "", text)
        return [{"role": "system", "content": system}] * bool(mark) + [{"role": "user", "content": user.strip()}]


def higher(first: float, second: float) -> float | None:
    """The preference that two scores imply; None if one is no number."""
    if first != first or second != second:
        return None
    return 1.5 if first == second else 1.0 if first > second else 2.0


def read_ranking(answer: str) -> float | None:
    """The rank of model_1 in a list such as [{'model': 'model_1', 'rank': 1}, ...]; None if it is no such list."""
    try:
        ranks = {entry["model"]: entry["rank"] for entry in ast.literal_eval(answer.strip())}
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return None
    return float(ranks["model_1"]) if ranks in ({"model_1": 1, "model_2": 2}, {"model_1": 2, "model_2": 1}) else None
