"""Callbacks: what shapes rewards, and what writes."""

from lrlhf.callbacks.checkpoints import Checkpoints
from lrlhf.callbacks.divergence import AdaptiveCoefficient, DivergenceCallback
from lrlhf.callbacks.predictions import PredictionWriter
from lrlhf.callbacks.rewards import MissingEOSPenalty, NormalizeScores, RewardLimit
from lrlhf.callbacks.rollout import RolloutCallback
from lrlhf.callbacks.samples import SampleLog

__all__ = [
    "AdaptiveCoefficient",
    "Checkpoints",
    "DivergenceCallback",
    "MissingEOSPenalty",
    "NormalizeScores",
    "PredictionWriter",
    "RewardLimit",
    "RolloutCallback",
    "SampleLog",
]
