"""Reward functions that come with lrlhf: (prompts, responses, columns of the data) to scores [B]."""

import re
from fractions import Fraction

import torch
from torch import Tensor

from lrlhf.errors import UserError


def vader_sentiment(prompts: list[str], responses: list[str]) -> Tensor:
    """How positive each response sounds, in [-1, 1]: the compound score of the VADER lexicon.

    Hutto and Gilbert (2014). The demo's gold signal: cheap, deterministic, and not what the reward model was fitted on
    directly, so that gold and learned reward can be told apart.

    Raises:
        UserError: vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("vader_sentiment needs a package: pip install vaderSentiment.") from None
    analyzer = SentimentIntensityAnalyzer()
    return torch.tensor([analyzer.polarity_scores(response)["compound"] for response in responses])


def exact_answer(prompts: list[str], responses: list[str], answer: list[str]) -> Tensor:
    """1 where a response's final answer is the row's `answer`, else 0; both are numbers or short texts.

    The final answer is what stands in the last \\boxed{}, else behind the last "####" or "answer is" or "answer:", else
    the last number. Numbers are compared by value (1,000 = 1000.0 = 2000/2, $ and % are dropped), other texts without
    case, blanks and a final period. Strict and cheap: of algebra it knows nothing (see `math_answer`).
    """
    return torch.tensor([float(_same(_final(r), str(a))) for r, a in zip(responses, answer, strict=True)])


def math_answer(prompts: list[str], responses: list[str], answer: list[str]) -> Tensor:
    """1 where a response's final answer equals the row's `answer` as mathematics, e.g. 1/2 and \\frac{2}{4}, else 0.

    By the package math-verify, which parses LaTeX and expressions.

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError('math_answer needs a package: pip install "math-verify[antlr4_13_2]".') from None
    limits = {"parsing_timeout": None}
    pairs = [(parse(f"${a}$", **limits), parse(r, **limits)) for r, a in zip(responses, answer, strict=True)]
    return torch.tensor([float(bool(verify(gold, found, timeout_seconds=None))) for gold, found in pairs])


NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+"


def _final(response: str) -> str:
    """The final answer of a response, as text; empty where there is none."""
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", response):
        return boxed[-1]
    if said := re.findall(r"(?:####|answer is|answer:)[ *:$]*([^\n]+)", response, re.IGNORECASE):
        number = re.search(NUMBER, said[-1])
        return number[0] if number else said[-1]
    numbers = re.findall(NUMBER, response)
    return numbers[-1] if numbers else response


def _same(found: str, expected: str) -> bool:
    left, right = _number(found), _number(expected)
    if left is not None and right is not None:
        return left == right
    plain = [" ".join(text.lower().split()).rstrip(".") for text in (found, expected)]
    return plain[0] == plain[1]


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.strip().strip("$%").rstrip(".").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
