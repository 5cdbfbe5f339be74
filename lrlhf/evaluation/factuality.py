"""Factual precision: the share of a response's atomic facts that a knowledge source supports (FActScore).

Min et al. (2023), arXiv 2305.14251: split a response into atomic facts, fetch the passages of the topic's page that
match each best, let a verifier say which are supported; average over the responses that answered. Beside it the
agreement over samples of SelfCheckGPT (Manakul et al. 2023, arXiv 2303.08896), which needs no knowledge source.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt

from lrlhf.config import check_ranges
from lrlhf.datamodules.containers import BadRow, read_records
from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, Line, clustered_mean
from lrlhf.evaluation.evaluation import Evaluation
from lrlhf.evaluation.knowledge import Knowledge
from lrlhf.evaluation.language_model import LanguageModel
from lrlhf.evaluation.verifiers import Claim, Verifier, words_of

ABSTENTIONS = (
    "provide more",
    "could not find any information",
    "search results do not provide",
    "there is no information",
    "there are no search results",
    "there are no provided search results",
    "not provided in the search results",
    "is not mentioned in the provided search results",
    "there seems to be a mistake in the question",
    "not sources found",
    "no sources found",
    "try a more general question",
)
"""Phrases by which FActScore's package knows a response that declines."""


class Splitter(ABC):
    """Splits a response into atomic facts."""

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """The facts of a text, in its order; none for an empty one."""


class SentenceSplitter(Splitter):
    """Every sentence is a fact: quick and the same everywhere, but a sentence with one wrong word is wrong as a whole.

    Args:
        language: two letters, of the package sentencex.
    """

    def __init__(self, language: str = "en"):
        self.language = language

    def split(self, text: str) -> list[str]:
        """Sentences without the blanks around them."""
        try:
            from sentencex import segment
        except ImportError as error:
            raise UserError(f"the sentence splitter needs {error.name}: pip install 'lrlhf[evaluate]'.") from None
        return [sentence.strip() for sentence in segment(self.language, text) if re.search(r"\w", sentence)]


class LanguageModelSplitter(Splitter):
    """A language model breaks each sentence down; a sentence that it gives no list for is taken as one fact.

    Args:
        model: by class path.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        self.prompt = (resources.files("lrlhf.evaluation") / "prompts/split.txt").read_text(encoding="utf-8")

    def split(self, text: str) -> list[str]:
        """The lines that begin with a dash, sentence by sentence."""
        sentences = SentenceSplitter().split(text)
        prompts = [[{"role": "user", "content": self.prompt.replace("{sentence}", s)}] for s in sentences]
        answers = self.model.complete(prompts, max_tokens=256)
        facts: list[str] = []
        for sentence, answer in zip(sentences, answers, strict=True):
            facts += re.findall(r"^\s*- +(\S.*?)\s*$", answer or "", re.MULTILINE) or [sentence]
        return facts


class FactualPrecision(Evaluation):
    """FActScore of responses about topics.

    Args:
        outputs: jsonl {topic, output}, FActScore's input; a response that is null or empty gave no answer.
        knowledge: jsonl {title, text}, whose titles are the topics, or a database that was built from it.
        verifier: by class path.
        splitter: by class path; null takes sentences. Rows with a list of `facts` need none.
        gamma: a response of N <= gamma facts has its precision times exp(1 - gamma / N); 0 leaves this out.
        passages: of the page, for each fact.
    """

    def __init__(
        self,
        outputs: str,
        knowledge: str,
        verifier: Verifier,
        splitter: Splitter | None = None,
        gamma: NonNegativeInt = 10,
        passages: PositiveInt = 5,
    ):
        self.outputs, self.knowledge, self.verifier = outputs, knowledge, verifier
        self.splitter, self.gamma, self.passages = splitter or SentenceSplitter(), gamma, passages
        check_ranges(self)

    def run(self, folder: Path) -> dict[str, Any]:
        """Split, retrieve, verify, average; writes factscore.json in FActScore's format."""
        rows, knowledge = read_topics(self.outputs), Knowledge(self.knowledge)
        known = [row for row in rows if knowledge.has(row["topic"])]
        if not known:
            raise UserError(
                f"{self.knowledge} has no page of any topic in {self.outputs}; its titles must be the topics."
            )
        facts = [
            None if abstains(row["output"]) else row.get("facts") or self.splitter.split(row["output"]) for row in known
        ]
        claims = [
            Claim(row["topic"], fact, tuple(knowledge.passages(row["topic"], f"{row['topic']} {fact}", self.passages)))
            for row, listed in zip(known, facts, strict=True)
            for fact in listed or ()
        ]
        support = iter(self.verifier.support(claims))
        decisions = [
            None if listed is None else [{"atom": fact, "is_supported": self._decide(next(support))} for fact in listed]
            for listed in facts
        ]
        unread = sum(atom["is_supported"] is None for decided in decisions for atom in decided or ())
        scores = factscore(decisions, self.gamma)
        plain = {name: None if math.isnan(e.value) else e.value for name, e in scores.items()}
        (folder / "factscore.json").write_text(json.dumps({**plain, "decisions": decisions}, indent=1) + "\n")
        notes = [f"{len(rows) - len(known)} of {len(rows)} topics have no page and are in no number."] * (known != rows)
        if unread:
            notes.append(f"{unread} of {len(claims)} facts got no verdict; they count neither for nor against.")
        return {
            "title": f"Factual precision of {self.outputs}, {len(known)} topics, by {type(self.verifier).__name__}",
            "lines": [
                Line("FActScore", scores["score"], ".1%"),
                Line("without the penalty for few facts", scores["init_score"], ".1%"),
                Line("responses that answered", scores["respond_ratio"], ".1%"),
                Line("facts in a response", scores["num_facts_per_response"], ".1f"),
            ],
            "notes": [*notes, *self.verifier.notes()],
        }

    def _decide(self, support: float | None) -> bool | None:
        return None if support is None else support >= self.verifier.threshold


class SampleAgreement(Evaluation):
    """How far a response agrees with other samples of the same prompt: what a model knows, it says again.

    SelfCheckGPT's unigram variant (Manakul et al. 2023): the mean over a response's words, stop words left out, of
    -log p, p the word's frequency, plus one, in samples and response together. Lower agrees more.

    Args:
        outputs: jsonl {topic, output, samples}, samples a list of other responses to the same prompt.
    """

    def __init__(self, outputs: str):
        self.outputs = outputs

    def run(self, folder: Path) -> dict[str, Any]:
        """One number a response; written to agreement.json."""
        rows = [row for row in read_topics(self.outputs, samples=True) if not abstains(row["output"])]
        if not rows:
            raise UserError(f"{self.outputs}: every response declines to answer.")
        surprise = [sample_surprise(row["output"], row["samples"]) for row in rows]
        told = [{"topic": row["topic"], "surprise": s} for row, s in zip(rows, surprise, strict=True)]
        (folder / "agreement.json").write_text(json.dumps(told, indent=1) + "\n")
        line = Line("surprise of a word, nats", clustered_mean(np.array(surprise), range(len(rows))))
        return {"title": f"Agreement over samples, {self.outputs}", "lines": [line], "notes": ["Lower agrees more."]}


def read_topics(source: str, *, samples: bool = False) -> list[dict[str, Any]]:
    """Rows {topic, output[, facts][, samples]}.

    Raises:
        UserError: a row without topic or output, or without the list of samples where one is needed.
    """
    rows = []
    for place, row in read_records(source):
        if isinstance(row, BadRow):
            raise UserError(f"{place}: {row}.")
        fits = isinstance(row, dict) and isinstance(row.get("topic"), str)
        if not fits or "output" not in row or not isinstance(row["output"], str | None):
            told = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place}: expected a topic and an output, got {told}.")
        if samples and not (isinstance(row.get("samples"), list) and row["samples"]):
            raise UserError(f"{place}: expected a list of samples, responses to the same prompt.")
        rows.append(row)
    if not rows:
        raise UserError(f"{source} holds no rows.")
    return rows


def abstains(output: str | None) -> bool:
    """Whether a response declines to answer, by FActScore's rules."""
    said = (output or "").strip().lower().replace("\u2019", "'")
    return not said or said.startswith("i'm sorry") or any(phrase in said for phrase in ABSTENTIONS)


def factscore(decisions: Sequence[list[dict[str, Any]] | None], gamma: int) -> dict[str, Estimate]:
    """Scores by FActScore's formula, with bootstrap intervals over responses.

    precision f = supported / N of a response with N facts; score = mean of f exp(min(0, 1 - gamma / N)) over responses
    that answered.

    Args:
        decisions: of each response its facts with `is_supported` true, false or None (left out); None: no answer.
        gamma: of the penalty; 0 for none.
    """
    answered = np.array([decided is not None for decided in decisions])
    judged = [[a["is_supported"] for a in d if a["is_supported"] is not None] for d in decisions if d is not None]
    judged = [verdicts for verdicts in judged if verdicts]
    count = np.array([len(verdicts) for verdicts in judged], dtype=float)
    precision = np.array([sum(verdicts) / len(verdicts) for verdicts in judged])
    score = precision * np.exp(np.minimum(0, 1 - gamma / np.maximum(count, 1))) if gamma else precision
    columns = {"score": score, "init_score": precision, "respond_ratio": answered, "num_facts_per_response": count}
    return {name: clustered_mean(values, range(len(values))) for name, values in columns.items()}


def sample_surprise(response: str, samples: Sequence[str]) -> float:
    """The mean over words of -log p of a unigram model of the samples and the response, one added to every count.

    Args:
        response: to look at.
        samples: other responses to the same prompt.
    """
    every = [word for text in (response, *samples) for word in words_of(text)]
    counts = Counter(every)
    total = len(every) + len(counts)
    words = words_of(response)
    return float(np.mean([-math.log((counts[word] + 1) / total) for word in words])) if words else math.nan
