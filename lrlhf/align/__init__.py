"""The three stages in a row, and what they made of the model."""

STAGES = ("sft", "reward", "ppo")
"""In the order in which they run; each has a folder of its name in the run."""
