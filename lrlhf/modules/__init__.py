"""The stages as LightningModules: supervised fine-tuning, reward models, and the methods that move a policy."""

from lrlhf.modules.ppo_policy import PPOPolicy
from lrlhf.modules.reward_model import RewardModel
from lrlhf.modules.sft import SFT

__all__ = ["SFT", "PPOPolicy", "RewardModel"]
