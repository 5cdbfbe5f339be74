"""`lrlhf verify-resume`: run a config's first iterations whole, run them again with a kill, and compare bit by bit."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrlhf.errors import UserError
from lrlhf.run.checkpoints import FOLDER, checkpoint_path, load, newest_checkpoint

USAGE = """usage: lrlhf verify-resume --config FILE [--kill-at random|iteration:K] [--iterations N] [--folder DIR]
                           [fit options]

  --kill-at MOMENT     a random moment of the run (the default), or as soon as iteration K is saved
  --iterations N       how many of the config's first iterations to run; 4 if not given
  --folder DIR         keep both runs here; a temporary folder if not given

All other options are those of lrlhf fit. Exit code 0: the killed run ended exactly as the uninterrupted one."""

POLL = 0.01
"""Seconds between two looks at a running fit."""


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a bad option, a fit that fails by itself, or a resumed run that differs.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    options, fit = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lrlhf-verify-") as temporary:
        folder = Path(options.get("folder", temporary)).expanduser()
        whole, killed = folder / "uninterrupted", folder / "killed"
        if whole.exists() or killed.exists():
            raise UserError(f"{folder} holds an earlier verification; name another --folder.")
        bound = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", options.get("iterations", "4")]
        print("1/3  uninterrupted")
        seconds = _fit([*fit, *bound], whole)
        print("2/3  killed")
        _fit([*fit, *bound], killed, kill=_moment(options.get("kill-at", "random"), killed, seconds))
        saved = newest_checkpoint(killed)
        print(f"     kill -9; newest checkpoint: {saved.name if saved else 'none, so the run begins again'}")
        print("3/3  resumed")
        _fit([*fit, *bound], killed)
        differing, compared = differences(whole, killed)
    if differing:
        raise UserError(f"the resumed run differs in {len(differing)} of {compared} values, e.g. {differing[0]}.")
    print(f"equal, bit for bit: {compared} tensors and values of the last checkpoint, metrics.csv, samples.jsonl")


def _options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    rest = [part for argument in arguments for part in _split(argument)]
    fit: list[str] = []
    while rest:
        name = rest.pop(0)
        if name in ("--kill-at", "--iterations", "--folder"):
            if not rest:
                raise UserError(f"verify-resume: {name} needs a value.")
            options[name[2:]] = rest.pop(0)
        else:
            fit.append(name)
    if not options.get("iterations", "4").isdigit() or options.get("iterations") == "0":
        raise UserError(f"verify-resume: --iterations {options['iterations']} must be a positive number.")
    moment = options.get("kill-at", "random")
    if moment != "random" and not (moment.startswith("iteration:") and moment[10:].isdigit()):
        raise UserError(f"verify-resume: --kill-at {moment} must be random or iteration:K.")
    if moment != "random" and not 0 < int(moment[10:]) < int(options.get("iterations", "4")):
        raise UserError(f"verify-resume: --kill-at {moment} must lie before the last of --iterations.")
    return options, fit


def _split(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in ("--kill-at", "--iterations", "--folder") else [argument]


def _moment(kill_at: str, run: Path, seconds: tuple[float, float]) -> Callable[[float], bool]:
    """When to kill, as a function of the seconds since the launch."""
    if kill_at == "random":
        when = random.SystemRandom().uniform(*seconds)
        return lambda elapsed: elapsed >= when
    path = checkpoint_path(run, int(kill_at.removeprefix("iteration:")))
    return lambda elapsed: path.is_file()


def _fit(arguments: list[str], run: Path, kill: Callable[[float], bool] | None = None) -> tuple[float, float]:
    """Launch a fit and wait; the seconds at which it began to train and ended. With `kill`, kill it then."""
    command = [sys.executable, "-m", "lrlhf", "fit", *arguments, "--trainer.default_root_dir", str(run)]
    start, began = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            elapsed = time.monotonic() - start
            if not began and (run / "config.yaml").is_file():
                began = elapsed
            if kill is not None and kill(elapsed):
                process.send_signal(signal.SIGKILL)
            time.sleep(POLL)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode != 0 and not (kill is not None and process.returncode == -signal.SIGKILL):
        raise UserError(f"the fit failed by itself: {errors.strip().splitlines()[-1] if errors.strip() else '?'}")
    return began, time.monotonic() - start


def differences(one: Path, other: Path) -> tuple[list[str], int]:
    """Names of what differs between the ends of two runs, and how much was compared."""
    trees = []
    for run in (one, other):
        newest = newest_checkpoint(run)
        if newest is None:
            raise UserError(f"{run} holds no checkpoint.")
        tree: dict[str, Any] = {"file": newest.name, "checkpoint": load(newest)}
        if (best := run / FOLDER / "best.ckpt").is_file():
            tree["best"] = load(best)
        for name in ("metrics.csv", "samples.jsonl", "handover/manifest.json"):
            tree[name] = (run / name).read_text() if (run / name).is_file() else None
        trees.append(tree)
    return _compare("", *trees)


def _compare(name: str, one: Any, other: Any) -> tuple[list[str], int]:
    """Leaves of two nested structures that are not equal, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(f"{name}.{key}".strip("."), one.get(key), other.get(key)) for key in one | other]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(f"{name}.{i}", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.numpy(force=True).tobytes() == (other.numpy(force=True).tobytes())
        )
        return ([] if same else [name]), 1
    else:
        return ([] if type(one) is type(other) and repr(one) == repr(other) else [name]), 1
    found = [_compare(*pair) for pair in pairs]
    return [leaf for leaves, _ in found for leaf in leaves], sum(count for _, count in found)
