"""Experiments: a grid of conditions and seeds, each trial an ordinary align run, and what they say together."""
