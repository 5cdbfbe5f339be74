"""Callbacks: what shapes rewards, and what writes."""

from lrlhf.callbacks.divergence import AdaptiveCoefficient, DivergenceCallback
from lrlhf.callbacks.predictions import PredictionWriter
from lrlhf.callbacks.rewards import MissingEOSPenalty, NormalizeScores, RewardLimit
from lrlhf.callbacks.samples import SampleLog

__all__ = [
    "AdaptiveCoefficient",
    "DivergenceCallback",
    "MissingEOSPenalty",
    "NormalizeScores",
    "PredictionWriter",
    "RewardLimit",
    "SampleLog",
]
