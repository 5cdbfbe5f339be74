"""What a run did, to look at: tables, plots and one HTML page."""

STAGES = ("sft", "reward", "ppo")
"""In the order in which align runs them; each has a folder of its name in the run."""
BEFORE, AFTER = "before PPO", "after PPO"
"""The two systems of an align run's comparison, in annotations."""
