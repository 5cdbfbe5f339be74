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
import yaml
from jsonargparse.typing import PositiveInt, restricted_string_type

from lrlhf.cli.lightning import ConfigCLI, Parser
from lrlhf.errors import UserError
from lrlhf.run.checkpoints import checkpoint_path, load, newest_checkpoint
from lrlhf.run.folder import CHECKPOINTS

POLL = 0.01
"""Seconds between two looks at a running fit."""

Moment = restricted_string_type("Moment", r"^(random|iteration:\d+)$")


def add_options(parser: Parser) -> None:
    """Prove on a config that a killed run ends exactly as an uninterrupted one: then the exit code is 0."""
    parser.add_argument(
        "--kill-at", type=Moment, default="random", help="random, or iteration:K: as soon as iteration K is saved"
    )
    parser.add_argument("--iterations", type=PositiveInt, default=4, help="of the config's first iterations, to run")
    parser.add_argument("--folder", type=str | None, help="keep both runs here; a temporary folder if not given")


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a bad option, a fit that fails by itself, or a resumed run that differs.
    """
    values = ConfigCLI("verify-resume", add_options, arguments).values()
    kill_at, iterations, kept = (values.pop(name) for name in ("kill_at", "iterations", "folder"))
    if kill_at != "random" and not 0 < int(kill_at.removeprefix("iteration:")) < iterations:
        raise UserError(f"verify-resume: --kill-at {kill_at} must lie before the last of --iterations.")
    with tempfile.TemporaryDirectory(prefix="lrlhf-verify-") as temporary:
        folder = Path(kept or temporary).expanduser()
        whole, killed, config = folder / "uninterrupted", folder / "killed", folder / "config.yaml"
        if whole.exists() or killed.exists():
            raise UserError(f"{folder} holds an earlier verification; name another --folder.")
        folder.mkdir(parents=True, exist_ok=True)
        values["trainer"] |= {"max_epochs": 1, "limit_train_batches": iterations}
        config.write_text(yaml.safe_dump(values))
        print("1/3  uninterrupted")
        seconds = _fit(config, whole)
        print("2/3  killed")
        _fit(config, killed, kill=_moment(kill_at, killed, seconds))
        saved = newest_checkpoint(killed)
        print(f"     kill -9; newest checkpoint: {saved.name if saved else 'none, so the run begins again'}")
        print("3/3  resumed")
        _fit(config, killed)
        differing, compared = differences(whole, killed)
    if differing:
        raise UserError(f"the resumed run differs in {len(differing)} of {compared} values, e.g. {differing[0]}.")
    print(f"equal, bit for bit: {compared} tensors and values of the last checkpoint, metrics.csv, samples.jsonl")


def _moment(kill_at: str, run: Path, seconds: tuple[float, float]) -> Callable[[float], bool]:
    """When to kill, as a function of the seconds since the launch."""
    if kill_at == "random":
        when = random.SystemRandom().uniform(*seconds)
        return lambda elapsed: elapsed >= when
    path = checkpoint_path(run, int(kill_at.removeprefix("iteration:")))
    return lambda elapsed: path.is_file()


def _fit(config: Path, run: Path, kill: Callable[[float], bool] | None = None) -> tuple[float, float]:
    """Launch a fit and wait; the seconds at which it began to train and ended. With `kill`, kill it then."""
    command = [sys.executable, "-m", "lrlhf", "fit", "--config", str(config), "--trainer.default_root_dir", str(run)]
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
    """Names of what differs between the ends of two runs, and how much was compared.

    Args:
        one: a run folder.
        other: another.
    """
    trees = []
    for run in (one, other):
        newest = newest_checkpoint(run)
        if newest is None:
            raise UserError(f"{run} holds no checkpoint.")
        tree: dict[str, Any] = {"file": newest.name, "checkpoint": load(newest)}
        if (best := run / CHECKPOINTS / "best.ckpt").is_file():
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
