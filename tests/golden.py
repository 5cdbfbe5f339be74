"""The golden trace: ten iterations of each stage, number by number, as a guard for changes that must change no number.

`python -m tests.golden` trains a tiny LLaMA (fp32, one thread) through SFT, reward model and PPO and writes
tests/golden.json anew; tests/test_golden.py trains it again and compares. On another processor sums come out in another
order, so there the numbers are held to 1e-6, relative; the hashes are those of the processor that the file names.
"""

import hashlib
import json
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from lrlhf import SFT, AlpacaDataModule, DivergenceCallback, LoRA, MissingEOSPenalty, RewardModel, RolloutCallback
from lrlhf.functional import exact_kl, js
from tests.conftest import WORDS, save_tiny_llama, write_jsonl
from tests.modules.helpers import adamw, ppo, prompt_data, trainer

FILE = Path(__file__).with_name("golden.json")


class Recorder(RolloutCallback):
    """Of each rollout the tokens, scores and rewards, and sums over the response tokens."""

    def __init__(self):
        self.rollouts: list[dict[str, Any]] = []

    def on_rollout_end(self, trainer, policy, rollout, rewards):
        sums = {name: getattr(rollout, name).double().sum().item() for name in ("logprobs", "values")}
        tokens = hashlib.sha256(rollout.response_ids.numpy().tobytes()).hexdigest()[:16]
        scores = {"scores": rollout.scores.tolist(), "rewards": rewards.double().sum(-1).tolist()}
        self.rollouts.append({"tokens": tokens, **sums, **scores})


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "", ""

    def __init__(self):
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *_, **__):
        pass


def processor() -> str:
    """The model of this machine's processor, and what PyTorch uses of it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.is_file() else None
    return f"{found[1] if found else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def fit(module: Any, data: Any, folder: Path, *callbacks: Any) -> dict[str, Any]:
    """Ten iterations: what was logged, and the weights that were trained, as a hash and as a sum of squares."""
    torch.manual_seed(0)
    logger = Rows()
    trainer(folder, logger=logger, log_every_n_steps=1, enable_checkpointing=False, callbacks=list(callbacks)).fit(
        module, data
    )
    weights = [p.detach() for p in module.backbone.trainable()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights)).hexdigest()[:16]
    squares = sum(tensor.double().square().sum().item() for tensor in weights)
    return {"iterations": logger.rows, "weights": squares, "hash": digest}


def record(folder: Path) -> dict[str, Any]:
    """The trace of the three stages, trained in `folder`."""
    base = str(save_tiny_llama(folder / "model"))
    texts = [f"{WORDS[i % 8]} {WORDS[(i * 3) % 8]} {i}" for i in range(80)]
    rows = {
        "sft": [{"instruction": text, "output": text[:5]} for text in texts],
        "pairs": [{"instruction": t, "chosen": f"yes {t[:3]}", "rejected": t[-4:], "margin": 0.1} for t in texts],
        "prompts": [{"instruction": text} for text in texts],
    }
    files = {name: write_jsonl(folder / f"{name}.jsonl", found) for name, found in rows.items()}
    learning: Any = {"base_model": base, "lora": LoRA(r=2, alpha=4, dropout=0.1), "optimizer": adamw(1e-3)}
    data: Any = {"tokenizer": base, "batch_size": 8}
    sft, reward = str(folder / "sft/handover"), str(folder / "reward/handover")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trace = {
        "sft": fit(SFT(**learning, micro_batch_size=3), AlpacaDataModule(train=files["sft"], **data), folder / "sft"),
        "reward": fit(
            RewardModel(**learning, sft=sft, micro_batch_size=3, centering=0.01),
            AlpacaDataModule(train=files["pairs"], task="preference", **data),
            folder / "reward",
        ),
    }
    recorder = Recorder()
    trace["ppo"] = fit(
        ppo(base, lr=1e-3, reward_function=None, reward_model=reward, sft=sft),
        prompt_data(base, files),
        folder / "ppo",
        DivergenceCallback(js, 0.05, also_log=[exact_kl]),
        MissingEOSPenalty(),
        recorder,
    )
    torch.set_num_threads(threads)
    return trace | {"rollouts": recorder.rollouts}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = {"processor": processor(), "trace": record(Path(temporary))}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Wrote {FILE}")
