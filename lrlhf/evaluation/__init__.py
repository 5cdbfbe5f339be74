"""Whether a model became better: win rates by any judge, length control, factual precision, reward-model accuracy."""
