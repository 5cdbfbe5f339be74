"""What a machine is: versions, memory, how fast its devices multiply, and which runs fit."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lrlhf.doctor.timing import now
from lrlhf.kernels.linear import linear
from lrlhf.memory.job import Job
from lrlhf.memory.plan import GIB, Plan, memory_of
from lrlhf.model.precision import fast_dtype, processor

PACKAGES = ("lrlhf", "torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets", "trl")
SHAPES = {"cpu": (1024, 1024, 2048), "cuda": (8192, 8192, 8192)}
"""Rows, inputs and outputs of the product that is timed: about those of a layer."""


def environment() -> dict[str, Any]:
    """Python, packages, processor, memory, disk and GPUs; sizes in bytes."""
    has = processor()
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "processor": has.get("cpu_name") or platform.processor() or platform.machine(),
        "instructions": sorted(
            name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16") if has.get(name)
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory_of("cpu"),
        "disk_free": shutil.disk_usage(".").free,
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(number: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(number)
    return {"name": found.name, "memory": found.total_memory, "capability": f"{found.major}.{found.minor}"}


def product_rates(device: str) -> dict[str, float]:
    """Operations per second of a matrix product in fp32 and in bf16, the best of three.

    Args:
        device: cpu or cuda.
    """
    return {name: _rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}


def _rate(device: str, dtype: torch.dtype) -> float:
    rows, inputs, outputs = SHAPES[device]
    x, w = (torch.randn(n, inputs, device=device, dtype=dtype) for n in (rows, outputs))
    linear(x, w)
    seconds = []
    for _ in range(3):
        start = now(x.device)
        linear(x, w)
        seconds.append(now(x.device) - start)
    return 2 * rows * inputs * outputs / min(seconds)


def usual_runs(device: str) -> list[tuple[str, Job]]:
    """PPO as the demo runs it and, on a GPU, as configs/hardware does with 192 + 300 tokens.

    Args:
        device: cpu or cuda.
    """
    small: dict[str, Any] = {"base_model": "smollm2-135m-instruct", "micro_batch_size": 16}
    large: dict[str, Any] = {"base_model": "huggyllama/llama-7b", "gradient_checkpointing": True}
    nf4: dict[str, Any] = {"quantize": {"kind": "nf4", "double": True}, "micro_batch_size": 2}
    demo = ppo_job(96, 40, 32, on_cpu=device == "cpu", dtype=fast_dtype(device), **small)
    if device == "cpu":
        return [("PPO of SmolLM2-135M, the demo", demo)]
    return [
        ("PPO of SmolLM2-135M, the demo", demo),
        ("PPO of LLaMA-7B in 4 bits", ppo_job(192, 300, 16, **large, **nf4)),
        ("PPO of LLaMA-7B in bf16", ppo_job(192, 300, 32, **large, micro_batch_size=4)),
    ]


def ppo_job(
    prompt: int, response: int, together: int, *, on_cpu: bool = False, batch_size: int = 32, **settings: Any
) -> Job:
    """A PPO stage on one device.

    Args:
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.
        together: prompts answered together.
        on_cpu: instead of on a GPU.
        batch_size: rows of an iteration; an update takes half of them.
        settings: of the module, other than the usual ones.
    """
    values = {
        "sft": "an SFT run",
        "reward_model": "a reward model",
        "lora": {"r": 8},
        "dtype": "bfloat16",
        "quantize": None,
        "gradient_checkpointing": False,
        "ppo": {"minibatch_size": batch_size // 2},
        "sampling": {"max_new_tokens": response, "batch_size": together},
        **settings,
    }
    return Job({"class_path": "lrlhf.PPOPolicy", "init_args": values}, prompt, response, batch_size, on_cpu=on_cpu)


def describe(found: dict[str, Any], rates: dict[str, dict[str, float]]) -> list[str]:
    """Lines for a reader.

    Args:
        found: of `environment`.
        rates: of `product_rates`, by device.
    """
    lines = [
        f"lrlhf {found['packages'].get('lrlhf')}, Python {found['python']}, {found['system']}",
        ", ".join(f"{name} {number}" for name, number in found["packages"].items() if name != "lrlhf"),
        f"processor  {found['processor']}, {found['cores']} cores, {found['threads']} threads, "
        f"{found['memory'] / GIB:.1f} GiB, {found['disk_free'] / GIB:.0f} GiB of disk free"
        + (f" ({', '.join(found['instructions'])})" if found["instructions"] else ""),
    ]
    lines += [
        f"GPU        {gpu['name']}, {gpu['memory'] / GIB:.1f} GiB, compute capability {gpu['capability']}"
        for gpu in found["gpus"]
    ] or ["GPU        none that PyTorch sees"]
    for device, rate in rates.items():
        speeds = ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in rate.items())
        lines.append(f"products   {device}: {speeds}; dtype: auto is {fast_dtype(device)}")
    return lines


def fitting(device: str) -> list[str]:
    """Which of the usual runs fit a device, planned.

    Args:
        device: cpu or cuda.
    """
    memory = memory_of(device)
    plans = [(name, Plan(job)) for name, job in usual_runs(device)]
    return [
        f"{'fits' if plan.fits(memory) else 'too large':10} {name}: {plan.needed(plan.peak) / GIB:.1f} of "
        f"{memory / GIB:.1f} GiB"
        for name, plan in plans
    ]
