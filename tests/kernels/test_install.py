"""Kernels are installed in one place, and LRLHF_KERNELS=0 leaves everything as transformers and peft make it."""

import pytest
import torch
from torch import nn

from lrlhf.config import LoRA
from lrlhf.kernels.install import install
from lrlhf.model.backbone import Backbone
from lrlhf.types import Sequences


def backbone(base: str, dtype: str = "float32") -> Backbone:
    torch.manual_seed(0)
    made = Backbone(base, lora=LoRA(r=2), dtype=dtype)
    made.add_role("policy", ("policy",), trainable=True)
    for parameter in made.trainable():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


def ours(model: nn.Module) -> set[str]:
    return {
        type(m).__name__
        for m in model.modules()
        if type(m).__module__ in ("lrlhf.kernels.install", "lrlhf.model.adapters")
    }


@pytest.fixture
def text() -> Sequences:
    prompt_mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    response_mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    return Sequences(torch.randint(3, 200, (2, 5)), prompt_mask, torch.randint(3, 200, (2, 4)), response_mask)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_without_kernels_nothing_is_exchanged_and_states_are_the_same_up_to_rounding(
    monkeypatch, tiny_llama, text, dtype, tolerance
):
    states = {}
    for switch in ("1", "0"):
        monkeypatch.setenv("LRLHF_KERNELS", switch)
        made = backbone(tiny_llama, dtype)
        assert bool(ours(made.model)) == (switch == "1")
        assert (made.model.config._attn_implementation == "sdpa") == (switch == "0")
        with torch.no_grad(), made.role("policy"):
            states[switch] = made.encode(text)[text.response_mask].float()
    assert (states["0"] - states["1"]).norm() <= tolerance * states["0"].norm()


def test_a_model_of_another_kind_is_left_alone():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.LayerNorm(4), nn.GELU())
            self.config = type("Config", (), {"_attn_implementation": "eager"})()

    assert not ours(install(Other()))
