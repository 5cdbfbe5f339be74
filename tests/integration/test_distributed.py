"""Two processes, sharded or not, train what one process trains."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lrlhf import LoRA, PPOPolicy, RolloutCallback, UserError
from lrlhf.cli.verify_resume import differences
from lrlhf.run.checkpoints import checkpoint_path, load, newest_checkpoint
from tests.integration.processes import fit, fit_here, start, wait
from tests.integration.soak_resume import METHODS, write_configs
from tests.modules.helpers import ppo, prompt_data

STRATEGIES = ("ddp", "fsdp2", "fsdp2_by_layer")

TOLERANCE = 2e-5
"""fp32: sums in another order, through Adam's division by small numbers."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The configs of the soak, without what draws for itself: dropout and the callbacks that are there to draw."""
    paths = write_configs(tmp_path_factory.mktemp("configs"))
    for kind, path in paths.items():
        values = yaml.safe_load(path.read_text())
        values["model"]["init_args"]["lora"]["dropout"] = 0.0
        values["model"]["init_args"]["micro_batch_size"] = 3
        kept = [c for c in values["trainer"]["callbacks"] if "tests." not in c["class_path"]]
        draws_curves = [{"class_path": "lrlhf.WinRateCallback"}] if kind == "PPOPolicy" else []
        values["trainer"]["callbacks"] = kept + draws_curves
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
    return {kind: run(configs[kind], folder / kind) for kind in ("SFT", "RewardModel", "PPOPolicy")}


def metrics(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "metrics.csv").open() as file:
        return {(f"{i}", key): float(v) for i, row in enumerate(csv.DictReader(file)) for key, v in row.items() if v}


def assert_same_run(one: Path, other: Path, tolerance: float = TOLERANCE, but: Sequence[str] = ()) -> None:
    here, there = (load(newest_checkpoint(folder)) for folder in (one, other))
    assert here["lrlhf"] == there["lrlhf"]
    assert here["state_dict"].keys() == there["state_dict"].keys()
    for name, tensor in here["state_dict"].items():
        torch.testing.assert_close(there["state_dict"][name], tensor, atol=tolerance, rtol=1e-3)
    expected, found = metrics(one), metrics(other)
    assert expected.keys() == found.keys()
    for key, value in ((key, value) for key, value in expected.items() if key[1] not in but):
        assert found[key] == pytest.approx(value, abs=2e-4, rel=2e-3, nan_ok=True), key


slow = pytest.mark.slow
WHOLE = ("--model.init_args.lora", "null", "--model.init_args.optimizer.init_args.lr", "1e-3")
"""Full fine-tuning."""


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("SFT", "ddp"),
        ("RewardModel", "fsdp2"),
        *(("PPOPolicy", strategy) for strategy in STRATEGIES),
        pytest.param("SFT", "fsdp2", marks=slow),
        pytest.param("SFT", "fsdp2_by_layer", marks=slow),
        pytest.param("RewardModel", "ddp", marks=slow),
        pytest.param("RewardModel", "fsdp2_by_layer", marks=slow),
    ],
)
def test_two_processes_train_what_one_trains(kind, strategy, configs, alone, tmp_path):
    assert_same_run(alone[kind], run(configs[kind], tmp_path / "run", 2, "--trainer.strategy", strategy))


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("RLOO", "ddp"),
        ("DPO", "fsdp2"),
        *(
            pytest.param(method, strategy, marks=slow)
            for method in METHODS
            for strategy in STRATEGIES
            if (method, strategy) not in [("RLOO", "ddp"), ("DPO", "fsdp2")]
        ),
    ],
)
def test_two_processes_train_by_a_method_what_one_trains(method, strategy, configs, tmp_path):
    one = run(configs[method], tmp_path / "one")
    two = run(configs[method], tmp_path / "two", 2, "--trainer.strategy", strategy)
    # a hundredth of Adam's step, which does not get smaller where gradients do; DPO's first pairs are undecided, so
    # that rounding decides whether they count as right
    assert_same_run(one, two, tolerance=1e-4, but=["train/accuracy"] if method == "DPO" else [])


@pytest.mark.parametrize(
    "strategy", ["fsdp2", pytest.param("ddp", marks=slow), pytest.param("fsdp2_by_layer", marks=slow)]
)
def test_two_processes_with_a_base_in_four_bits_train_what_one_trains(strategy, configs, tmp_path):
    options = ("--model.init_args.quantize.kind", "nf4")
    one = run(configs["PPOPolicy"], tmp_path / "one", 1, *options)
    assert_same_run(one, run(configs["PPOPolicy"], tmp_path / "two", 2, "--trainer.strategy", strategy, *options))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("PPOPolicy", "fsdp2_by_layer"),
        pytest.param("SFT", "fsdp2_by_layer", marks=slow),
        pytest.param("RewardModel", "fsdp2", marks=slow),
        pytest.param("PPOPolicy", "fsdp2", marks=slow),
        pytest.param("PPOPolicy", "ddp", marks=slow),
    ],
)
def test_two_processes_train_whole_models_as_one_does(kind, strategy, configs, tmp_path):
    """Sharded with gradients and optimizer; checkpoint and hand-over are whole."""
    one = run(configs[kind], tmp_path / "one", 1, *WHOLE)
    two = run(configs[kind], tmp_path / "two", 2, "--trainer.strategy", strategy, *WHOLE)
    assert_same_run(one, two, 1e-4)
    (here, there) = (load_file(folder / "handover/model/model.safetensors") for folder in (one, two))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [("fsdp2_by_layer", None), (None, "fsdp2_by_layer"), ("fsdp2_by_layer",) * 2])
def test_whole_models_go_on_in_another_number_of_processes(strategies, configs, tmp_path):
    """With Adam's moments: from two that were sharded to one, the other way round, and from two to two."""
    whole, folder = run(configs["PPOPolicy"], tmp_path / "whole", 1, *WHOLE), tmp_path / "run"
    for epochs, strategy in zip(("1", "2"), strategies, strict=True):
        spread = ("--trainer.strategy", strategy) if strategy else ()
        run(configs["PPOPolicy"], folder, 2 if strategy else 1, "--trainer.max_epochs", epochs, *spread, *WHOLE)
    assert_same_run(whole, folder, 1e-4)


class Held(RolloutCallback):
    """Writes how many numbers of the optimizer each process holds, and how many there are."""

    def on_train_batch_end(self, trainer, policy, *_):
        states = [t for state in trainer.optimizers[0].state.values() for t in state.values() if isinstance(t, DTensor)]
        local, full = sum(t.to_local().numel() for t in states), sum(t.numel() for t in states)
        Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        (Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json").write_text(json.dumps([local, full]))


def test_a_process_holds_its_part_of_the_optimizer_of_whole_models(configs, tmp_path):
    values = yaml.safe_load(configs["PPOPolicy"].read_text())
    values["trainer"]["callbacks"].append({"class_path": f"{__name__}.Held"})
    (tmp_path / "held.yaml").write_text(yaml.safe_dump(values))
    short = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.strategy", "fsdp2_by_layer")
    folder = run(tmp_path / "held.yaml", tmp_path / "run", 2, *short, *WHOLE)
    parts = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert parts[0][1] == parts[1][1] == sum(local for local, _ in parts) > 0
    assert max(local for local, _ in parts) <= 0.52 * parts[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_processes_train_what_one_trains(strategy, configs, alone, tmp_path):
    assert_same_run(alone["PPOPolicy"], run(configs["PPOPolicy"], tmp_path / "run", 4, "--trainer.strategy", strategy))


@slow
def test_torchrun_starts_the_processes(configs, alone, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lrlhf",
        "fit", "--config", str(configs["SFT"]), "--trainer.default_root_dir", str(folder),
        "--trainer.devices", "2", "--trainer.strategy", "fsdp2",
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(alone["SFT"], folder)


@pytest.mark.slow
def test_lightning_starts_the_processes_itself(configs, alone, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "lrlhf", "fit", "--config", str(configs["SFT"]), "--trainer.default_root_dir",
        str(folder), "--trainer.devices", "2", "--trainer.strategy", "ddp",
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(alone["SFT"], folder)


def test_a_process_without_a_row_of_the_last_batch_takes_part(configs, tmp_path):
    """25 rows in batches of 8: the last batch has one row, and so has the last of validation."""
    options = ("--trainer.limit_train_batches", "4", "--trainer.max_epochs", "1", "--data.init_args.val_limit", "5")
    alone = run(configs["SFT"], tmp_path / "alone", 1, *options)
    for strategy in ("ddp", "fsdp2"):
        assert_same_run(alone, run(configs["SFT"], tmp_path / strategy, 2, "--trainer.strategy", strategy, *options))


class OneEndsAtOnce(PPOPolicy):
    """Every response of the second process ends with its first token, and none of the first process ends."""

    def configure_model(self):
        super().configure_model()
        self.stop_ids = torch.arange(300) if self.global_rank else torch.tensor([9999])


@pytest.mark.parametrize(
    "strategy", [pytest.param("ddp", marks=slow), pytest.param("fsdp2", marks=slow), "fsdp2_by_layer"]
)
def test_a_process_whose_responses_are_all_short_does_not_hang_the_other(strategy, configs, tmp_path):
    name = f"{__name__}.OneEndsAtOnce"
    folder = run(configs["PPOPolicy"], tmp_path / "run", 2, "--trainer.strategy", strategy, "--model", name)
    assert {v for (_, key), v in metrics(folder).items() if key == "train/length"} == {3.0}  # the mean of 1 and 5


def test_the_word_fsdp_is_run_as_fsdp2_and_says_so(configs, alone, tmp_path):
    folder = run(configs["SFT"], tmp_path / "run", 2, "--trainer.strategy", "fsdp")
    assert "fsdp is run as fsdp2" in folder.with_suffix(".log").read_text()
    assert_same_run(alone["SFT"], folder)


def start_and_kill(config: Path, folder: Path, iteration: int, victims: slice, *options: str) -> list[int]:
    """Two processes, of which some are killed (-9) as soon as an iteration is saved. Exit codes of both."""
    arguments = ["--config", str(config), "--trainer.default_root_dir", str(folder), "--trainer.devices", "2", *options]
    children = start(lambda: fit_here(arguments), folder.with_suffix(".log"), 2)
    end = time.monotonic() + 60
    while not checkpoint_path(folder, iteration).is_file() and time.monotonic() < end:
        time.sleep(0.0005)
    for child in children[victims]:
        os.kill(child, signal.SIGKILL)
    return wait(children, 60)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """The configs of the soak as they are: dropout, and callbacks that draw."""
    return write_configs(tmp_path_factory.mktemp("drawing"))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("PPOPolicy", "fsdp2"),
        *(pytest.param(*of, marks=slow) for of in (("PPOPolicy", "ddp"), ("SFT", "ddp"), ("SFT", "fsdp2"))),
    ],
)
def test_a_killed_process_ends_the_other_and_the_run_resumes_bit_for_bit(kind, strategy, drawing, tmp_path):
    options = ("--trainer.strategy", strategy)
    whole = run(drawing[kind], tmp_path / "whole", 2, *options)
    survivor, victim = start_and_kill(drawing[kind], tmp_path / "killed", 3, slice(1, 2), *options)
    assert victim == -signal.SIGKILL
    assert survivor not in (0, -signal.SIGKILL), "the survivor must end by itself, with an error"
    assert 3 <= load(newest_checkpoint(tmp_path / "killed"))["lrlhf"]["iteration"] < 6
    differing, compared = differences(whole, run(drawing[kind], tmp_path / "killed", 2, *options))
    assert differing == []
    assert compared > 500


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, "fsdp2"),
        ("fsdp2", 1),
        pytest.param("ddp", 1, marks=slow),
        pytest.param("fsdp2", "ddp", marks=slow),
        pytest.param("ddp", "fsdp2", marks=slow),
    ],
)
def test_a_run_moves_between_one_device_and_two(before, after, configs, alone, tmp_path):
    def options(where) -> tuple:
        return () if where == 1 else ("--trainer.strategy", where)

    folder, config = tmp_path / "run", configs["PPOPolicy"]
    if before == 1:
        from tests.integration.soak_resume import launch_and_kill_at

        launch_and_kill_at(config, folder, 3)
    else:
        start_and_kill(config, folder, 3, slice(0, 2), *options(before))
    assert load(newest_checkpoint(folder))["lrlhf"]["iteration"] < 6
    assert_same_run(alone["PPOPolicy"], run(config, folder, 1 if after == 1 else 2, *options(after)))
    if 1 in (before, after):
        counts = (1, 2) if before == 1 else (2, 1)
        said = "Saved by {} processes, gone on by {}: dropout".format(*counts)
        assert said in folder.with_suffix(".log").read_text()


class Bytes(RolloutCallback):
    """Writes what each process holds of the base, inside a rollout and after an iteration, and its adapters."""

    def on_rollout_end(self, trainer, policy, rollout, rewards):
        self.gathered = held(policy.backbone)

    def on_train_batch_end(self, trainer, policy, *_):
        trained = [p.detach().double().sum().item() for p in policy.backbone.trainable()]
        found = {"rollout": self.gathered, "rest": held(policy.backbone), "trained": trained}
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"bytes-{trainer.global_rank}.json").write_text(json.dumps(found))


def held(backbone) -> int:
    """Bytes of the base that lie on this process; a tied weight counts once."""
    tensors = {id(p): p for name, p in backbone.named_parameters() if "lora_" not in name and "heads." not in name}
    local = [p.to_local() if isinstance(p, DTensor) else p for p in tensors.values()]
    return sum(p.numel() * p.element_size() for p in local)


@pytest.mark.parametrize(
    ("options", "share"),
    [((), 0.75), pytest.param(("--model.init_args.quantize.kind", "nf4"), 0.9, marks=slow)],
)
def test_a_process_holds_its_part_of_the_base_and_all_that_trains(options, share, configs, tmp_path):
    values = yaml.safe_load(configs["PPOPolicy"].read_text())
    values["trainer"]["callbacks"].append({"class_path": f"{__name__}.Bytes"})
    config = tmp_path / "bytes.yaml"
    config.write_text(yaml.safe_dump(values))
    found = {}
    for strategy in STRATEGIES:
        short = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
        folder = run(config, tmp_path / strategy, 2, "--trainer.strategy", strategy, *short, *options)
        found[strategy] = [json.loads((folder / f"bytes-{rank}.json").read_text()) for rank in (0, 1)]
        assert found[strategy][0]["trained"] == found[strategy][1]["trained"]
    whole = found["ddp"][0]["rest"]
    for rank in (0, 1):
        assert found["fsdp2"][rank]["rest"] <= 0.52 * whole
        assert found["fsdp2"][rank]["rollout"] == whole
        assert found["fsdp2_by_layer"][rank]["rollout"] < share * whole  # embeddings, and half of the layers


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model.init_args.ppo.minibatch_size", "1"), "model.ppo.minibatch_size=1 does not divide among 2 processes"),
        (
            ("--data.init_args.batch_size", "9", "--model.init_args.ppo.minibatch_size", "9"),
            "batch_size=9 does not divide",
        ),
        (("--trainer.gradient_clip_val", "1.0"), "set model.max_grad_norm instead"),
        (("--model.init_args.quantize.kind", "int8", "--trainer.strategy", "fsdp2"), "does not shard a base in int8"),
    ],
)
def test_what_two_processes_cannot_do_is_refused_at_once(options, sentence, configs, tmp_path):
    log = tmp_path / "run.log"
    arguments = ["--config", str(configs["PPOPolicy"]), "--trainer.default_root_dir", str(tmp_path / "run")]
    codes = fit([*arguments, "--trainer.strategy", "ddp", *options], log, 2)
    assert 0 not in codes
    assert sentence in log.read_text()
    assert "Traceback" not in log.read_text()


class OnCPU(FSDPStrategy):
    """Lightning refuses its own class without a GPU, and lets a subclass pass."""


def test_lightning_s_own_fsdp_is_refused_in_code(tiny_llama):
    module = ppo(tiny_llama, lora=LoRA(r=2))
    module.trainer = L.Trainer(accelerator="cpu", strategy=OnCPU(), logger=False)
    with pytest.raises(UserError, match="use ddp or fsdp2"):
        module.setup("fit")


def test_a_trainer_that_would_share_out_the_rows_again_is_refused(tiny_llama, data_files):
    data = prompt_data(tiny_llama, data_files)
    data.trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(UserError, match="use_distributed_sampler=False"):
        data.setup("fit")
