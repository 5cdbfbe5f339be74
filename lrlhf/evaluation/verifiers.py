"""Is a fact supported by passages? By its words alone, by the closest sentences, or by a language model's word."""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse.typing import ClosedUnitInterval

from lrlhf.config import check_ranges
from lrlhf.evaluation.language_model import LanguageModel

STOP_WORDS = frozenset(
    """a an the of in on at to for from by with and or but is are was were be been being has have had he she they it his
    her their its him them as that this these those who whom which what when where there into also not no do does
    did""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Claim:
    """An atomic fact about a topic, and the passages that may support it."""

    topic: str
    fact: str
    passages: tuple[str, ...]


class Verifier(ABC):
    """Says how well claims are supported; `threshold` and more counts as supported."""

    threshold: float

    @abstractmethod
    def support(self, claims: Sequence[Claim]) -> list[float | None]:
        """A number in [0, 1] for each claim; None without an answer."""

    def notes(self) -> list[str]:
        """Sentences about what it did."""
        return []


class WordRecall(Verifier):
    """The share of a fact's words, but stop words, that occur in the passages: the baseline.

    Args:
        threshold: best on the labelled facts of InstructGPT (docs/evaluation.md).
    """

    def __init__(self, threshold: ClosedUnitInterval = 0.62):
        self.threshold = threshold
        check_ranges(self)

    def support(self, claims: Sequence[Claim]) -> list[float | None]:
        """Recall, 0 for a fact without words."""
        return [
            self._recall(words_of(claim.fact), {w for p in claim.passages for w in words_of(p)}) for claim in claims
        ]

    @staticmethod
    def _recall(words: list[str], known: set[str]) -> float:
        return sum(word in known for word in words) / len(words) if words else 0.0


class SentenceSupport(Verifier):
    """Recall of a fact's words, rare ones weighing more, in the two neighbouring sentences that hold most of them.

    Words of the topic are left out, endings cut off. What stands far apart on a page supports no fact together: there
    the plain recall is wrong. A word's weight is log(1 + (n - df + 1/2) / (df + 1/2)) over the n sentences.

    Args:
        threshold: best on the labelled facts of InstructGPT (docs/evaluation.md).
    """

    def __init__(self, threshold: ClosedUnitInterval = 0.44):
        self.threshold = threshold
        check_ranges(self)

    def support(self, claims: Sequence[Claim]) -> list[float | None]:
        """Weighted recall, 0 for a fact without words."""
        return [self._best(claim) for claim in claims]

    def _best(self, claim: Claim) -> float:
        topic, words = set(words_of(claim.topic)), words_of(claim.fact)
        words = [cut(word) for word in words if word not in topic] or [cut(word) for word in words]
        sentences = [set(map(cut, words_of(s))) for p in claim.passages for s in re.split(r"(?<=[.!?])\s+", p)]
        if not words or not sentences:
            return 0.0
        frequency = Counter(word for sentence in sentences for word in sentence)
        weight = {w: math.log(1 + (len(sentences) - frequency[w] + 0.5) / (frequency[w] + 0.5)) for w in words}
        windows = [one | two for one, two in zip(sentences, [*sentences[1:], set()], strict=True)]
        return max(sum(weight[w] for w in words if w in window) for window in windows) / sum(weight[w] for w in words)


class LanguageModelVerifier(Verifier):
    """The probability of True against False after FActScore's prompt (Min et al. 2023, arXiv 2305.14251, section 4.1).

    Args:
        model: the language model, by class path.
        threshold: of the probability.
    """

    def __init__(self, model: LanguageModel, threshold: ClosedUnitInterval = 0.5):
        self.model, self.threshold = model, threshold
        check_ranges(self)

    def support(self, claims: Sequence[Claim]) -> list[float | None]:
        """The probability of True."""
        prompts = [[{"role": "user", "content": self._prompt(claim)}] for claim in claims]
        return [None if chosen is None else chosen[0] for chosen in self.model.choose(prompts, ("True", "False"))]

    def notes(self) -> list[str]:
        """The model's."""
        return self.model.notes()

    @staticmethod
    def _prompt(claim: Claim) -> str:
        context = "\n\n".join(f"Title: {claim.topic}\nText: {passage}" for passage in claim.passages)
        asked = (
            f"Answer the question about {claim.topic} based on the given context.\n\n{context}\n\nInput: {claim.fact}"
        )
        return f"{asked.rstrip('.')}. True or False?\nOutput:"


def words_of(text: str) -> list[str]:
    """Words in lower case, stop words left out."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]


def cut(word: str) -> str:
    """Without a common English ending, if three letters stay."""
    ending = next((e for e in ("ing", "ed", "es", "s") if word.endswith(e) and len(word) - len(e) >= 3), "")
    return word.removesuffix(ending)
