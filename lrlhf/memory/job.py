"""What a config says about memory."""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lrlhf.config import Gather


@dataclass(frozen=True)
class Job:
    """One stage on one kind of device, as far as memory is concerned."""

    model: dict[str, Any]
    """class_path and init_args of the module."""
    prompt_tokens: int
    """Of the longest prompt that the data module lets through."""
    response_tokens: int
    """Of the longest response."""
    batch_size: int
    """Rows of one iteration over all devices."""
    group_size: int = 1
    """Responses to one prompt."""
    devices: int = 1
    gather: Gather | None = None
    """How a sharded base is gathered; None: every device holds it whole."""
    on_cpu: bool = True
    over_vocabulary: bool = False
    """Whether a callback compares policy and reference over the whole vocabulary."""
    layout: Literal["one base", "four models"] = "one base"
    """Ours; or the paper's: policy, reference, reward model and critic each with a base of its own, all sharded."""

    @property
    def rows(self) -> int:
        """Rows of one iteration on one device."""
        return -(-self.batch_size // self.devices)

    @property
    def has_rollouts(self) -> bool:
        """Whether the module samples and scores responses."""
        return self.minibatch_key is not None

    @property
    def minibatch_key(self) -> str | None:
        """The setting that says how many responses of a rollout one optimizer step takes; None: there is no rollout."""
        keys = ("ppo.minibatch_size", "updates.minibatch_size", "minibatch_size")
        return next((key for key in keys if key.partition(".")[0] in self.model["init_args"]), None)

    @property
    def minibatch_rows(self) -> int:
        """Rows of one optimizer step on one device."""
        return -(-self[self.minibatch_key] // self.devices) if self.minibatch_key else self.rows

    def __getitem__(self, key: str) -> Any:
        """A setting of the module by its key, dots for nested ones."""
        value: Any = self.model["init_args"]
        for part in key.split("."):
            value = value[part]
        return value

    def change(self, key: str, value: Any) -> "Job":
        """The same job with another setting of the module.

        Args:
            key: of the setting, dots for nested ones.
            value: its new value.
        """
        model = copy.deepcopy(self.model)
        *path, last = key.split(".")
        target = model["init_args"]
        for part in path:
            target = target[part]
        target[last] = value
        return replace(self, model=model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return getattr(torch, self["dtype"])
