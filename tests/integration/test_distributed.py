"""Two processes, sharded or not, train what one process trains."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from lrlhf.checkpoints import load, newest_checkpoint
from tests.integration.processes import fit
from tests.integration.soak_resume import write_configs

STRATEGIES = ("ddp", "fsdp2", "fsdp2_by_layer")

TOLERANCE = 2e-5
"""fp32: sums in another order, through Adam's division by small numbers."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The configs of the soak, without what draws for itself: dropout and the callbacks that are there to draw."""
    paths = write_configs(tmp_path_factory.mktemp("configs"))
    for path in paths.values():
        values = yaml.safe_load(path.read_text())
        values["model"]["init_args"]["lora"]["dropout"] = 0.0
        values["model"]["init_args"]["micro_batch_size"] = 3
        kept = [c for c in values["trainer"]["callbacks"] if "tests." not in c["class_path"]]
        values["trainer"]["callbacks"] = kept
        path.write_text(yaml.safe_dump(values))
    return paths


def run(config: Path, folder: Path, processes: int = 1, *options: str) -> Path:
    log = folder.with_suffix(".log")
    codes = fit(["--config", str(config), "--trainer.default_root_dir", str(folder), *options], log, processes)
    assert codes == [0] * processes, log.read_text()[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, configs):
    folder = tmp_path_factory.mktemp("alone")
    return {kind: run(config, folder / kind) for kind, config in configs.items()}


def metrics(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "metrics.csv").open() as file:
        return {(f"{i}", key): float(v) for i, row in enumerate(csv.DictReader(file)) for key, v in row.items() if v}


def assert_same_run(one: Path, other: Path) -> None:
    here, there = (load(newest_checkpoint(folder)) for folder in (one, other))
    assert here["lrlhf"] == there["lrlhf"]
    assert here["state_dict"].keys() == there["state_dict"].keys()
    for name, tensor in here["state_dict"].items():
        torch.testing.assert_close(there["state_dict"][name], tensor, atol=TOLERANCE, rtol=1e-3)
    expected, found = metrics(one), metrics(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=2e-4, rel=2e-3), key


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["SFT", "RewardModel", "PPOPolicy"])
def test_two_processes_train_what_one_trains(kind, strategy, configs, alone, tmp_path):
    assert_same_run(alone[kind], run(configs[kind], tmp_path / "run", 2, "--trainer.strategy", strategy))
