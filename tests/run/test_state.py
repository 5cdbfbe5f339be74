"""Signals wait for the end of an iteration."""

import os
import signal

import pytest

from lrlhf.run.state import DeferredSignals


@pytest.fixture
def handled():
    """SIGUSR1 has a handler, as Lightning's SLURM plugin gives it one; SIGUSR2 has none."""
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_is_called_when_the_signals_are_delivered_and_not_before(handled):
    signals = DeferredSignals()
    signals.take()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.received == [signal.SIGUSR1]
    assert handled == []
    signals.deliver()
    assert handled == [signal.SIGUSR1]


def test_the_handlers_are_put_back(handled):
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    signals = DeferredSignals()
    signals.take()
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR2) == before[signal.SIGUSR2]
    signals.release()
    assert {name: signal.getsignal(name) for name in before} == before


@pytest.fixture
def interruptible():
    """As in a terminal; a shell's background job ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_leaves_at_once(interruptible):
    signals = DeferredSignals()
    signals.take()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release()
