"""Adapters on a quantised base learn what they would learn on its dequantised copy."""

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lrlhf import Checkpoints, LoRA, Sampling, UserError
from lrlhf.config import Quantization
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import sample_responses
from lrlhf.run.checkpoints import newest_checkpoint
from lrlhf.types import Sequences
from tests.conftest import save_tiny_llama
from tests.modules.helpers import ppo, prompt_data, train_reward, train_sft, trainer

KINDS = ("int8", "nf4", "fp4")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Wide enough for a block of 64 weights a row."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return str(save_tiny_llama(folder, hidden_size=64, intermediate_size=128, initializer_range=0.1))


def backbone(base: str, quantize: Quantization | None) -> Backbone:
    made = Backbone(base, lora=LoRA(r=4), quantize=quantize)
    made.add_role("reference")
    made.add_role("policy", ("policy",), trainable=True)
    torch.manual_seed(1)
    for parameter in made.trainable("policy"):
        nn.init.normal_(parameter, std=0.05)
    return made


def dequantised(base: str, quantised: Backbone) -> Backbone:
    """A plain backbone with the numbers that the quantised one stands for, by bitsandbytes' own functions."""
    plain = backbone(base, None)
    modules = dict(plain.named_modules())
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            full = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            int8, scale = (weight.CB, weight.SCB) if weight.CB is not None else (module.state.CB, module.state.SCB)
            full = int8.float() * scale[:, None].float() / 127
        else:
            continue
        modules[name].weight.data.copy_(full.view_as(modules[name].weight))
    return plain


def sequences() -> Sequences:
    ids = torch.randint(3, 250, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Sequences(ids[:, :5], mask[:, :5], ids[:, 5:], mask[:, 5:])


def gradient(backbone: Backbone) -> torch.Tensor:
    text = sequences()
    with backbone.role("policy"), backbone.training_pass(dropout=False):
        hidden = backbone.encode(text)
        logprobs = torch.log_softmax(backbone.lm_head(hidden).float(), -1)
        (-logprobs.gather(-1, text.response_ids[..., None]).mean()).backward()
    return torch.cat([p.grad.flatten() for p in backbone.trainable("policy")])


def roll_out(backbone: Backbone) -> None:
    text = sequences()
    with backbone.role("policy"):
        sample_responses(
            backbone,
            text.prompt_ids,
            text.prompt_mask,
            sampling=Sampling(max_new_tokens=4),
            stop_ids=torch.tensor([2]),
            uniforms=torch.rand(3, 4),
        )


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("nf4", 1e-3), ("fp4", 1e-3)])
@pytest.mark.parametrize("double", [True, False])
def test_after_a_rollout_gradients_are_those_of_the_dequantised_base(kind, tolerance, double, base):
    quantised = backbone(base, Quantization(kind, double))
    roll_out(quantised)
    expected, found = gradient(dequantised(base, quantised)), gradient(quantised)
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_base_is_near_the_base_and_smaller(kind, base):
    quantised, plain = backbone(base, Quantization(kind)), backbone(base, None)
    linear = [m for m in quantised.model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(linear) == 14
    assert {m.weight.dtype for m in linear} == {torch.int8 if kind == "int8" else torch.uint8}
    assert all(p.dtype == torch.float32 for p in quantised.trainable())
    cosine = nn.functional.cosine_similarity(quantised.probe_logits.flatten(), plain.probe_logits.flatten(), dim=0)
    assert 0.9 < cosine < 1 - 1e-6
    assert quantised.fingerprint.startswith(f"{kind}-")


@pytest.mark.parametrize("kind", KINDS)
def test_three_stages_run_on_a_quantised_base_and_never_change_it(kind, base, data_files, tmp_path):
    quantize = Quantization(kind)
    train_sft(base, data_files, tmp_path / "sft", quantize=quantize)
    train_reward(base, data_files, tmp_path / "reward", sft=str(tmp_path / "sft/handover"), quantize=quantize)
    parents = {"sft": str(tmp_path / "sft/handover"), "reward_model": str(tmp_path / "reward/handover")}
    module = ppo(base, reward_function=None, quantize=quantize, **parents)
    trainer(tmp_path / "ppo", enable_checkpointing=False).fit(module, prompt_data(base, data_files))
    assert module.iteration == 5
    assert module.backbone.drift_of_base() == 0
    raised = [p for name, p in module.named_parameters() if "lora_B.policy" in name]
    assert raised
    assert all(p.abs().max() > 0 for p in raised)


def test_another_quantisation_than_the_stage_before_is_refused(base, data_files, tmp_path):
    train_sft(base, data_files, tmp_path / "sft")
    module = ppo(base, sft=str(tmp_path / "sft/handover"), quantize=Quantization())
    with pytest.raises(UserError, match="here nf4-"):
        module.configure_model()


def test_full_fine_tuning_of_a_quantised_base_is_refused(base):
    with pytest.raises(UserError, match=r"set lora, or quantize: null"):
        ppo(base, lora=None, quantize=Quantization())


def test_an_eight_bit_optimizer_goes_on_exactly_from_a_checkpoint(base, data_files, tmp_path):
    def fit(folder, epochs, checkpoint=None):
        torch.manual_seed(3)
        adamw = partial(bnb.optim.AdamW8bit, lr=1e-2, min_8bit_size=64)
        module = ppo(base, quantize=Quantization(), optimizer=adamw)
        data = prompt_data(base, data_files)
        trainer(folder, callbacks=[Checkpoints()], max_epochs=epochs).fit(module, data, ckpt_path=checkpoint)
        return module

    whole = fit(tmp_path / "whole", 2)
    assert torch.uint8 in {state["state1"].dtype for state in whole.optimizers().optimizer.state.values()}
    fit(tmp_path / "half", 1)
    resumed = fit(tmp_path / "half", 2, str(newest_checkpoint(tmp_path / "half")))
    assert resumed.iteration == whole.iteration == 10
    for name in whole.trained():
        assert torch.equal(resumed.state_dict()[name], whole.state_dict()[name]), name


def test_a_paged_optimizer_on_a_cpu_is_refused(base, data_files, tmp_path):
    module = ppo(base, optimizer=lambda params: bnb.optim.PagedAdamW8bit(params, lr=1e-2))
    with pytest.raises(UserError, match="needs a GPU; use AdamW8bit"):
        trainer(tmp_path, enable_checkpointing=False).fit(module, prompt_data(base, data_files))
