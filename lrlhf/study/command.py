"""`lrlhf study`: conditions times seeds, each an align run; tables, and a page with the comparisons that were named."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt, register_type
from tqdm import tqdm

from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.files import write_json
from lrlhf.report.report import write_study
from lrlhf.study.results import collect
from lrlhf.study.trials import Trial, compare_of, make_trials, one_reference, one_reward_model

DESCRIPTION = """Conditions and a grid of config keys, times seeds. Each trial is an align run in a folder of its own
and goes on where it was interrupted; the same command again runs what is missing."""


class Plain:
    """Keys and values as they stand in the file: what they name by class path is the trials' to make.

    Args:
        keys: a mapping.
    """

    def __init__(self, keys: Any = None):
        if keys is not None and not isinstance(keys, dict):
            raise ValueError("expected keys and values")
        self.keys: dict[str, Any] = dict(keys or {})

    def __repr__(self) -> str:
        """As in a file, for --help."""
        return str(self.keys)


register_type(Plain, serializer=lambda plain: plain.keys, deserializer=Plain)


@dataclass(frozen=True)
class Study:
    """What a study is made of."""

    align: list[str]
    """Config files of `lrlhf align`. Its SFT and reward model are trained once for all trials that do not change them;
    its last stage is what a trial repeats."""
    run: str = "runs/study"
    """Folder of the study."""
    conditions: Plain = field(default_factory=Plain)
    """By name: what each changes in the config of a stage, such as {rl: {model: {...}}}."""
    grid: Plain = field(default_factory=Plain)
    """Values by stage and key, such as rl.model.init_args.lora.r; every condition is run with each."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of the last stage."""
    comparisons: list[list[str]] = field(default_factory=list)
    """Pairs of conditions, named before the runs: only these are tested, together."""
    outcome: Literal["gold", "learned", "judged"] = "gold"
    """What they are compared by: the gold reward, the learned one, or the win rate over the reference by
    compare.judge of align."""
    effect: PositiveFloat = 0.05
    """A difference of the outcome worth finding, for the line on how many seeds that takes."""
    workers: PositiveInt = 1
    """Trials at once on this machine."""
    cluster: Literal["slurm", "local"] | None = None
    """Submit the trials as one job array by submitit instead: to SLURM, or to processes here."""
    submit: Plain = field(default_factory=Plain)
    """Parameters of submitit, such as {timeout_min: 600, slurm_partition: gpu, gpus_per_node: 1}."""

    def trials(self) -> list[Trial]:
        """All trials.

        Raises:
            UserError: a condition that is no config of stages, a grid without values, or a comparison of a condition
                that there is not.
        """
        for name, changes in self.conditions.keys.items():
            if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
                raise UserError(
                    f"study: conditions.{name}: expected stages with their configs, as in rl: {{model: ...}}."
                )
        for key, values in self.grid.keys.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"study: grid.{key}: expected a list of values, got {values!r}.")
        found = make_trials(
            Path(self.run).expanduser(), tuple(self.align), self.conditions.keys, self.grid.keys, self.seeds
        )
        names = list(dict.fromkeys(trial.condition for trial in found))
        for pair in self.comparisons:
            if len(pair) != 2 or not set(pair) <= set(names) or pair[0] == pair[1]:
                raise UserError(f"study: comparisons: {pair} is no pair of two of the conditions {', '.join(names)}.")
        self._check_outcome(found)
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"study: seeds={self.seeds}: name each once, and one at least.")
        return found

    def _check_outcome(self, trials: list[Trial]) -> None:
        """Refuse an outcome that is not measured, or that would not mean the same in all conditions."""
        measured = {"gold": "gold", "judged": "judge"}.get(self.outcome)
        if measured and not compare_of(tuple(self.align)).get(measured):
            raise UserError(
                f"study: outcome={self.outcome}: no file of align has compare.{measured}; add it, or choose another "
                "outcome."
            )
        if self.outcome == "learned" and not one_reward_model(trials):
            raise UserError(
                "study: outcome=learned: these conditions have reward models of their own, whose scores have no common "
                "scale; compare by gold, or by a judge (judged)."
            )
        if self.outcome == "judged" and not one_reference(trials):
            raise UserError(
                "study: outcome=judged: these conditions start from models of their own, so that each would be judged "
                "against another reference; compare by gold."
            )


def read(arguments: list[str]) -> Study:
    """From the command line and the files that it names.

    Raises:
        UserError: an unknown option or key, or a value of another kind.
    """
    parser = CommandParser("study", DESCRIPTION)
    parser.add_class_arguments(Study)
    values = parser.parse_args(arguments).as_dict()
    values.pop("config", None)
    return Study(**values)


def main(arguments: list[str]) -> None:
    """Run the trials that are not done, and write tables and page of all that are.

    Raises:
        UserError: a bad option, or a trial that failed; the others were run.
    """
    study = read(arguments)
    run, trials = Path(study.run).expanduser(), study.trials()
    register(study, run, trials)
    pending = [trial for trial in trials if not trial.is_done()]
    done = len(trials) - len(pending)
    print(f"study: {len(trials)} trials, {done} done already, in {run}")
    failed = []
    for error in tqdm(runner(study, pending), total=len(trials), initial=done, desc="trials", smoothing=0):
        failed += [error] if error else []
        collect(run, trials)
    if collect(run, trials):
        write_study(run)
    if failed:
        raise UserError(f"study: {len(failed)} of {len(trials)} trials failed, first {failed[0]}")


def runner(study: Study, pending: list[Trial]) -> Iterator[str | None]:
    """Run trials; of each, when it ends, nothing or how it failed.

    Args:
        study: says where.
        pending: the trials to run.
    """
    firsts = {trial.before: trial for trial in pending}
    if study.cluster is None:
        threads = max(1, torch.get_num_threads() // study.workers) if study.workers > 1 else None
        pool = ThreadPoolExecutor(study.workers)
        try:
            alone = len(firsts) == 1
            prepared = [pool.submit(first.prepare, None if alone else threads) for first in firsts.values()]
            broken = _broken(firsts, [future.result for future in prepared])
            yield from _named(pending, broken)
            futures = [pool.submit(trial.run, threads) for trial in pending if trial.before not in broken]
            for future in as_completed(futures):
                yield _failure(future.result)
        finally:
            pool.shutdown(cancel_futures=True)
        return
    import submitit

    executor = submitit.AutoExecutor(Path(study.run).expanduser() / "jobs", cluster=study.cluster)
    executor.update_parameters(**{"name": "lrlhf-study", "timeout_min": 24 * 60, **study.submit.keys})
    broken = _broken(firsts, [job.result for job in executor.map_array(Job("prepare"), list(firsts.values()))])
    yield from _named(pending, broken)
    for job in executor.map_array(Job("run"), [trial for trial in pending if trial.before not in broken]):
        yield _failure(job.result)


def _broken(firsts: Iterable[Path | None], results: Iterable[Callable[[], Any]]) -> dict[Path | None, str]:
    """Of the stages that trials share: those that failed, and how."""
    failures = zip(firsts, map(_failure, results), strict=True)
    return {before: failure for before, failure in failures if failure}


def _named(pending: list[Trial], broken: dict[Path | None, str]) -> list[str]:
    """How the trials failed whose shared stages did."""
    return [f"{trial.folder}: {broken[trial.before]}" for trial in pending if trial.before in broken]


@dataclass(frozen=True)
class Job:
    """What a cluster runs for a trial: one of its methods."""

    method: str

    def __call__(self, trial: Trial) -> None:
        """Run it."""
        getattr(trial, self.method)()

    def checkpoint(self, trial: Trial) -> Any:
        """When the cluster takes the machine away: queue it again; its run goes on from its last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, trial)


def register(study: Study, run: Path, trials: list[Trial]) -> None:
    """Write study.json: the comparisons, how many trials had been seen when they were named, and the first seeds.

    Comparisons of conditions that have changed since are named anew.

    Args:
        study: to register.
        run: its folder.
        trials: of it.
    """
    path = run / "study.json"
    plan: dict[str, Any] = {key: getattr(study, key) for key in ("align", "seeds", "outcome", "effect", "comparisons")}
    plan |= {
        "conditions": study.conditions.keys,
        "grid": study.grid.keys,
        "one_reward_model": one_reward_model(trials),
        "order": list(dict.fromkeys(trial.condition for trial in trials)),
    }
    before = json.loads(path.read_text()) if path.is_file() else {}
    there, here = before.get("conditions", {}), study.conditions.keys
    same = all(before.get(key) == plan[key] for key in ("align", "grid", "comparisons", "outcome")) and all(
        there[name] == here[name] for name in there.keys() & here.keys()
    )
    ran = sum((trial.folder / "trial.json").is_file() for trial in trials)  # as they are configured now or were before
    seen = before["trials_seen"] if same else ran
    named = before["named"] if same else time.strftime("%Y-%m-%d %H:%M")
    first = before.get("first_seeds", study.seeds) if any(trial.is_done() for trial in trials) else study.seeds
    write_json(path, plan | {"trials_seen": seen, "named": named, "first_seeds": first})


def _failure(result: Callable[[], Any]) -> str | None:
    try:
        result()
    except Exception as error:
        return str(error)
    return None
