"""What a cluster does to a run, without one: two rendezvous agents, and SLURM's signal, requeue and restart."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrlhf.run.checkpoints import checkpoint_path, load, newest_checkpoint
from tests.integration.test_distributed import alone, assert_same_run, configs

__all__ = ["alone", "configs"]


def ended(process: subprocess.Popen, timeout: float = 120) -> str:
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.mark.slow
def test_two_rendezvous_hosts_train_what_one_process_trains(configs, alone, tmp_path):
    """As two nodes: each has an agent of its own, and they find each other at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-id", "run1", "-m", "lrlhf",
        "fit", "--config", str(configs["SFT"]), "--trainer.default_root_dir", str(tmp_path / "run"),
        "--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "fsdp2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for agent in agents:
        ended(agent)
    assert_same_run(alone["SFT"], tmp_path / "run")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a job of one task, and an scontrol that notes what it is asked."""
    noted = tmp_path / "scontrol.log"
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n')
    scontrol.chmod(0o755)
    (tmp_path / "bin/srun").symlink_to(scontrol)
    job = {"JOB_ID": "77", "JOB_NAME": "ppo", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return noted


@pytest.mark.slow
@pytest.mark.parametrize(("number", "asked"), [(signal.SIGUSR1, "requeue 77\n"), (signal.SIGTERM, "")])
def test_a_job_whose_time_is_up_saves_asks_to_be_queued_again_and_goes_on(
    number, asked, slurm, configs, alone, tmp_path
):
    """SIGUSR1 is the announced end, after which the job queues itself; SIGTERM is preemption, where SLURM does."""
    folder = tmp_path / "run"
    words = ["fit", "--config", str(configs["PPOPolicy"]), "--trainer.default_root_dir", str(folder)]
    command = [sys.executable, "-m", "lrlhf", *words]
    with Path(tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        while not checkpoint_path(folder, 2).is_file() and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(number)
        first.wait(60)
    done = load(newest_checkpoint(folder))["lrlhf"]["iteration"]
    assert 2 <= done < 6, (tmp_path / "log").read_text()[-2000:]
    assert (slurm.read_text() if slurm.exists() else "") == asked
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert_same_run(alone["PPOPolicy"], folder)
