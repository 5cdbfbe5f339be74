"""Bytes of a run on one device, phase by phase; whether they fit, how large micro-batches may be, what to change first.

Counted: every tensor of one iteration on rows of full length (`rehearsal`), the base quantised or sharded as the config
says. Not counted, and added as a named allowance: what the device's runtime takes (CUDA context, libraries) and what
the allocator loses between tensors.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from lrlhf.memory.job import Job
from lrlhf.memory.rehearsal import Base, Bytes, Phase, rehearse

GIB = 2**30
RUNTIME = {True: int(0.6 * GIB), False: int(0.8 * GIB)}
"""Bytes before the first tensor: Python and its libraries on a CPU (True), context and libraries of a GPU (False)."""
FRAGMENTATION = 0.05
"""Share of the counted bytes that the allocator loses; PyTorch's caching allocator usually loses 2 to 10 %."""
BLOCK, SECOND_BLOCK = 64, 256
"""bitsandbytes keeps a scale for each 64 weights in 4 bits, and with double quantisation one for 256 scales."""


@dataclass(frozen=True)
class Plan:
    """The bytes of a job on one device."""

    job: Job

    @cached_property
    def _rehearsal(self) -> tuple[Bytes, Base]:
        return rehearse(self.job)

    @cached_property
    def phases(self) -> Bytes:
        """Phase to kind to bytes, each at the phase's peak."""
        phases, base = self._rehearsal
        return {phase: self._on_device(phase, dict(kinds), base) for phase, kinds in phases.items()}

    def _on_device(self, phase: Phase, kinds: dict[str, int], base: Base) -> dict[str, int]:
        """Quantise, copy and shard what was rehearsed whole."""
        job, saved, scales = self.job, 0, 0
        if quantize := job["quantize"]:
            width = job.dtype.itemsize
            shapes = [rows * columns for rows, columns in base.linear_weights]
            small = sum(quantised(r, c, quantize) for r, c in base.linear_weights)
            saved, scales = width * sum(shapes) - small, small - sum(shapes) // 2
            kinds["base"] -= saved
            if phase not in ("load", "checkpoint"):
                kinds["activations"] = kinds.get("activations", 0) + width * max(shapes)
        gathered = 0
        if job.layout == "four models":
            if job["lora"]:
                kinds["base"] += 3 * base.whole
            gathered = base.root + 2 * base.largest_layer
            for kind in ("base", "adapters", "heads", "gradients", "optimizer"):
                kinds[kind] = -(-kinds.get(kind, 0) // job.devices)
        elif job.gather is not None and not job["lora"] and phase != "load":
            models = round(kinds["base"] / base.whole)  # whose embeddings and heads are gathered together
            around = models * base.root + 2 * base.largest_layer
            if job.gather == "rollout" and phase in ("rollout", "score"):
                gathered = kinds["base"]
            else:
                gathered = 2 * around if phase == "update" else around  # with their gradients, until these are cut
            for kind in ("base", "gradients", "optimizer"):
                kinds[kind] = -(-kinds.get(kind, 0) // job.devices)
        elif job.gather is not None and phase != "load":
            kinds["base"] = -(-(kinds["base"] - scales) // job.devices) + scales  # scales are no parameters
            whole = job.gather == "rollout" and phase in ("rollout", "score")
            a_layer = int(base.largest_layer * (1 - (saved + scales) / (base.whole - base.root)))
            gathered = base.whole - saved - scales if whole else base.root + 2 * a_layer
        if job.devices > 1 and gathered and phase not in ("load", "checkpoint"):
            kinds["gathered base"] = gathered
        return {kind: size for kind, size in kinds.items() if size}

    def counted(self, phase: Phase) -> int:
        """Bytes of all tensors at the peak of a phase."""
        return sum(self.phases[phase].values())

    def needed(self, phase: Phase) -> int:
        """The same with the allowances."""
        return int(self.counted(phase) * (1 + FRAGMENTATION)) + RUNTIME[self.job.on_cpu]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=self.counted)

    def fits(self, memory: int) -> bool:
        """Whether all phases do."""
        return self.needed(self.peak) <= memory


def memory_of(device: str) -> int:
    """Bytes of this machine's first GPU, or of its main memory.

    Args:
        device: cuda, or any other for main memory.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def quantised(rows: int, columns: int, quantize: dict) -> int:
    """Bytes of one weight in bitsandbytes' int8 (a scale a row) or 4 bits (a scale a block, quantised or not).

    Args:
        rows: of the weight.
        columns: of the weight.
        quantize: kind and double, as in a config.
    """
    weights = rows * columns
    if quantize["kind"] == "int8":
        return weights + 4 * rows
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // SECOND_BLOCK) + 4 * 256 if quantize["double"] else 4 * blocks
    return -(-weights // 2) + scales + 4 * 16


def largest(plan: Plan, key: str, phases: tuple[Phase, ...], memory: int) -> int:
    """The largest value of a row count at which these phases fit; 0 if none does.

    Bytes grow by the same amount with every row, so two rehearsals tell; a third checks what they told.

    Args:
        plan: of the job.
        key: micro_batch_size or sampling.batch_size.
        phases: that the setting changes.
        memory: of the device, in bytes.
    """
    job = plan.job
    most = job.rows if key != "micro_batch_size" else job.minibatch_rows
    some = max(1, min(int(job[key]), most // 2))
    one = plan if some == job[key] else Plan(job.change(key, some))
    two = Plan(job.change(key, 2 * some))
    found = most
    for phase in phases:
        if phase in plan.phases:
            a_row = max(1.0, (two.needed(phase) - one.needed(phase)) / some)
            found = min(found, some + int((memory - one.needed(phase)) // a_row))
    while found > 0:
        there = Plan(job.change(key, found))
        if all(there.needed(phase) <= memory for phase in phases if phase in plan.phases):
            break
        found -= max(1, found // 16)
    return max(0, found)


def remedies(plan: Plan, memory: int) -> Iterator[tuple[str, Plan]]:
    """Changes one after the other, the cheapest in time first, until the plan fits; with each the plan after it.

    Args:
        plan: that does not fit.
        memory: of the device, in bytes.
    """
    for key, value in _candidates(plan.job):
        if plan.fits(memory):
            return
        if key == "sampling.batch_size" and plan.peak != "rollout":
            continue
        if key in ("gradient_checkpointing", "micro_batch_size") and plan.peak not in ("update", "score"):
            continue
        before = plan.needed(plan.peak)
        changed = Plan(plan.job.change(key, value))
        if changed.needed(changed.peak) < 0.99 * before or changed.peak != plan.peak:
            plan = changed
            yield f"model.init_args.{key}: {value}", plan


def _candidates(job: Job) -> Iterator[tuple[str, object]]:
    lora = job["lora"] is not None
    if lora and job["dtype"] == "float32":
        yield "dtype", "bfloat16"
    if not job["gradient_checkpointing"]:
        yield "gradient_checkpointing", True
    for key in ("sampling.batch_size", "micro_batch_size"):
        rows = min(int(job[key]), job.rows)
        while rows > 1:
            rows //= 2
            yield key, rows
    if lora and not job["quantize"] and job.gather is None:
        yield "quantize", {"kind": "nf4", "double": True}
        for key in ("sampling.batch_size", "micro_batch_size"):
            yield key, 1
