"""The gold reward of the stories: known, cheap, and lost by a policy that only repeats what the reward model likes."""

import torch
from torch import Tensor

from lrlhf.rewards import vader_sentiment


def happy_and_varied(prompts: list[str], responses: list[str]) -> Tensor:
    """VADER's sentiment, in [-1, 1], times the share of a response's words that are different words.

    Stories of the base model repeat few words, so pairs of them teach a reward model happiness and hardly variety.
    """
    words = [response.lower().split() for response in responses]
    variety = torch.tensor([len(set(said)) / max(len(said), 1) for said in words])
    return vader_sentiment(prompts, responses) * variety
