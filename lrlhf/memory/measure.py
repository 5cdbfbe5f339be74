"""Measures what `plan` predicts: memory during two real iterations, the second with the optimizer's state."""

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lrlhf.callbacks import DivergenceCallback
from lrlhf.errors import UserError
from lrlhf.memory.job import Job
from lrlhf.memory.rehearsal import Phase, build, pairs, prompts, sequences
from lrlhf.model.architecture import text_config
from lrlhf.modules.base import MARK, ROLLOUT, SCORE, UPDATE


def small(job: Job) -> Job:
    """The same job on one device with two micro-batches an iteration.

    Raises:
        UserError: a job for several devices.
    """
    if not job.on_cpu and not torch.cuda.is_available():
        raise UserError("plan: --measure runs on this machine, which has no GPU; add --trainer.accelerator cpu.")
    if job.devices > 1 or job.layout != "one base":
        raise UserError("plan: --measure runs on one device; add --trainer.devices 1 --trainer.strategy auto.")
    rows = 2 * min(job["micro_batch_size"], job.minibatch_rows)
    rows += -rows % job.group_size
    job = replace(job, batch_size=rows)
    return job.change(job.minibatch_key, rows) if job.minibatch_key else job


def bare_trainer(
    folder: str | Path, callbacks: list[L.Callback], *, device: str = "cpu", max_epochs: int = 1
) -> L.Trainer:
    """A trainer on one device that trains, and neither logs, saves, validates nor draws anything.

    Args:
        folder: for the hand-over.
        callbacks: of the run.
        device: cpu or cuda.
        max_epochs: of the run.
    """
    return L.Trainer(
        default_root_dir=folder,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def measure(job: Job) -> dict[Phase, int]:
    """Bytes at the peak of each phase, of two iterations on this machine."""
    module = build(job)
    module.configure_model()
    module.stop_ids = torch.tensor([text_config(module.backbone.model).vocab_size - 1])  # responses of full length
    prompting = module.task == "prompts"
    batch: Any = prompts(job.rows, job) if prompting else sequences(job.rows, job)
    if module.task == "preference":
        batch = pairs(batch)
    loader: Any = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[L.Callback] = [DivergenceCallback()] if prompting else []
        trainer = bare_trainer(folder, callbacks, device="cpu" if job.on_cpu else "cuda")
        gc.collect()  # what is freed later counts against this job
        weights = [*module.backbone.parameters(), *module.backbone.buffers()]
        held = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in weights}.values())
        activities = [ProfilerActivity.CPU, *([] if job.on_cpu else [ProfilerActivity.CUDA])]
        with profile(activities=activities, profile_memory=True) as profiled:
            trainer.fit(module, loader)
    return _peaks(profiled, DeviceType.CPU, held) if job.on_cpu else _peaks(profiled, DeviceType.CUDA, 0)


def _peaks(profiled: Any, device: DeviceType, static: int) -> dict[Phase, int]:
    """Bytes at the peak of each phase.

    Args:
        profiled: what the profiler recorded.
        device: whose allocations count.
        static: bytes that it held before.
    """
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans: dict[Any, list[tuple[int, int]]] = {}
    for event in events:
        if event.name() in (ROLLOUT, SCORE, UPDATE):
            span = (event.start_ns(), event.start_ns() + event.duration_ns())
            spans.setdefault(event.name().removeprefix(MARK), []).append(span)
    now, peaks = static, dict.fromkeys(spans, 0)
    for event in events:
        if event.name() != "[memory]" or event.device_type() != device:
            continue
        now += event.nbytes()
        for phase, found in spans.items():
            if any(start <= event.start_ns() <= end for start, end in found):
                peaks[phase] = max(peaks[phase], now)
    return peaks
