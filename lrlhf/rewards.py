"""Reward functions: (prompts, responses) as texts to scores [B]. Name one in YAML by import path."""

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
