"""A study as trials: which there are, what each is made of, and how one runs: as `lrlhf align` in its own process."""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lrlhf.errors import UserError
from lrlhf.files import write_json
from lrlhf.report import STAGES

Config = dict[str, Any]
SHARED = ("sft", "reward")
"""Stages that trials with the same config of them share."""


@dataclass(frozen=True)
class Trial:
    """One run: a condition, the values of the grid's keys, and a seed.

    Args:
        condition: its name, with the grid's values.
        factors: the grid's values by key.
        seed: of the last stage.
        folder: of its align run.
        align: config files of `lrlhf align`.
        changes: what differs from them, by stage.
        before: folder of the align run of the stages that it shares with others; None where there are none.
    """

    condition: str
    factors: tuple[tuple[str, Any], ...]
    seed: int
    folder: Path
    align: tuple[str, ...]
    changes: Mapping[str, Config]
    before: Path | None

    def fingerprint(self) -> str:
        """Of everything that it is made from."""
        made_of = [self.seed, str(self.before), self.changes, files_of(self.align)]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def is_done(self) -> bool:
        """Whether its folder holds the results of this trial as it is configured now."""
        record = self.folder / "trial.json"
        return record.is_file() and json.loads(record.read_text()).get("fingerprint") == self.fingerprint()

    def run(self, threads: int | None = None) -> None:
        """Run it, or go on where it was interrupted.

        Args:
            threads: of its process; None for the library's own choice.

        Raises:
            UserError: it failed, naming its log.
        """
        changes = merged({}, dict(self.changes.get("rl", {})))
        stages: Config = {"sft": None, "reward": None}
        for stage in SHARED if self.before else ():
            if stage in stages_of(self.align):
                key = {"sft": "sft", "reward": "reward_model"}[stage]
                changes = merged({"model": {"init_args": {key: str(self.before / stage / "handover")}}}, changes)  # type: ignore[operator]
        _align(self.align, self.folder, stages, {"rl": changes}, threads, self.seed)
        write_json(self.folder / "trial.json", {"fingerprint": self.fingerprint(), "seed": self.seed})

    def prepare(self, threads: int | None = None) -> None:
        """Run the stages that it shares with others, where that is not done.

        Args:
            threads: of its process.
        """
        if self.before and not (self.before / "done.json").is_file():
            _align(self.align, self.before, {"rl": None}, {s: self.changes.get(s, {}) for s in SHARED}, threads, None)
            write_json(self.before / "done.json", {})


def make_trials(
    run: Path,
    align: tuple[str, ...],
    conditions: Mapping[str, Mapping[str, Config]],
    grid: Mapping[str, list[Any]],
    seeds: list[int],
) -> list[Trial]:
    """All conditions with all values of the grid, seed by seed, so that a study that stops early is balanced.

    Args:
        run: folder of the study.
        align: config files of `lrlhf align`.
        conditions: by name, what each changes, by stage.
        grid: values by stage and key, such as rl.model.init_args.lora.r.
        seeds: of the last stage.

    Raises:
        UserError: a condition or a key of the grid names no stage.
    """
    for what, stage in [(n, s) for n, changes in conditions.items() for s in changes] + [(k, k) for k in grid]:
        if stage.partition(".")[0] not in STAGES:
            raise UserError(f"study: {what!r} changes {stage!r}; begin with a stage: {', '.join(STAGES)}.")
    shared = {stage: files for stage, files in stages_of(align).items() if stage in SHARED}
    contents = _texts(file for files in shared.values() for file in files)
    trials = []
    for seed, name, values in product(seeds, conditions or {"": {}}, product(*grid.values())):
        factors = tuple(zip(grid, values, strict=True))
        changes = _nested_keys(conditions.get(name, {}))
        for key, value in factors:
            changes = merged(changes, _nested(key, value))
        told = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in factors)
        condition = f"{name} ({told})" if name and told else name or told
        made_of = [shared, [changes.get(stage) for stage in SHARED], contents]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:8]
        folder = run / "trials" / condition.replace("/", "_") / f"seed-{seed}"
        before = run / "before" / key if shared else None
        trials.append(Trial(condition, factors, seed, folder, align, changes, before))
    return trials


def one_reward_model(trials: Sequence[Trial]) -> bool:
    """Whether the same reward model scores all trials: only then may their learned rewards be compared.

    Args:
        trials: of a study.
    """
    trained = {trial.before for trial in trials} if "reward" in stages_of(trials[0].align) else set()
    return len(trained) <= 1 and _alike(trials, "reward_model", "reward_function", "aggregate")


def one_reference(trials: Sequence[Trial]) -> bool:
    """Whether all trials start from the same model: only then may their win rates over it be compared.

    Args:
        trials: of a study.
    """
    starts = {json.dumps(trial.changes.get("sft"), sort_keys=True, default=str) for trial in trials}
    return len(starts) == 1 and _alike(trials, "base_model", "sft")


def _alike(trials: Sequence[Trial], *keys: str) -> bool:
    """Whether the last stages of trials have the same settings of their modules."""
    models = [trial.changes.get("rl", {}).get("model") for trial in trials]
    settings = [(model.get("init_args") or {}) if isinstance(model, Mapping) else {} for model in models]
    return len({str([given.get(key) for key in keys]) for given in settings}) == 1


def stages_of(align: tuple[str, ...]) -> dict[str, list[str]]:
    """Config files by stage of an align config; later files win.

    Args:
        align: its files.

    Raises:
        UserError: a file that is missing, or no last stage.
    """
    stages = _section(align, "stages")
    found = {stage: files for stage in STAGES if (files := stages.get(stage))}
    if "rl" not in found:
        raise UserError(f"study: align={list(align)} names no config files of stages.rl, which the trials repeat.")
    return found


def compare_of(align: tuple[str, ...]) -> Config:
    """What an align config compares afterwards; later files win.

    Args:
        align: its files.

    Raises:
        UserError: a file that is missing.
    """
    return _section(align, "compare")


def files_of(align: tuple[str, ...]) -> dict[str, str]:
    """The text of every config file that an align run reads.

    Args:
        align: its files.
    """
    return _texts([*align, *(file for files in stages_of(align).values() for file in files)])


def merged(below: Config, above: Mapping[str, Any]) -> Config:
    """Nested mappings as one; of two values the one above.

    Args:
        below: is left as it was.
        above: wins.
    """
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _section(align: tuple[str, ...], key: str) -> Config:
    """One key of an align config; later files win, entry by entry."""
    found: Config = {}
    for file in align:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"study: there is no config file {path}.")
        found |= (yaml.safe_load(path.read_text()) or {}).get(key) or {}
    return found


def _texts(files: Iterable[str]) -> dict[str, str]:
    return {file: Path(file).expanduser().read_text() for file in files if Path(file).expanduser().is_file()}


def _nested_keys(config: Mapping[str, Any]) -> Config:
    """A config whose keys may have dots as nested mappings."""
    result: Config = {}
    for key, value in config.items():
        result = merged(result, _nested(key, _nested_keys(value) if isinstance(value, Mapping) else value))
    return result


def _nested(key: str, value: Any) -> Config:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _align(
    align: tuple[str, ...], folder: Path, stages: Config, changes: Mapping[str, Config], threads: int | None, seed: Any
) -> None:
    """Run `lrlhf align` in a process that dies with this one; its output goes to log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    files = stages_of(align)
    for stage, change in changes.items():
        if stage in files and change:
            path = folder / f"{stage}.yaml"
            path.write_text(yaml.safe_dump(dict(change), sort_keys=False))
            stages = {**stages, stage: [*files[stage], str(path)]}
    config = {"run": str(folder), "stages": stages} | ({} if seed is None else {"seed": seed})
    (folder / "align.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = [word for file in (*align, str(folder / "align.yaml")) for word in ("--config", file)]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    log = folder / "log.txt"
    with log.open("a") as file:
        command = [sys.executable, "-m", "lrlhf", "align", *words]
        ended = subprocess.run(command, stdout=file, stderr=file, env=environment, preexec_fn=_die_with_parent)
    if ended.returncode:
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "it said nothing")
        raise UserError(f"{folder} failed ({last.removeprefix('lrlhf: error: ')}); {log} tells more.")


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
