"""What the allocator says of two real iterations, the second with the optimizer's state: the plan's counterpart."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from lrlhf.callbacks import DivergenceCallback
from lrlhf.errors import UserError
from lrlhf.memory.job import Job
from lrlhf.memory.rehearsal import Phase, build, prompts, sequences
from lrlhf.model.architecture import text_config
from lrlhf.types import Preferences

MARK = "lrlhf: "
"""Before the name of a phase in the profiler's record."""


def small(job: Job) -> Job:
    """The same job on one device with two micro-batches an iteration.

    Raises:
        UserError: a job for several devices.
    """
    if not job.on_cpu:
        raise UserError("plan: --measure runs on a CPU so far; add --trainer.accelerator cpu.")
    if job.devices > 1 or job.layout != "one base":
        raise UserError("plan: --measure runs on one device; add --trainer.devices 1 --trainer.strategy auto.")
    rows = 2 * min(job["micro_batch_size"], job.minibatch_rows)
    job = replace(job, batch_size=rows)
    return job.change("minibatch_size", rows) if "minibatch_size" in job.model["init_args"] else job


def measure(job: Job) -> dict[Phase, int]:
    """Bytes at the peak of each phase, of two iterations on this machine."""
    module: Any = build(job, torch.device("cpu"))
    module.tokenizer = None
    module.stop_ids = torch.tensor([text_config(module.backbone.model).vocab_size - 1])
    module.hand_over = lambda: None
    if module.task == "prompts":
        if module.reward_function is not None:
            module.score = lambda _, batch: torch.zeros(len(batch))  # what it needs is not the engine's
        _marked(module, "sample", "rollout")
        _marked(module, "rollout", "score")
        _marked(module, "optimize", "update")
    else:
        _marked(module, "training_step", "update")
    batch: Any = prompts(job.rows, job) if module.task == "prompts" else sequences(job.rows, job)
    if module.task == "preference":
        batch = Preferences(batch, batch, torch.zeros(job.rows))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DivergenceCallback()] if module.task == "prompts" else [],
    )
    loader: Any = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    gc.collect()  # what is freed later counts against this job
    static = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _weights(module)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.fit(module, loader)
    return _peaks(profiled, static)


def _weights(module: Any) -> list[torch.Tensor]:
    return [*module.backbone.parameters(), *module.backbone.buffers()]


def _marked(module: Any, method: str, phase: Phase) -> None:
    """Name the method's calls in the profiler's record: memory and spans are then told by one clock."""
    run: Callable[..., Any] = getattr(module, method)

    def marked(*arguments: Any) -> Any:
        with record_function(MARK + phase):
            return run(*arguments)

    setattr(module, method, marked)


def _peaks(profiled: Any, static: int) -> dict[Phase, int]:
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans: dict[Any, list[tuple[int, int]]] = {}
    for event in events:
        if event.name().startswith(MARK):
            span = (event.start_ns(), event.start_ns() + event.duration_ns())
            spans.setdefault(event.name().removeprefix(MARK), []).append(span)
    now, peaks = static, dict.fromkeys(spans, 0)
    for event in events:
        if event.name() != "[memory]":
            continue
        now += event.nbytes()
        inside = [p for p, found in spans.items() if any(a <= event.start_ns() <= b for a, b in found)]
        if "rollout" in inside and "score" in inside:
            inside.remove("score")
        for phase in inside:
            peaks[phase] = max(peaks[phase], now)
    return peaks
