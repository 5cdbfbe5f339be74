"""Private generators: every draw is a function of the seed and of where in the run it happens."""

import hashlib

import torch


def generator(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but (seed, place), e.g. generator(seed, "sampling", iteration).

    Nothing has to be saved to continue a run, and no other draw can disturb it.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
