"""How long the phases of a PPO iteration take, and how many operations their matrix products are."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lrlhf.modules.ppo_policy import PPOPolicy

UNUSED = 3
"""A token that the model never samples: no response ends early, so that every run does the same work."""


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device is done with all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock(L.Callback):
    """Seconds of each iteration of a fit, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self.began = now(module.device)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop."""
        self.seconds.append(now(module.device) - self.began)


class TimedPPO(PPOPolicy):
    """PPO with a clock on each phase, and responses that do not end.

    Args:
        kwargs: see PPOPolicy.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.phases: dict[str, list[float]] = defaultdict(list)
        """Seconds of each iteration in generate, score and update."""
        self.iterations: list[float] = []
        """Seconds of each iteration."""
        self.prompt_tokens: list[int] = []
        self.response_tokens: list[int] = []

    def configure_model(self) -> None:
        """With no token that ends a response."""
        super().configure_model()
        self.stop_ids = torch.tensor([UNUSED])

    @contextmanager
    def _clock(self, seconds: list[float]) -> Iterator[None]:
        start = now(self.device)
        yield
        seconds.append(now(self.device) - start)

    def sample(self, prompts: Any, role: str, *place: int | str) -> tuple[Tensor, Tensor]:
        """Timed as generate."""
        with self._clock(self.phases["generate"]):
            ids, mask = super().sample(prompts, role, *place)
        self.prompt_tokens.append(int(prompts.prompt_mask.sum()))
        self.response_tokens.append(int(mask.sum()))
        return ids, mask

    def optimize(self, experience: Any) -> None:
        """Timed as update."""
        with self._clock(self.phases["update"]):
            super().optimize(experience)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Timed whole; what is neither sampling nor update is score."""
        with self._clock(self.iterations):
            super().training_step(batch, batch_idx)
        self.phases["score"].append(self.iterations[-1] - self.phases["generate"][-1] - self.phases["update"][-1])


def layer_weights(config: Any) -> tuple[int, int]:
    """Weights that a token is multiplied by in the layers of a LLaMA-like model, and in its LM head.

    Args:
        config: of the model.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = 2 * width * queries + 2 * width * keys + 3 * width * inner
    return config.num_hidden_layers * layer, width * config.vocab_size


def products(
    config: Any, prompt_tokens: int, response_tokens: int, *, inner_epochs: int, reward_model: bool = True
) -> dict[str, int]:
    """Floating-point operations of the matrix products of one PPO iteration, by phase, without attention and adapters.

    Trunk passes over every token: one to generate; policy, reference, reward model and critic to score; forward and
    backward of policy and critic in each inner epoch. Passes of the LM head over response tokens: one to generate, two
    to score, and two (forward, and derivative by the states) in each inner epoch.

    Args:
        config: of a LLaMA-like model.
        prompt_tokens: of all rows together.
        response_tokens: of all rows together.
        inner_epochs: passes over the rollout.
        reward_model: whether one scores, or a function does.
    """
    trunk, head = layer_weights(config)
    tokens = prompt_tokens + response_tokens
    return {
        "generate": 2 * (trunk * tokens + head * response_tokens),
        "score": 2 * ((3 + reward_model) * trunk * tokens + 2 * head * response_tokens),
        "update": 2 * inner_epochs * (4 * trunk * tokens + 2 * head * response_tokens),
    }
