"""Fits by several processes, each a fork of this one: what torchrun does, without its seconds of start-up."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path


def fit(arguments: list[str], log: Path, processes: int = 1, *, timeout: float = 120) -> list[int]:
    """Run `lrlhf fit` in so many processes. Exit codes, process by process; negative for a signal."""
    return wait(start(lambda: fit_here([*arguments, "--trainer.devices", str(processes)]), log, processes), timeout)


def start(work: Callable[[], None], log: Path, processes: int) -> list[int]:
    """Fork the processes of one run, with the environment that torchrun gives them; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "NODE_RANK": "0",
                    "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test",
                }  # fmt: skip
            _run(work, log)
        children.append(child)
    return children


def wait(children: list[int], timeout: float) -> list[int]:
    """Exit codes; what still runs after the timeout is killed."""
    end, codes = time.monotonic() + timeout, {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def fit_here(arguments: list[str]) -> None:
    """Run `lrlhf fit` in this process."""
    from lrlhf.__main__ import main

    main(["fit", *arguments])


def _run(work: Callable[[], None], log: Path) -> None:
    status = 1
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        work()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
