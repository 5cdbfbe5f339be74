"""What a run did, to look at: tables, plots and one HTML page."""

STAGES = ("sft", "reward", "rl")
"""In the order in which align runs them; each has a folder of its name in the run. rl is PPO or another method."""
BEFORE, AFTER = "before", "after"
"""The two systems of an align run's comparison, in annotations."""
