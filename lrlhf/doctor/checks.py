"""The checks of `lrlhf doctor --check`, each a function of a Workplace that says what it found, or raises.

They run what users run: the engine's passes, stages in a Lightning trainer, and `lrlhf fit` in processes of its own.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lrlhf.callbacks import DivergenceCallback, MissingEOSPenalty
from lrlhf.config import PPO, DType, LoRA, Quantization, Sampling
from lrlhf.datamodules import AlpacaDataModule
from lrlhf.doctor.machine import ppo_job
from lrlhf.doctor.timing import Clock, TimedPPO, products
from lrlhf.memory.measure import bare_trainer, measure, small
from lrlhf.memory.plan import GIB, Plan, memory_of
from lrlhf.memory.rehearsal import no_reward
from lrlhf.model.architecture import text_config
from lrlhf.model.backbone import Backbone
from lrlhf.model.precision import fast_dtype
from lrlhf.model.pretrained import resolve
from lrlhf.modules.reward_model import RewardModel
from lrlhf.modules.self_check import ROUNDING, check_passes, check_policy_is_reference, rounding, unequal_rows
from lrlhf.modules.sft import SFT
from lrlhf.types import Sequences

WORDS = ("sun", "rain", "tea", "cat", "road", "book", "song", "lake", "moon", "tree", "bread", "river", "stone")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Shapes of TinyLlama-1.1B and LLaMA-7B, with the embedded model's vocabulary."""


@dataclass(frozen=True)
class Workplace:
    """Where the checks run and on what."""

    device: str
    """cpu or cuda."""
    small: bool
    """With random models of two layers instead of those that the check is about."""
    folder: Path
    """For files that are thrown away."""
    rates: dict[str, float]
    """Operations per second of a matrix product, by dtype (`machine.product_rates`)."""

    @property
    def dtype(self) -> DType:
        """What `auto` is here."""
        return fast_dtype(self.device)

    @property
    def base(self) -> str:
        """The embedded model, or a tiny one with its tokenizer."""
        return random_model(self.folder / "tiny", TINY) if self.small else "smollm2-135m-instruct"

    def data(self, task: str, rows: int, words: int = 6) -> str:
        """A file of rows for a view of the data.

        Args:
            task: sft, preference or prompts.
            rows: how many.
            words: of an instruction.
        """
        path = self.folder / f"{task}-{rows}-{words}.jsonl"
        texts = [" ".join(WORDS[(i * 7 + k * (i + 3)) % len(WORDS)] for k in range(words + i % 4)) for i in range(rows)]
        columns: dict[str, dict[str, Any]] = {
            "sft": {"output": "yes, it is"},
            "preference": {"output_1": "yes", "output_2": "no, never", "preference": 1},
            "prompts": {},
        }
        path.write_text("".join(json.dumps({"instruction": text, **columns[task]}) + "\n" for text in texts))
        return str(path)

    def fit(self, module: Any, name: str, batch_size: int, words: int = 6, iterations: int = 2) -> list[float]:
        """Train a module for a few iterations on the device; the seconds of each.

        Args:
            module: to train.
            name: of its run folder.
            batch_size: rows of an iteration.
            words: of an instruction.
            iterations: how many.
        """
        clock = Clock()
        shaping = [DivergenceCallback(), MissingEOSPenalty()] if module.task == "prompts" else []
        data = AlpacaDataModule(
            train=self.data(module.task, batch_size * iterations, words),
            task=module.task,
            tokenizer=module.base_model,
            batch_size=batch_size,
        )
        bare_trainer(self.folder / name, [clock, *shaping], device=self.device).fit(module, data)
        return clock.seconds


def random_model(folder: Path, sizes: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> str:
    """The folder of a random LLaMA with the embedded model's tokenizer, made once.

    Args:
        folder: of it.
        sizes: fields of its config.
        dtype: of its weights on disk.
        device: where the weights are drawn.
    """
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
        torch.manual_seed(0)
        with torch.device(device):
            config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.05, eos_token_id=2, **sizes)
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def brevity(prompts: list[str], responses: list[str]) -> Tensor:
    """Minus the number of characters."""
    return -torch.tensor([float(len(response)) for response in responses])


def numbers(place: Workplace) -> list[str]:
    """Log-probs and greedy samples of both engines beside the model's own pass, in every kind of base.

    The base in fp32 on the processor, run as plain transformers run it, is what all are compared with.
    """
    ids = torch.arange(60).view(4, 15) * 37 % 1000
    rows = Sequences(ids[:, :7], torch.ones(4, 7).bool(), ids[:, 7:], torch.ones(4, 8).bool())
    plain = Backbone(place.base).plain_logits(ids[0]).log_softmax(-1)
    lines = []
    kinds: list[tuple[DType, Quantization | None]] = [("float32", None), ("bfloat16", None)]
    kinds += [(place.dtype, Quantization(kind)) for kind in ("nf4", "int8")]
    for dtype, quantize in kinds:
        with torch.device(place.device):
            backbone = Backbone(place.base, lora=LoRA(), dtype=dtype, quantize=quantize).to(place.device).eval()
            backbone.add_role("reference")
            backbone.add_role("policy", ("policy",), trainable=True)
        allowed, stop = rounding(dtype, quantize), torch.tensor([2], device=place.device)
        text = unequal_rows(rows).to(place.device)
        if not quantize or quantize.kind != "int8":  # whose kernels ask the processor, which no graph can
            check_passes(backbone, "policy", text, stop, allowed, "static")
        said = check_passes(backbone, "policy", text, stop, allowed)
        logits = {}
        for role in ("policy", "reference"):
            with backbone.role(role):
                logits[role] = backbone.plain_logits(ids[0].to(place.device)).float().cpu().log_softmax(-1)
        check_policy_is_reference(logits["policy"] - logits["reference"], {})
        off = float((logits["policy"] - plain).abs().mean())
        if dtype == "float32" and quantize is None and off > ROUNDING["float32"]:
            raise AssertionError(f"fp32 log-probs are {off:.2g} nats a token from those of the processor")
        lines.append(f"{quantize.kind if quantize else dtype}: {said} Base in fp32 on the processor: {off:.2g} away.")
        del backbone
        gc.collect()
    return lines


def stages(place: Workplace) -> list[str]:
    """SFT, reward model and PPO of the embedded model: self-checks, seconds, shares of the product rate."""
    common: dict[str, Any] = {"base_model": place.base, "dtype": place.dtype}
    sft = place.fit(SFT(**common), "sft", 8)
    common["sft"] = str(place.folder / "sft/handover")
    reward = place.fit(RewardModel(**common), "reward", 8)
    policy = TimedPPO(
        **common,
        reward_model=str(place.folder / "reward/handover"),
        ppo=PPO(minibatch_size=16, inner_epochs=1),
        sampling=Sampling(max_new_tokens=32),
    )
    place.fit(policy, "ppo", 32, iterations=3)
    found = [(place.folder / name / "self_checks.txt").read_text().splitlines() for name in ("sft", "reward", "ppo")]
    return [
        f"SFT {sft[-1]:.2f} s, reward model {reward[-1]:.2f} s an iteration of 8 rows",
        f"{sum(map(len, found))} self-checks held, among them: {found[-1][-1]}",
        speeds(place, policy, reward_model=True),
    ]


def speeds(place: Workplace, policy: TimedPPO, *, reward_model: bool) -> str:
    """Seconds of the last iteration by phase, with what share of the device's product rate each reaches."""
    config = text_config(policy.backbone.model)
    tokens = policy.prompt_tokens[-1], policy.response_tokens[-1]
    work = products(config, *tokens, inner_epochs=policy.ppo.inner_epochs, reward_model=reward_model)
    rate = place.rates["float32" if policy.dtype_name == "float32" else "bfloat16"]
    shares = [
        f"{phase} {policy.phases[phase][-1]:.2f} s ({work[phase] / policy.phases[phase][-1] / rate:.0%})"
        for phase in ("generate", "score", "update")
    ]
    return (
        f"PPO {policy.iterations[-1]:.2f} s an iteration of {tokens[0]} + {tokens[1]} tokens in {policy.dtype_name} "
        f"(share of the product rate): {', '.join(shares)}"
    )


def memory(place: Workplace) -> list[str]:
    """Planned beside measured memory of PPO by phase; on a GPU also the two allowances of a plan, measured."""
    on_cpu = place.device == "cpu"
    job = small(
        ppo_job(24, 40, 32, on_cpu=on_cpu, base_model=place.base, dtype=place.dtype, micro_batch_size=8, sft=None)
    )
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    plan, measured = Plan(job), measure(job)
    shares = {phase: plan.counted(phase) / size for phase, size in measured.items()}
    lines = [
        f"{phase}: planned {plan.counted(phase) / 2**20:,.0f}, measured {size / 2**20:,.0f} MiB ({shares[phase]:.2f})"
        for phase, size in measured.items()
    ]
    if not on_cpu:
        free, total = torch.cuda.mem_get_info()
        runtime = total - free - torch.cuda.memory_reserved()
        lost = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated() - 1
        lines.append(f"runtime {runtime / GIB:.2f} GiB, planned 0.8; lost by the allocator {lost:.1%}, planned 5 %")
    if any(abs(share - 1) > 0.1 for share in shares.values()):
        raise AssertionError("the plan is more than a tenth off: " + "; ".join(lines))
    return lines


def resume(place: Workplace) -> list[str]:
    """A killed PPO run ends bit for bit like an uninterrupted one."""
    config = _write_ppo(place)
    said = _lrlhf("verify-resume", "--config", config, "--iterations", "3", "--kill-at", "iteration:2")
    return [f"{said.splitlines()[-1]} (trainer.deterministic: {_deterministic(place) or 'null'})"]


def processes(place: Workplace) -> list[str]:
    """PPO by two processes ends as by one: DDP and FSDP2, over NCCL where there are two GPUs, else over gloo."""
    on_gpus = place.device == "cuda" and torch.cuda.device_count() > 1
    config, ends, lines = _write_ppo(place), {}, []
    accelerator = "gpu" if on_gpus else "cpu"
    for strategy, devices in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        run = place.folder / f"two-{strategy}"
        options = {"accelerator": accelerator, "strategy": strategy, "devices": devices, "default_root_dir": run}
        _lrlhf("fit", "--config", config, *(f"--trainer.{key}={value}" for key, value in options.items()))
        ends[strategy] = load_file(run / "handover/policy/adapter_model.safetensors")
    for strategy in ("ddp", "fsdp2"):
        off = max(float((ends[strategy][name] - w).abs().max()) for name, w in ends["auto"].items())
        size = max(float(w.abs().max()) for name, w in ends["auto"].items() if "lora_B" in name)  # it began as 0
        lines.append(f"{strategy}: adapter weights {off:.2g} from those of one process, which moved by {size:.2g}")
        if not off <= 1e-3 * size:
            raise AssertionError(lines[-1])
    return [*lines, "over NCCL on two GPUs" if on_gpus else "over gloo on the processor"]


def _deterministic(place: Workplace) -> str | None:
    return "warn" if place.device == "cuda" else None


def _write_ppo(place: Workplace) -> str:
    """A config of two iterations of PPO of a tiny model in fp32."""
    path = place.folder / "ppo.yaml"
    values = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "gpu" if place.device == "cuda" else "cpu",
            "devices": 1,
            "deterministic": _deterministic(place),
            "limit_train_batches": 2,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "callbacks": [{"class_path": "lrlhf.DivergenceCallback"}],
        },
        "model": {
            "class_path": "lrlhf.PPOPolicy",
            "init_args": {
                "base_model": random_model(place.folder / "tiny", TINY),
                "reward_function": f"{__name__}.brevity",
                "sampling": {"max_new_tokens": 8},
                "ppo": {"minibatch_size": 4},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {
            "class_path": "lrlhf.AlpacaDataModule",
            "init_args": {"train": place.data("prompts", 24), "batch_size": 8},
        },
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


def _lrlhf(*words: str) -> str:
    """What a command of a process of its own printed.

    Raises:
        AssertionError: it failed.
    """
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, "-m", "lrlhf", *words], env=environment, text=True, capture_output=True)
    if done.returncode:
        raise AssertionError(f"lrlhf {words[0]}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return done.stdout.strip()


def sizes(place: Workplace) -> list[str]:
    """Time and memory of PPO on random models: on a GPU of 1B and 7B, where they fit by plan, else of a tiny one."""
    kinds = [("1B", None), ("7B", None), ("7B", Quantization("nf4"))]
    if place.small or place.device == "cpu":
        kinds = [("tiny", None)]
    lines = []
    for name, quantize in kinds:
        shape = {"tiny": TINY, **SIZES}[name]
        settings: dict[str, Any] = {"dtype": place.dtype, "micro_batch_size": 4, "gradient_checkpointing": True}
        folder = random_model(place.folder / name, shape, place.dtype, place.device)
        told = quantize and asdict(quantize)
        job = ppo_job(
            192, 64, 16, on_cpu=place.device == "cpu", batch_size=16, base_model=folder, quantize=told, **settings
        )
        title = f"{name} in {quantize.kind if quantize else place.dtype}"
        plan = Plan(job)
        if not plan.fits(memory_of(place.device)):
            lines.append(f"{title}: needs {plan.needed(plan.peak) / GIB:.1f} GiB by plan, left out")
            continue
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        policy = TimedPPO(
            base_model=folder,
            quantize=quantize,
            reward_function=no_reward,
            ppo=PPO(minibatch_size=16, inner_epochs=1),
            sampling=Sampling(max_new_tokens=64),
            **settings,
        )
        place.fit(policy, f"run-{name}", 16, words=100)
        used = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if place.device == "cuda" else ""
        lines.append(f"{title}: {speeds(place, policy, reward_model=False)}{used}")
        del policy
        gc.collect()
    return lines


CHECKS = {check.__name__: check for check in (numbers, stages, memory, resume, processes, sizes)}
