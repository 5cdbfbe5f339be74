"""One iteration of a stage, dress rehearsal: the engine's own passes on rows of full length, with no earlier stage.

On fake tensors it tells what memory each phase takes; on real ones (`measure`) the same passes check that.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lrlhf.cli.lightning import Parser
from lrlhf.errors import UserError
from lrlhf.functional import exact_kl, logprobs, position_ids
from lrlhf.kernels.install import install
from lrlhf.memory.job import Job
from lrlhf.memory.ledger import Ledger
from lrlhf.metrics import Means
from lrlhf.model.architecture import text_config
from lrlhf.model.backbone import Backbone
from lrlhf.model.classifier import is_classifier
from lrlhf.model.generation import choose
from lrlhf.model.pretrained import first_line
from lrlhf.modules.base import AlignmentModule
from lrlhf.modules.reward_source import RewardSource
from lrlhf.run.handover import Handover
from lrlhf.types import CriticExperience, Experience, Prompts, ReferencePreferences, Sequences

Phase = Literal["load", "rollout", "score", "update", "checkpoint"]
Bytes = dict[Phase, dict[str, int]]
"""Phase to kind to bytes, at the phase's peak."""


Moments = list[tuple[Phase, dict[str, int]]]
"""Moments that may be the peak of their phase, with bytes by kind."""

FEW = 2
"""Layers of a deep model that are rehearsed, and then one more: bytes grow by the same amount with every layer."""


@dataclass(frozen=True)
class Base:
    """Sizes of one copy of the base: bytes, where not said otherwise."""

    whole: int
    largest_layer: int
    root: int
    """What lies outside the layers: embeddings, last norm, LM head."""
    linear_weights: tuple[tuple[int, ...], ...]
    """Shapes of the weights that quantisation touches."""
    layers: int
    alike: bool
    """Whether all layers are of one size."""

    @classmethod
    def of(cls, backbone: Backbone) -> "Base":
        """Of a backbone's model without its adapters."""

        def size(module: Any) -> int:
            return sum(p.nbytes for name, p in module.named_parameters() if "lora_" not in name)

        head = backbone.model.get_output_embeddings()
        layers = [size(m) for m in backbone.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        linear = tuple(
            tuple(module.weight.shape)
            for name, module in backbone.model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and module is not head
        )
        whole = size(backbone.model)
        return cls(whole, max(layers), whole - sum(layers), linear, len(layers), len(set(layers)) == 1)


@dataclass(frozen=True)
class Planned(Handover):
    """What a stage before has yet to hand over: a role as large as this config would make it."""

    def load(self, backbone: Backbone, role: str) -> None:
        """Make the role anew."""
        if not self.stack:
            backbone.copies[role] = copy.deepcopy(backbone.model)
        backbone.add_role(role, self.stack, head="random" if self.head else None)

    def check(self, backbone: Backbone, tokenizer: str) -> None:
        """It will fit."""


def no_reward(prompts: list[str], responses: list[str]) -> Tensor:
    """Scores of 0: what a reward function needs is not the engine's."""
    return torch.zeros(len(responses))


def build(job: Job) -> Any:
    """The module of a stage, its hand-over folders taken as if they were there."""
    settings = copy.deepcopy(job.model)
    values = settings["init_args"]
    folders = {name: values.get(name) for name in ("sft", "reward_model") if name in values}
    if is_classifier(folders.get("reward_model") or ""):
        raise UserError(
            f"plan: model.reward_model={folders['reward_model']} is a separate model, which a plan does not count; "
            "plan with model.reward_function, and add the size of its weights."
        )
    values |= dict.fromkeys(folders)
    if job.has_rollouts:
        values["reward_function"] = f"{__name__}.no_reward"
    if "bootstrap" in values:
        values["bootstrap"] = False  # to draw how often a pair counts it would need the data
    module: Any = instantiate(settings)
    module.sft = folders.get("sft")
    if folders.get("reward_model"):
        module.source = RewardSource(type(module).__name__, folders["reward_model"], None, values.get("aggregate"))
    below = ("sft",) if folders.get("sft") else ()
    above = (*below, "reward") if module.lora else ()
    stacks = {"sft": ("sft", below, False), "reward_model": ("reward", above, True)}
    module.parents = {
        folder: Planned(Path(folder), *stacks[name], base_model=module.base_model, base="", tokenizer="", template=None)
        for name, folder in folders.items()
        if folder
    }
    return module


class Mute:
    """A tokenizer that says nothing, for reward functions that are not called."""

    def decode(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""


def keep_layers(model: Any, count: int) -> None:
    """Leave out all but the first layers of a model that has no adapters yet.

    Args:
        model: without adapters.
        count: of layers to keep.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and isinstance(next(iter(module), None), GradientCheckpointingLayer):
            del module[count:]
            text_config(model).num_hidden_layers = count


def instantiate(settings: dict[str, Any]) -> AlignmentModule:
    """A module from its class path and arguments."""
    parser = Parser()
    parser.add_lightning_class_args(AlignmentModule, "model", subclass_mode=True)
    return parser.instantiate_classes(parser.parse_object(Namespace(model=settings))).model


def sequences(rows: int, job: Job) -> Sequences:
    """Rows of the longest prompts and responses there may be, of which one is a token shorter: so there is padding.

    Args:
        rows: how many.
        job: for the lengths.
    """
    prompt_mask = torch.ones(rows, job.prompt_tokens, dtype=torch.bool)
    group = torch.arange(rows) // job.group_size
    prompt_mask[group == 1, 0] = False
    prompts = torch.arange(job.prompt_tokens) % 97 + group[:, None] + 3
    response_mask = torch.ones(rows, job.response_tokens, dtype=torch.bool)
    return Sequences(prompts * prompt_mask, prompt_mask, response_mask.long() * 3, response_mask)


def prompts(rows: int, job: Job) -> Prompts:
    """The same prompts as a batch of PPO."""
    long = sequences(rows, job)
    return Prompts(long.prompt_ids, long.prompt_mask, ("",) * rows, ({},) * rows, group_size=job.group_size)


def pairs(text: Sequences) -> ReferencePreferences:
    """Each response against itself.

    Args:
        text: B of them.
    """
    rows = len(text)
    return ReferencePreferences(text, text, torch.zeros(rows), torch.arange(rows), torch.zeros(rows, 2))


def experience(rows: int, job: Job, kind: type[Experience] = CriticExperience, width: int = 0) -> Experience:
    """What a rollout of such rows would leave.

    Args:
        rows: how many.
        job: for the lengths.
        kind: of experience that the module learns from.
        width: of the states that it holds.
    """
    text = sequences(rows, job)
    beside = {
        "states": torch.zeros(rows, job.response_tokens, width),
        "scores": torch.zeros(rows),
        "parts": torch.zeros(rows, 0),
        "groups": torch.arange(rows) // job.group_size,
    }
    names = {field.name for field in fields(kind)} - {field.name for field in fields(Sequences)}
    return kind.of(text, **{name: beside.get(name, torch.zeros(rows, job.response_tokens)) for name in names})


def rehearse(job: Job) -> tuple[Bytes, Base]:
    """Bytes of one process by phase and kind, the base whole and as wide as `dtype`, and what the base consists of.

    Raises:
        UserError: settings that no run could use.
    """
    try:
        moments, base = _rehearse(job, FEW)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"plan: {job['base_model']} cannot be rehearsed ({first_line(error)}).") from error
    if base.layers > FEW:
        more, _ = _rehearse(job, FEW + 1 if base.alike else None)
        moments = [
            (phase, _at_depth(base.layers, few, one_more) if base.alike else one_more)
            for (phase, few), (_, one_more) in zip(moments, more, strict=True)
        ]
    phases: Bytes = {}
    for phase, kinds in moments:
        phases[phase] = max(phases.get(phase, {}), kinds, key=lambda found: sum(found.values()))
    return phases, base


def _at_depth(layers: int, few: dict[str, int], one_more: dict[str, int]) -> dict[str, int]:
    """The line through the bytes with FEW layers and with one more."""
    a_layer = {kind: one_more.get(kind, 0) - few.get(kind, 0) for kind in {*few, *one_more}}
    return {kind: few.get(kind, 0) + (layers - FEW) * grown for kind, grown in a_layer.items()}


def _rehearse(job: Job, layers: int | None) -> tuple[Moments, Base]:
    module = build(job)
    with torch.device("meta"):
        backbone = module.backbone = module.make_backbone()
        base = Base.of(backbone)
        if layers:
            keep_layers(backbone.model, layers)
        module.build_roles()
    backbone.eval()
    for model in (backbone.model, *backbone.copies.values()) if job.on_cpu else ():
        install(model)
    ledger = Ledger(vocabulary=text_config(backbone.model).vocab_size)
    with _as_on(job), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _make_fake(backbone)
        moments = [(phase, {k: n for k, n in kinds.items() if n}) for phase, kinds in _moments(module, job, ledger)]
    return moments, base


def _make_fake(model: nn.Module) -> None:
    """From the meta device, where autocast is unknown, to fake tensors."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    kind = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if kind else fake
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]


@contextmanager
def _as_on(job: Job) -> Iterator[None]:
    """Fake tensors are on the CPU; the head runs over as many rows at once as it would on the job's device."""
    before = logprobs.CHUNK.copy()
    if not job.on_cpu:
        logprobs.CHUNK.clear()
    try:
        yield
    finally:
        logprobs.CHUNK.update(before)


def _moments(module: AlignmentModule, job: Job, ledger: Ledger) -> Iterator[tuple[Phase, dict[str, int]]]:
    backbone = module.backbone
    _own_weights(backbone, ledger)
    with ledger.phase() as load:
        pass
    yield "load", load
    optimizer = module.optimizer(backbone.trainable())
    if not job.on_cpu:
        for group in optimizer.param_groups:
            group["foreach"] = True
    _give_gradients(backbone, ledger)
    optimizer.step()
    ledger.own("optimizer", [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)])
    optimizer.zero_grad()
    batch: Any = experience(job.rows, job, width=_states_width(module))
    ledger.own("batch", [getattr(batch, field.name) for field in fields(batch)])
    if module.task == "prompts":
        for kinds in _rollout(module, job, ledger):
            yield "rollout", kinds
        with ledger.phase() as score:
            _score(module, job)
        yield "score", score
    _give_gradients(backbone, ledger)
    with ledger.phase() as update, backbone.training_pass(dropout=module.task != "prompts"):
        for loss in _losses(module, job):
            loss.backward()
    yield "update", update
    with ledger.phase() as step:
        optimizer.step()
    step["optimizer"] += step.pop("activations", 0)
    yield "update", step
    with ledger.phase() as checkpoint:
        pass
    yield "checkpoint", checkpoint


def _states_width(module: AlignmentModule) -> int:
    """Of the states that a rollout keeps for a critic that is a head alone."""
    alone = getattr(getattr(module, "ppo", None), "critic", None) == "head"
    head: Any = module.backbone.heads["critic"] if alone else None
    return head.in_features if alone else 0


def _own_weights(backbone: Backbone, ledger: Ledger) -> None:
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        kind = "adapters" if "lora_" in name else "heads" if name.startswith("heads.") else "base"
        ledger.own(kind, [tensor])


def _give_gradients(backbone: Backbone, ledger: Ledger) -> None:
    """As after the first micro-batch of each role."""
    for parameter in backbone.trainable():
        parameter.grad = torch.zeros_like(parameter)
        ledger.own("gradients", [parameter.grad])


@torch.no_grad()
def _rollout(module: AlignmentModule, job: Job, ledger: Ledger) -> tuple[dict[str, int], dict[str, int]]:
    """The first pass, over the prompts, and the last, over one token with a full cache."""
    rows = min(module.sampling.batch_size, job.rows)
    text, cache, backbone = sequences(rows, job), DynamicCache(), module.backbone
    uniforms = torch.rand(rows)
    with backbone.role("policy"):
        with ledger.phase() as first:
            positions = position_ids(text.prompt_mask)
            choose(
                backbone.next_token_logits(text.prompt_ids, text.prompt_mask, positions, cache),
                uniforms,
                module.sampling,
            )
            ledger.peak["cache"] += (small := _cache_bytes(cache))
            ledger.peak["activations"] -= small
        for layer in cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                longer = tensor.new_empty(*tensor.shape[:2], tensor.shape[2] + job.response_tokens - 2, tensor.shape[3])
                setattr(layer, name, longer)
                ledger.own("cache", [longer])
        with ledger.phase() as last:
            mask = text.mask[:, :-1]
            choose(
                backbone.next_token_logits(text.ids[:, :1], mask, positions[:, -1:], cache), uniforms, module.sampling
            )
            whole = _cache_bytes(cache)
            ledger.peak["activations"] += ledger.peak["cache"] - whole
            ledger.peak["cache"] = whole
    return first, last


def _cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def _score(module: Any, job: Job) -> None:
    """Log-probs, values and scores of one micro-batch of responses, and the reference's log-probs."""
    rows = min(module.micro_batch_size, job.rows)
    text = sequences(rows, job)
    module.stop_ids, module.tokenizer = torch.tensor([0]), Mute()
    module.evaluate(text, prompts(rows, job))
    module.logprobs(text, "reference")
    if job.over_vocabulary:
        module.divergences(text, [exact_kl])


def _losses(module: Any, job: Job) -> Iterator[Tensor]:
    """Of one micro-batch in each role that trains."""
    rows = min(module.micro_batch_size, job.minibatch_rows)
    if module.task == "prompts":
        yield from module.losses(experience(rows, job, module.experience_type, _states_width(module)), Means(), Means())
        return
    text = sequences(rows, job)
    with module.backbone.role(module.role):
        yield from module.losses(text if module.task == "sft" else pairs(text))
