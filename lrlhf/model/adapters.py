"""LoRA adapters on a frozen model: their settings, their layers and their files.

The only file that imports peft. `set_adapter` there switches gradients behind one's back, so every switch is followed
at once by the trainable set of the role (`Backbone.role`).
"""

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as FAMILY_TARGETS
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrlhf.config import LoRA
from lrlhf.errors import UserError
from lrlhf.kernels.install import enabled
from lrlhf.kernels.low_rank import add_low_rank
from lrlhf.model.architecture import text_config, trunk

PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""The attention's projections, as in arXiv 2309.09055."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a peft adapter."""
PREFIX = "base_model.model."
"""Before the names of tensors in them."""


def peft_config(lora: LoRA, model: Any) -> LoraConfig:
    """The settings of LoRA as peft spells them, for a model.

    Args:
        lora: the settings.
        model: that the adapter is for.

    Raises:
        UserError: an option that peft refuses, or no targets are given and none are known for this family.
    """
    options, targets = dict(lora.options), lora.targets or _usual_targets(model)
    decoder = next(name for name, module in model.named_modules() if module is trunk(model))
    if targets == "all-linear":
        targets = sorted(_leaves(_linear_layers(trunk(model))) - _experts(model))
    if any(not name.startswith(f"{decoder}.") for name in _linear_layers(model)):
        options.setdefault("exclude_modules", rf"(?!{re.escape(decoder)}\.).*")  # adapters of what sees images
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            **options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"lora.options: {error}; see the fields of peft.LoraConfig.") from error


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers by name, an LM head and the parts of adapters left out."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    layers = {name: module for name, module in linear.items() if "lora_" not in name and module is not head}
    return {name.removesuffix(".base_layer"): module for name, module in layers.items()}


def _leaves(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _experts(model: Any) -> set[str]:
    """Layer names that peft would take for experts whose weights are fused into one tensor.

    peft matches these names anywhere in the model, also where a dense layer has the same name.
    """
    fused = any(name.endswith("experts.down_proj") for name, _ in model.named_parameters())
    return {"gate_proj", "up_proj", "down_proj"} if fused else set()


def _usual_targets(model: Any) -> Any:
    """Names of layers, or a regular expression."""
    names = _leaves(_linear_layers(model))
    if names >= set(PAPER_TARGETS):
        return PAPER_TARGETS
    family = text_config(model).model_type
    if family not in FAMILY_TARGETS:
        raise UserError(f"lora.targets must be given for {family}: all-linear, or some of {', '.join(sorted(names))}.")
    return FAMILY_TARGETS[family]


class AdaptedLinear(LoraLinear):
    """peft's linear layer under plain adapters, in fewer passes over memory; peft does DoRA, dropout and biases."""

    cached: list[tuple[Tensor, Tensor]] | None = None
    """The factors in the base's type while a role runs without gradients: sampling would make them for each token."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]: the layer beneath, and W x + (alpha / r) B A x for each active adapter in turn."""
        factors = self.factors() if self.cached is None or torch.is_grad_enabled() else self.cached
        if factors is None:
            return super().forward(x)
        result = self.base_layer(x)
        x = x.to(result.dtype)
        for down, up in factors:
            result = add_low_rank(result, x, down.to(x.dtype), up.to(x.dtype))
        return result

    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """The factors of each active adapter: A [R, I] and (alpha / r) B [O, R], both fp32.

        Returns:
            None where the adapters are more than that (DoRA, dropout, a bias, merged weights): peft then runs them.
        """
        names: Any = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or not all(map(self._is_plain, names)):
            return None
        layers: Any = [(self.lora_A[name], self.lora_B[name], self.scaling[name]) for name in names]
        return [(down.weight, up.weight * scale) for down, up, scale in layers]

    def cache_factors(self, dtype: torch.dtype | None) -> None:
        """Cast the factors once and keep them, instead of casting them at every token of a response.

        Args:
            dtype: to keep them in; None drops what was kept. They must be dropped before the weights change.
        """
        factors = self.factors() if dtype else None
        self.cached = factors and [(down.to(dtype), up.to(dtype)) for down, up in factors]

    def _is_plain(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        return name not in self.lora_variant and self.lora_B[name].bias is None and not drops


class Adapters:
    """The adapters on one model, by name.

    Args:
        model: a causal language model of transformers; its layers are exchanged when the first adapter comes.
    """

    def __init__(self, model: Any):
        self.model = model
        self.layers = ""
        """Which layers the newest adapter lies on, by name and number, as a text."""
        self._peft: PeftModel | None = None

    @property
    def names(self) -> list[str]:
        """Of the adapters that exist."""
        return list(self._peft.peft_config) if self._peft else []

    def add(self, name: str, lora: LoRA) -> None:
        """A new adapter, with B = 0.

        Args:
            name: of the adapter.
            lora: its settings.

        Raises:
            UserError: settings that fit no layer, or layers that take no adapter here.
        """
        config = peft_config(lora, self.model)
        try:
            if self._peft:
                self._peft.add_adapter(name, config)
            else:
                self._wrap(PeftModel(self.model, config, adapter_name=name))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"lora: {error}") from error
        self.layers = self._check_layers(name, lora.targets)

    def load(self, name: str, folder: Path) -> None:
        """An adapter from its peft folder.

        Args:
            name: that it gets here.
            folder: with adapter_config.json and adapter_model.safetensors.

        Raises:
            UserError: a file is missing or does not fit the base.
        """
        try:
            if self._peft:
                self._peft.load_adapter(str(folder), adapter_name=name)
            else:
                self._wrap(PeftModel.from_pretrained(self.model, str(folder), adapter_name=name))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: this adapter cannot be loaded on this base ({error}).") from error
        there = {key.removeprefix(PREFIX).removesuffix(".weight") for key in load_file(folder / WEIGHTS)}
        ours = [key.split(".") for key, _ in self.model.named_parameters() if "lora_" in key]
        here = {".".join(p for p in parts if p != name).removesuffix(".weight") for parts in ours if name in parts}
        if there != here:
            odd = sorted(there ^ here)[0]
            raise UserError(f"{folder}: this adapter and this base do not fit ({odd} is in one alone).")

    def activate(self, stack: Sequence[str], *, cache_factors: bool) -> None:
        """Switch these adapters on, in this order, and all others off.

        Args:
            stack: their names; none switches every adapter off.
            cache_factors: keep their factors in the base's dtype meanwhile (`AdaptedLinear.cache_factors`).
        """
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = False
                layer.enable_adapters(bool(stack))
                if stack:
                    layer.set_adapter(list(stack))
            if isinstance(layer, AdaptedLinear):
                layer.cache_factors(self.model.dtype if cache_factors else None)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [p for key, p in self.model.named_parameters() if "lora_" in key and name in key.split(".")]

    def save(self, stack: Sequence[str], folder: Path) -> None:
        """Each adapter as an ordinary peft folder in `folder`.

        Args:
            stack: names of adapters.
            folder: in which each gets a folder of its name.
        """
        assert self._peft is not None
        self._peft.save_pretrained(str(folder), selected_adapters=list(stack), save_embedding_layers=False)

    @torch.no_grad()
    def merge(self, stack: Sequence[str], dtype: torch.dtype) -> None:
        """Fold a stack into the weights beneath it and remove all adapters: W + sum (alpha / r) B A, in fp32.

        Args:
            stack: names of adapters, base side first.
            dtype: that the layers with adapters get, in one rounding.
        """
        fold(self.model, stack, dtype)
        self._peft = None

    def _wrap(self, peft: PeftModel) -> None:
        self._peft = peft
        for module in self.model.modules():
            if type(module) is LoraLinear and enabled():
                module.__class__ = AdaptedLinear

    def _check_layers(self, adapter: str, targets: list[str] | str | None) -> str:
        """Which layers got an adapter, by name and number.

        Raises:
            UserError: a name matched none, or a layer is none of the decoder's linear layers.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LoraLayer) and adapter in m.r}
        inside = {id(module) for module in trunk(self.model).modules()}
        for name, layer in layers.items():
            if id(layer) not in inside or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
                raise UserError(f"lora.targets: {name} is no linear layer of the decoder, and takes no adapter here.")
        names = targets if isinstance(targets, list) else sorted(_leaves(layers))
        counts = {t: sum(name == t or name.endswith(f".{t}") for name in layers) for t in names}
        for target in [target for target, count in counts.items() if not count]:
            known = ", ".join(sorted(_leaves(_linear_layers(self.model))))
            raise UserError(f"lora.targets: no layer is called {target}; there are {known}.")
        return ", ".join(f"{target} ({count})" for target, count in counts.items())


@torch.no_grad()
def fold(model: Any, stack: Sequence[str], dtype: torch.dtype) -> None:
    """Put a stack into the weights beneath it, and the layers beneath in the place of those with adapters.

    Layer by layer in place, so that no second model is held.

    Args:
        model: with adapters or without.
        stack: names of adapters, base side first; none only takes the adapters away.
        dtype: that the layers with adapters get, in one rounding.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        base: Any = layer.get_base_layer()
        if stack:
            layer.enable_adapters(True)
            layer.set_adapter(list(stack))
            base.to(torch.float32)
            base.weight.data = _merged_weight(layer, base, stack)
        base.to(dtype)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, base)


def _merged_weight(layer: Any, base: Any, stack: Sequence[str]) -> Tensor:
    """The weight, fp32 and in the base's own orientation, that does what a layer with adapters does."""
    names = [name for name in stack if name in layer.lora_A]
    if not any(name in layer.lora_variant for name in names):
        return sum((layer.get_delta_weight(name) for name in names), start=base.weight)
    one_hot = torch.eye(layer.in_features, device=base.weight.device)
    columns = layer(one_hot) - layer(torch.zeros_like(one_hot[:1]))  # DoRA is no sum, but linear in its input
    return columns if isinstance(base, Conv1D) else columns.T.contiguous()


def place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies: in a folder of its name, or in `folder` itself, which then is a plain peft folder."""
    return folder / adapter if (folder / adapter).is_dir() else folder


def concatenate(folders: Sequence[Path], to: Path) -> None:
    """Write a stack of peft adapters as ONE, whose rank is the sum of theirs, for tools that take a single adapter.

    [B1 B2] [A1; A2] x = B1 A1 x + B2 A2 x; each alpha / r (or alpha / sqrt(r)) is multiplied into its B.

    Args:
        folders: of the adapters, base side first; one alone is copied as it is.
        to: folder to write.

    Raises:
        UserError: an adapter of a kind that does not concatenate, such as DoRA.
    """
    if len(folders) == 1:
        to.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copy(folders[0] / name, to / name)
        return
    configs = [LoraConfig.from_pretrained(str(folder)) for folder in folders]
    adapters = [_factors(load_file(folder / WEIGHTS), config) for folder, config in zip(folders, configs, strict=True)]
    if None in adapters:
        raise UserError(
            f"{' and '.join(folder.name for folder in folders)} cannot be written as one adapter: DoRA's magnitudes do "
            "not add up; --format merged folds them into the base."
        )
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter in adapters:
        for layer, pair in (adapter or {}).items():
            factors.setdefault(layer, []).append(pair)
    tensors = {}
    for layer, pairs in factors.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = torch.cat([down for down, _ in pairs])
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = torch.cat([up for _, up in pairs], dim=1)
    ranks = {layer: sum(len(down) for down, _ in pairs) for layer, pairs in factors.items()}
    rank = max(ranks.values())
    others = {layer: r for layer, r in ranks.items() if r != rank}
    config = replace(
        configs[0], r=rank, lora_alpha=rank, use_rslora=False, rank_pattern=others, alpha_pattern=dict(others)
    )
    where = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
    if any(getattr(other, name) != getattr(config, name) for other in configs for name in where):
        config = replace(config, **dict.fromkeys(where[1:]), target_modules=sorted(factors))
    to.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(to))
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})


def _factors(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, tuple[Tensor, Tensor]] | None:
    """A [R, I] and scaled B [O, R] by layer, both fp32; None where an adapter is more than that."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, down in tensors.items():
        layer, _, kind = name.removeprefix(PREFIX).partition(".lora_")
        up = tensors.get(f"{PREFIX}{layer}.lora_B.weight")
        if kind == "A.weight" and up is not None:
            patterns: Any = config.alpha_pattern
            alpha = patterns.get(get_pattern_key(patterns, layer), config.lora_alpha)
            scale = alpha / (len(down) ** 0.5 if config.use_rslora else len(down))
            found[layer] = down.float(), up.float() * scale
    return found if 2 * len(found) == len(tensors) else None
