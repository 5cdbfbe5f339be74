"""Whether a model became better: win rates by any judge, length control, factual precision, reward-model accuracy."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Evaluation": "evaluation",
    "HeadToHead": "head_to_head",
    "Leaderboard": "head_to_head",
    "Judge": "judges",
    "FunctionJudge": "judges",
    "LanguageModelJudge": "judges",
    "RecordedJudge": "judges",
    "RewardModelJudge": "judges",
    "Endpoint": "endpoint",
    "LocalModel": "local_model",
    "FactualPrecision": "factuality",
    "SampleAgreement": "factuality",
    "Splitter": "factuality",
    "SentenceSplitter": "factuality",
    "LanguageModelSplitter": "factuality",
    "Verifier": "verifiers",
    "WordRecall": "verifiers",
    "SentenceSupport": "verifiers",
    "LanguageModelVerifier": "verifiers",
    "RewardModelAccuracy": "reward_accuracy",
    "WinRate": "win_rate",
    "WinRateCallback": "callback",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
