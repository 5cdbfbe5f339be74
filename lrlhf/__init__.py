"""RLHF with low-rank adapters on one frozen base model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "SFT": "lrlhf.modules",
    "RewardModel": "lrlhf.modules",
    "RewardEnsemble": "lrlhf.modules",
    "PPOPolicy": "lrlhf.modules",
    "PaperPPO": "lrlhf.modules",
    "RLOO": "lrlhf.modules",
    "GRPO": "lrlhf.modules",
    "DPO": "lrlhf.modules",
    "BestOfN": "lrlhf.modules",
    "ExpertIteration": "lrlhf.modules",
    "AlpacaDataModule": "lrlhf.datamodules",
    "AlpacaTemplate": "lrlhf.datamodules",
    "ChatTemplate": "lrlhf.datamodules",
    "TextTemplate": "lrlhf.datamodules",
    "AdaptiveCoefficient": "lrlhf.callbacks",
    "Checkpoints": "lrlhf.run.checkpoints",
    "DivergenceCallback": "lrlhf.callbacks",
    "MissingEOSPenalty": "lrlhf.callbacks",
    "PredictionWriter": "lrlhf.callbacks",
    "NormalizeScores": "lrlhf.callbacks",
    "RewardLimit": "lrlhf.callbacks",
    "RolloutCallback": "lrlhf.modules.rollout_callback",
    "SampleLog": "lrlhf.callbacks",
    "WinRateCallback": "lrlhf.evaluation",
    "Backbone": "lrlhf.model.backbone",
    "FSDP2Strategy": "lrlhf.model.sharding",
    "LoRA": "lrlhf.config",
    "PPO": "lrlhf.config",
    "Quantization": "lrlhf.config",
    "Sampling": "lrlhf.config",
    "Schedule": "lrlhf.config",
    "Updates": "lrlhf.config",
    "UserError": "lrlhf.errors",
}

__all__ = ["__version__", "evaluation", "functional", "rewards", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in ("evaluation", "functional", "rewards"):
        return import_module(f"lrlhf.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
