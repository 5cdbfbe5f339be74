"""Kill runs with kill -9 at random moments, start them again until they end, and compare with uninterrupted runs.

    python -m tests.integration.soak_resume --kills 100

Tiny models on CPU; each launch is a fork of this process, so that a kill costs a fraction of a second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
import yaml

from lrlhf import RolloutCallback
from lrlhf.cli.verify_resume import differences
from lrlhf.run.checkpoints import all_checkpoints, checkpoint_path, newest_checkpoint
from tests.conftest import save_tiny_llama, write_jsonl
from tests.integration.processes import fit_here, start

ROWS = [f"{a} {b}" for a in ("sun", "rain", "tea", "cat", "road") for b in ("one", "two", "six", "ten", "all")]


class Draws(L.Callback):
    """A user's callback with a generator of each kind: it counts, draws, and writes what it drew into the metrics."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.count += 1
        draws = random.random() + float(np.random.rand()) + float(torch.rand(()))
        pl_module.log("draws", draws + self.count)

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict) -> None:
        self.count = state_dict["count"]


class NoisyReward(RolloutCallback):
    """A user's reward with a generator of its own, which it saves."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def shape_rewards(self, trainer, policy, rollout, rewards):
        return rewards + 0.1 * torch.rand(rewards.shape, generator=self.generator) * rollout.response_mask

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.generator.set_state(state_dict["generator"])


def count_vowels(prompts: list[str], responses: list[str]) -> torch.Tensor:
    """A reward that the tiny model can learn."""
    return torch.tensor([sum(c in "aeiou" for c in text) / (1 + len(text)) for text in responses])


GROUPS = ("RLOO", "GRPO", "ExpertIteration")
METHODS = ("RewardEnsemble", "DPO", *GROUPS)
"""What there is beside the three stages of the paper."""
OWN = {
    "PPOPolicy": {"ppo": {"minibatch_size": 4}},
    "RLOO": {"updates": {"minibatch_size": 4, "inner_epochs": 2}},
    # not scaled: dividing by a deviation near 0 makes rounding of the penalty large where scores tie
    "GRPO": {
        "updates": {"minibatch_size": 4, "inner_epochs": 2},
        "divergence_coefficient": 0.1,
        "scale_advantages": False,
    },
    "ExpertIteration": {"minibatch_size": 2},
}


def write_configs(folder: Path) -> dict[str, Path]:
    """Configs of the stages and methods that use every kind of state: two epochs, validation inside and at the end
    of an epoch, dropout, an adaptive coefficient, running moments, and callbacks that draw."""
    base = str(save_tiny_llama(folder / "base"))
    sft = [{"instruction": row, "output": row[:3]} for row in ROWS]
    pairs = [{"instruction": row, "output_1": "yes " + row[:2], "output_2": "no", "preference": 1} for row in ROWS]
    files = {"SFT": write_jsonl(folder / "sft.jsonl", sft), "RewardModel": write_jsonl(folder / "pairs.jsonl", pairs)}
    files["PPOPolicy"] = write_jsonl(folder / "prompts.jsonl", [{"instruction": row} for row in ROWS])
    files |= dict.fromkeys(("RewardEnsemble", "DPO"), files["RewardModel"])
    files |= dict.fromkeys(GROUPS, files["PPOPolicy"])
    draws = {"class_path": "tests.integration.soak_resume.Draws"}
    checkpoints = {"class_path": "lrlhf.Checkpoints"}
    rollout = [
        {"class_path": "lrlhf.NormalizeScores"},
        {
            "class_path": "lrlhf.DivergenceCallback",
            "init_args": {
                "coefficient": {
                    "class_path": "lrlhf.AdaptiveCoefficient",
                    "init_args": {"target": 0.01, "initial": 0.1, "rate": 0.5},
                }
            },
        },
        {"class_path": "lrlhf.SampleLog"},
        {"class_path": "tests.integration.soak_resume.NoisyReward"},
    ]
    paths = {}
    for kind, data in files.items():
        ppo = kind in ("PPOPolicy", *GROUPS)
        model = {
            "base_model": base,
            "lora": {"r": 2, "dropout": 0.0 if ppo or kind == "DPO" else 0.2},
            "sampling": {"max_new_tokens": 5},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        }
        if ppo:
            model["reward_function"] = "tests.integration.soak_resume.count_vowels"
            model |= OWN.get(kind, {})
        pairs_or_prompts = ("val/score", "max") if ppo else ("val/accuracy", "max")
        monitor = {kind: pairs_or_prompts} | {"SFT": ("val/loss", "min")}
        checkpoints = {
            "class_path": "lrlhf.Checkpoints",
            "init_args": dict(zip(("monitor", "mode"), monitor[kind], strict=True)),
        }
        values = {
            "seed_everything": 3,
            "trainer": {
                "accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 3, "val_check_interval": 2,
                "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1,
                "log_every_n_steps": 1, "callbacks": [*(rollout if ppo else []), draws, checkpoints],
            },
            "model": {"class_path": f"lrlhf.{kind}", "init_args": model},
            "data": {
                "class_path": "lrlhf.AlpacaDataModule",
                "init_args": {
                    "train": data, "val": data, "val_limit": 4, "batch_size": 8,
                    "responses_per_prompt": 2 if kind in GROUPS else 1,
                },
            },
        }  # fmt: skip
        paths[kind] = folder / f"{kind}.yaml"
        paths[kind].write_text(yaml.safe_dump(values))
    return paths


def launch(config: Path, run: Path, *, kill_after: float | None = None) -> int:
    """Fit in a fork; kill it so many seconds after its set-up began. Returns the fork's wait status."""
    launched = time.time()
    child = _start(config, run)
    began = 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        began = began or (time.monotonic() if _is_newer(run / "config.yaml", launched) else 0.0)
        if kill_after is not None and began and time.monotonic() - began >= kill_after:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)


def _is_newer(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= moment


def launch_and_kill_at(config: Path, run: Path, iteration: int, number: int = signal.SIGKILL) -> int:
    """Fit in a fork and send it a signal as soon as an iteration is saved. Returns the fork's wait status."""
    child = _start(config, run)
    sent = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if not sent and checkpoint_path(run, iteration).is_file():
            os.kill(child, number)
            sent = True
        time.sleep(0.0005)


def _start(config: Path, run: Path) -> int:
    arguments = ["--config", str(config), "--trainer.default_root_dir", str(run)]
    return start(lambda: fit_here(arguments), run.with_suffix(".log"), 1)[0]


def soak(config: Path, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill runs of one config so often; every run that is killed must end as the uninterrupted one.

    Returns:
        kills, runs, and how many kills met a run in its first iteration, between, and while a file was being written.

    Raises:
        AssertionError: a resumed run fails or differs.
    """
    moments = random.Random(seed)
    whole = folder / f"{config.stem}-whole"
    assert launch(config, whole) == 0, whole.with_suffix(".log").read_text()[-2000:]
    seconds = newest_checkpoint(whole).stat().st_mtime - (whole / "config.yaml").stat().st_mtime
    counts = {"kills": 0, "runs": 0, "before the first checkpoint": 0, "while writing": 0, "resumed": 0}
    while counts["kills"] < kills:
        run = folder / f"{config.stem}-killed-{counts['runs']}"
        shutil.rmtree(run, ignore_errors=True)
        counts["runs"] += 1
        while True:
            wanted = counts["kills"] < kills
            status = launch(config, run, kill_after=moments.uniform(0, seconds) if wanted else None)
            if status == 0:
                break
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, run.with_suffix(".log").read_text()[-2000:]
            counts["kills"] += 1
            counts["before the first checkpoint"] += not all_checkpoints(run)
            counts["resumed"] += bool(all_checkpoints(run))
            counts["while writing"] += bool(list(run.rglob("*.part")))
        differing, compared = differences(whole, run)
        assert compared > 50
        assert not differing, f"{run}: {len(differing)} of {compared} differ: {differing[:5]}"
    return counts


def main() -> None:
    """Soak the three stages and print what was survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    from lrlhf.cli.start import quiet

    quiet()
    warm_up()
    with tempfile.TemporaryDirectory() as temporary:
        configs = write_configs(Path(temporary))
        share = -(-options.kills // len(configs))
        for kind, config in configs.items():
            start = time.monotonic()
            counts = soak(config, Path(temporary), share, options.seed)
            print(json.dumps({"stage": kind, "seed": options.seed, **counts, "s": round(time.monotonic() - start)}))


def warm_up() -> None:
    """Import what a fit imports, so that a fork need not."""
    import lrlhf.cli.lightning
    import lrlhf.modules  # noqa: F401


if __name__ == "__main__":
    main()
