"""The three stages as LightningModules."""

from lrlhf.modules.ppo_policy import PPOPolicy
from lrlhf.modules.reward_model import RewardModel
from lrlhf.modules.sft import SFT

__all__ = ["SFT", "PPOPolicy", "RewardModel"]
