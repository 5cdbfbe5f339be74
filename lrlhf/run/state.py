"""What a process holds besides tensors: its global generators, and signals that wait for the end of an iteration.

lrlhf itself draws from private generators (`functional.randomness`); dropout and users' code draw from the global ones,
and what they draw must not change by a resume.
"""

import random
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Ctrl-C, a scheduler's kill, and the signals by which SLURM announces the end of a job."""


class DeferredSignals:
    """Keeps signals that arrive during an iteration, and passes them to their handlers after it."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def take(self) -> None:
        """Take the place of installed handlers, and of SIGTERM's default; other unhandled signals keep their effect."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is not None and (callable(signal.getsignal(number)) or name == "SIGTERM"):
                self._handlers[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Put the handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def deliver(self) -> None:
        """Give the noted signals to their handlers: under SLURM, Lightning's saves and queues the job again."""
        handlers, received = dict(self._handlers), list(self.received)
        self.release()
        for number in received:
            handler = handlers.get(number)
            if callable(handler) and number != signal.SIGINT:
                handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        if not self.received:
            print(f"\n{signal.Signals(number).name}: stopping when this iteration is done and saved", flush=True)
        self.received.append(number)


def random_state() -> dict[str, Any]:
    """Every global generator of this process, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
