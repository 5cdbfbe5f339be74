"""`lrlhf plan`: from a config and the model's own config.json to a table of bytes, in seconds."""

import re
from typing import Any

import torch

from lrlhf.cli.lightning import ConfigCLI, Parser, class_of
from lrlhf.errors import UserError
from lrlhf.memory.job import Job
from lrlhf.memory.measure import measure, small
from lrlhf.memory.plan import FRAGMENTATION, GIB, RUNTIME, Plan, largest, memory_of, remedies
from lrlhf.model.precision import auto_dtype
from lrlhf.modules.base import AlignmentModule

KINDS = (
    "base",
    "gathered base",
    "adapters",
    "heads",
    "gradients",
    "optimizer",
    "cache",
    "logits",
    "activations",
    "batch",
)


def add_options(parser: Parser) -> None:
    """The memory that a run needs, from its config alone: no stage before need have run, no weight is read."""
    parser.add_argument(
        "--gpu-memory",
        type=str | None,
        help="say whether the run fits a device of this size, e.g. 24GB, and with which micro-batches",
    )
    parser.add_argument(
        "--four-models",
        action="store_true",
        help="the paper's layout: policy, reference, reward model and critic each with a base of its own, all sharded "
        "over the devices; for comparison, lrlhf itself trains on one base",
    )
    parser.add_argument(
        "--measure", action="store_true", help="run one small iteration here and print planned beside measured"
    )


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a bad option or config.
    """
    cli = ConfigCLI("plan", add_options, arguments)
    memory = parse_size(cli.config.gpu_memory) if cli.config.gpu_memory else None
    job = read(cli, gpu=memory is not None, four_models=cli.config.four_models)
    print(compare(job) if cli.config.measure else describe(Plan(job), memory or _memory_here(job)))


def parse_size(text: str) -> int:
    """Bytes of a size such as 80GB, 24GiB or 512MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])i?B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UserError(f"plan: --gpu-memory {text}: give a size such as 24GB.")
    return int(float(found[1]) * (GIB if found[2].upper() == "G" else 2**20))


def read(cli: ConfigCLI, *, gpu: bool = False, four_models: bool = False) -> Job:
    """The job that a config describes; `gpu` is what accelerator `auto` means.

    Args:
        cli: a parsed config.
        gpu: what accelerator `auto` means.
        four_models: count the paper's layout.
    """
    values, kind = cli.values(), class_of(cli.config.model)
    trainer, model, data = values["trainer"], values["model"], (values["data"] or {}).get("init_args", {})
    if kind is AlignmentModule or not issubclass(kind, AlignmentModule):
        raise UserError(f"plan: config key model: it plans modules of lrlhf, such as lrlhf.SFT, not {kind.__name__}.")
    if not kind.trains:
        raise UserError(f"plan: {kind.__name__} trains nothing; a plan is of a training run.")
    settings = model["init_args"]
    if settings.get("defects"):
        raise UserError("plan: it does not know what model.defects need; plan lrlhf.PPOPolicy instead.")
    for key in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
        if not isinstance(data.get(key), int):
            raise UserError(f"data.init_args.{key} must be set: what a run needs depends on it.")
    accelerator = trainer["accelerator"]
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and (gpu or torch.cuda.is_available()))
    if settings["dtype"] == "auto":
        settings["dtype"] = auto_dtype("cuda" if on_gpu else "cpu", whole=settings["lora"] is None)
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    divergences = [c["init_args"] for c in callbacks if c["class_path"].endswith("DivergenceCallback")]
    named = [name for d in divergences for name in (d.get("divergence"), *(d.get("also_log") or []))]
    samples = kind.task == "prompts"
    return Job(
        model={"class_path": model["class_path"], "init_args": settings},
        prompt_tokens=data["max_prompt_tokens"],
        response_tokens=settings["sampling"]["max_new_tokens"] if samples else data["max_response_tokens"],
        batch_size=data["batch_size"],
        group_size=data.get("responses_per_prompt", 1) if samples else 1,
        devices=_devices(trainer["devices"]) * int(trainer.get("num_nodes") or 1),
        gather=_gather(trainer["strategy"]),
        on_cpu=not on_gpu,
        over_vocabulary=any("exact_" in str(name) for name in named),
        layout="four models" if four_models else "one base",
    )


def _devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str):
        if devices.isdigit():
            return int(devices)
        return len(devices.split(",")) if devices != "auto" else max(1, torch.cuda.device_count())
    return devices if devices > 0 else max(1, torch.cuda.device_count())


def _gather(strategy: Any) -> Any:
    if isinstance(strategy, dict):
        is_ours = strategy["class_path"].endswith("FSDP2Strategy")
        return strategy.get("init_args", {}).get("gather", "rollout") if is_ours else None
    return {"fsdp2": "rollout", "fsdp2_by_layer": "layer"}.get(strategy)


def _memory_here(job: Job) -> int | None:
    """Of this machine's device, if the job is for it."""
    if not job.on_cpu and not torch.cuda.is_available():
        return None
    return memory_of("cpu" if job.on_cpu else "cuda")


def describe(plan: Plan, memory: int | None) -> str:
    """The plan as a text of at most 100 columns."""
    job = plan.job
    lines = [_title(job), "", table(plan), ""]
    need, where = plan.needed(plan.peak), plan.peak
    without = "without" if job["gradient_checkpointing"] else "with"
    other = Plan(job.change("gradient_checkpointing", not job["gradient_checkpointing"]))
    lines.append(f"Peak: {where}, {need / GIB:.2f} GiB per device.")
    lines.append(
        f"The update needs {plan.needed('update') / GIB:.2f} GiB; {without} gradient checkpointing "
        f"{other.needed('update') / GIB:.2f}."
    )
    if job.layout == "four models":
        lines.append("This is the paper's layout, counted for comparison; lrlhf trains all four roles on one base.")
    if memory is None:
        lines.append("Give --gpu-memory to learn whether it fits.")
    elif plan.fits(memory):
        lines.append(f"It fits {memory / GIB:.0f} GiB, with {(memory - need) / GIB:.2f} to spare.")
        lines.append(f"Largest that fit, each by itself: {_largest(plan, memory)}.")
    else:
        lines += _advice(plan, memory)
    return "\n".join(lines)


def _title(job: Job) -> str:
    lora = f"LoRA of rank {job['lora']['r']}" if job["lora"] else "full models"
    kind = job["quantize"]["kind"] if job["quantize"] else job["dtype"]
    devices = f"{job.devices} {'CPU process' if job.on_cpu else 'GPU'}{'es' if job.on_cpu and job.devices > 1 else ''}"
    devices += "s" if not job.on_cpu and job.devices > 1 else ""
    sharded = ", base sharded" if job.gather or job.layout == "four models" else ""
    return (
        f"{job.model['class_path'].rpartition('.')[2]}, {lora} on {job['base_model']} in {kind}, {devices}{sharded}\n"
        f"{job.batch_size} rows of up to {job.prompt_tokens} + {job.response_tokens} tokens, micro-batches of "
        f"{job['micro_batch_size']}"
        + (f", {job['sampling.batch_size']} answered together" if job.has_rollouts else "")
        + (", gradient checkpointing" if job["gradient_checkpointing"] else "")
    )


def table(plan: Plan) -> str:
    """Kinds by phases, in GiB (MiB for small models)."""
    small_model = plan.counted(plan.peak) < GIB
    unit, name = (2**20, "MiB per device") if small_model else (GIB, "GiB per device")
    phases = list(plan.phases)
    rows = [[name, *phases]]
    for kind in KINDS:
        sizes = [plan.phases[phase].get(kind, 0) for phase in phases]
        if any(sizes):
            rows.append([kind, *(f"{size / unit:.2f}" if size else "" for size in sizes)])
    counted = [plan.counted(phase) for phase in phases]
    runtime = RUNTIME[plan.job.on_cpu]
    rows.append(["counted", *(f"{size / unit:.2f}" for size in counted)])
    rows.append([f"+ allocator, {FRAGMENTATION:.0%}", *(f"{size * FRAGMENTATION / unit:.2f}" for size in counted)])
    rows.append(["+ runtime and libraries", *(f"{runtime / unit:.2f}" for _ in phases)])
    rows.append(["needed", *(f"{plan.needed(phase) / unit:.2f}" for phase in phases)])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(widths[i]) if i == 0 else cell.rjust(max(widths[i], 9)) for i, cell in enumerate(row))
        for row in rows
    )


def _largest(plan: Plan, memory: int) -> str:
    found = [f"model.init_args.micro_batch_size {largest(plan, 'micro_batch_size', ('score', 'update'), memory)}"]
    if "rollout" in plan.phases:
        found.append(
            f"model.init_args.sampling.batch_size {largest(plan, 'sampling.batch_size', ('rollout',), memory)}"
        )
    return ", ".join(found)


def _advice(plan: Plan, memory: int) -> list[str]:
    lines = [f"It does not fit {memory / GIB:.0f} GiB. Change, in this order:"]
    after = plan
    for change, after in remedies(plan, memory):
        lines.append(f"  {change}  ({after.peak} {after.needed(after.peak) / GIB:.2f} GiB)")
    if not after.fits(memory):
        more = "LoRA instead of full models" if not plan.job["lora"] else "more devices with trainer.strategy: fsdp2"
        lines.append(f"  that is not enough: it takes {more}, shorter responses or a smaller model.")
    return lines


def compare(job: Job) -> str:
    """Planned beside measured for one small iteration, in MiB."""
    job = small(job)
    plan, measured = Plan(job), measure(job)
    rows = [["MiB", "planned", "measured", "planned / measured"]]
    for phase, size in measured.items():
        planned = plan.counted(phase)
        rows.append([phase, f"{planned / 2**20:.1f}", f"{size / 2**20:.1f}", f"{planned / size:.3f}"])
    return f"{_title(job)}\n\n{_aligned(rows)}"
