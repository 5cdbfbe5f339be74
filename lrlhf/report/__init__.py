"""What a run did, to look at: tables, plots and one HTML page."""

STAGES = ("sft", "reward", "ppo")
"""In the order in which align runs them; each has a folder of its name in the run."""
