"""dtype: auto, on processors and GPUs that this machine is not."""

import pytest
import torch

import lrlhf
from lrlhf.model.precision import fast_dtype


@pytest.fixture
def processor(monkeypatch):
    """Make this machine's processor one that multiplies bf16, or not."""

    def make(*instructions):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return make


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        (("avx2",), "float32"),
        (("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), "float32"),
        (("avx512_f", "avx512_bf16"), "bfloat16"),
        (("amx_bf16",), "bfloat16"),
        (("neon", "bf16"), "bfloat16"),
    ],
)
def test_a_processor_gets_bfloat16_where_it_has_the_instructions(processor, instructions, dtype):
    processor(*instructions)
    assert fast_dtype("cpu") == dtype


def test_without_onednn_nothing_multiplies_bfloat16_fast(processor, monkeypatch):
    processor("neon", "bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_dtype("cpu") == "float32"


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert fast_dtype("cuda") == dtype


def test_auto_is_resolved_where_the_base_is_loaded(processor, tiny_llama):
    processor("amx_bf16")
    module = lrlhf.SFT(base_model=tiny_llama, dtype="auto")
    module.configure_model()
    assert module.backbone.model.dtype == torch.bfloat16
    processor("avx2")
    module = lrlhf.SFT(base_model=tiny_llama, dtype="auto")
    module.configure_model()
    assert module.backbone.model.dtype == torch.float32


def test_a_full_model_trains_in_float32(processor, tiny_llama):
    processor("amx_bf16")
    assert lrlhf.SFT(base_model=tiny_llama, dtype="auto", lora=None).dtype_name == "float32"
