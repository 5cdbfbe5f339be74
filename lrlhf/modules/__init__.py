"""The stages as LightningModules: supervised fine-tuning, reward models, and the methods that move a policy."""

from lrlhf.modules.best_of_n import BestOfN
from lrlhf.modules.dpo import DPO
from lrlhf.modules.expert_iteration import ExpertIteration
from lrlhf.modules.group_policy import GRPO, RLOO
from lrlhf.modules.paper_ppo import PaperPPO
from lrlhf.modules.ppo_policy import PPOPolicy
from lrlhf.modules.reward_ensemble import RewardEnsemble
from lrlhf.modules.reward_model import RewardModel
from lrlhf.modules.sft import SFT

__all__ = [
    "DPO",
    "GRPO",
    "RLOO",
    "SFT",
    "BestOfN",
    "ExpertIteration",
    "PPOPolicy",
    "PaperPPO",
    "RewardEnsemble",
    "RewardModel",
]
