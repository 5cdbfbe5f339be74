"""Rewards that are computed: functions of prompts, responses and columns of the data, by import path in YAML."""

from lrlhf.rewards.functions import exact_answer, math_answer, vader_sentiment
from lrlhf.rewards.reward import Reward, RewardFunction

__all__ = ["Reward", "RewardFunction", "exact_answer", "math_answer", "vader_sentiment"]
