"""LoRA: which layers get an adapter, and which of peft's settings hold from training to hand-over and export."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from lrlhf import PPOPolicy, UserError
from lrlhf.config import LORA_OPTIONS, LoRA
from lrlhf.functional import exact_kl
from lrlhf.model.adapters import concatenate
from lrlhf.model.backbone import Backbone
from tests.families import build, rows
from tests.modules.helpers import count_vowels

OWN = {"r", "lora_alpha", "lora_dropout", "target_modules"}
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode", "kasa_config", "layer_replication",
    "loftq_config", "lora_bias", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
CARRIED = {
    "use_rslora": [{"use_rslora": True}],
    "use_dora": [{"use_dora": True}],
    "init_lora_weights": [{"init_lora_weights": "gaussian"}],
    "layers_to_transform": [{"layers_to_transform": [1]}],
    "layers_pattern": [{"layers_to_transform": [0], "layers_pattern": "layers"}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 4}}, {"rank_pattern": {"q_proj": 4}, "use_rslora": True}],
    "alpha_pattern": [{"alpha_pattern": {"v_proj": 9}}],
    "exclude_modules": [{"exclude_modules": ["layers.0.self_attn.k_proj"]}],
}


def test_every_field_of_peft_is_carried_or_refused():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == OWN | REFUSED | set(LORA_OPTIONS)
    assert set(CARRIED) == set(LORA_OPTIONS)


@pytest.mark.parametrize("name", sorted(REFUSED | OWN))
def test_a_field_that_would_not_last_is_refused_before_a_weight_is_loaded(name):
    with pytest.raises(UserError, match=rf"lora\.options\.{name}"):
        LoRA(options={name: True})


@pytest.mark.parametrize("options", [options for several in CARRIED.values() for options in several], ids=str)
def test_a_carried_field_is_the_same_in_divergences_hand_over_and_export(tiny_llama, tmp_path, options):
    """Against plain peft, which loads the stack from its folders, and against the one adapter of the export."""
    torch.manual_seed(3)
    lora = LoRA(r=2, alpha=5, options=options)
    module = PPOPolicy(base_model=tiny_llama, lora=lora, reward_function=count_vowels)
    module.configure_model()
    backbone, text = module.backbone, rows()
    backbone.add_role("policy", ("sft", "policy"), trainable=True)
    backbone.add_role("reference", ("sft",))
    for adapter in ("sft", "policy"):
        for parameter in backbone._adapters.parameters(adapter):
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    backbone.save_role("policy", tmp_path)
    (divergences,) = module.divergences(text, [exact_kl])

    def plain(*stack: str) -> list[torch.Tensor]:
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / stack[0]), adapter_name=stack[0]
        )
        for adapter in stack[1:]:
            peft.load_adapter(str(tmp_path / adapter), adapter_name=adapter)
        peft.base_model.set_adapter(list(stack))
        found = []
        for i in range(len(text)):
            prompt = text.prompt_ids[i][text.prompt_mask[i]]
            ids = torch.cat([prompt, text.response_ids[i][text.response_mask[i]]])
            with torch.no_grad():
                found.append(peft.eval()(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        return found

    policy, reference = plain("sft", "policy"), plain("sft")
    for i, (p, q) in enumerate(zip(policy, reference, strict=True)):
        expected = (p.exp() * (p - q)).sum(-1)
        assert expected.max() > 0.05
        torch.testing.assert_close(divergences[i][: len(expected)], expected, atol=1e-5, rtol=1e-4)
    again = Backbone(tiny_llama, lora=lora).eval()
    again.load_role("policy", ("sft", "policy"), tmp_path, head=False)
    with again.role("policy"), torch.no_grad():
        loaded = again.encode(text)
    with backbone.role("policy"), torch.no_grad():
        assert torch.equal(loaded, backbone.encode(text))
    stack = [tmp_path / "sft", tmp_path / "policy"]
    if options.get("use_dora"):
        with pytest.raises(UserError, match="sft and policy cannot be written as one adapter: DoRA's"):
            concatenate(stack, tmp_path / "adapter")
    else:
        concatenate(stack, tmp_path / "adapter")
        for one, several in zip(plain("adapter"), policy, strict=True):
            torch.testing.assert_close(one, several, atol=2e-4, rtol=1e-4)
    with backbone.role("policy"):
        before = backbone.plain_logits(torch.arange(12))
    merged = backbone.merge("policy")
    assert not any("lora" in name for name, _ in merged.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=torch.arange(12)[None]).logits[0], before, atol=1e-4, rtol=1e-4)


# Targets


def test_how_many_layers_each_name_matched_is_told(tiny_llama):
    backbone = Backbone(tiny_llama, lora=LoRA(r=2, targets=["q_proj", "layers.1.mlp.up_proj"]))
    backbone.add_role("policy", ("policy",), trainable=True)
    assert "LoRA of rank 2 on q_proj (2), layers.1.mlp.up_proj (1)" in backbone.summary()


def layers_of(folder: str, targets, **settings) -> list[str]:
    backbone = Backbone(folder, lora=LoRA(r=2, targets=targets, **settings))
    backbone.add_role("policy", ("policy",), trainable=True)
    names = [name for name, _ in backbone.model.named_parameters() if "lora_A" in name]
    return sorted(name.removesuffix(".lora_A.policy.weight").removeprefix("model.") for name in names)


def test_targets_are_names_a_pattern_or_all_linear_layers(tiny_llama):
    names = layers_of(tiny_llama, ["q_proj", "up_proj"])
    assert names == [
        "layers.0.mlp.up_proj",
        "layers.0.self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "layers.1.self_attn.q_proj",
    ]
    assert layers_of(tiny_llama, r".*\.1\..*_proj") == [
        name for name in layers_of(tiny_llama, "all-linear") if ".1." in name
    ]
    assert len(layers_of(tiny_llama, "all-linear")) == 14
    assert len(layers_of(tiny_llama, None)) == 8


@pytest.mark.parametrize(
    ("family", "layers"), [("gpt2", {"c_attn"}), ("gpt_neox", {"query_key_value"}), ("bloom", {"query_key_value"})]
)
def test_without_targets_a_family_takes_its_own(tmp_path, family, layers):
    assert {name.rpartition(".")[2] for name in layers_of(build(family, tmp_path), None)} == layers


def test_what_sees_images_gets_no_adapter(tmp_path):
    names = layers_of(build("gemma3", tmp_path), None)
    assert len(names) == 8
    assert all(name.startswith("language_model.") for name in names)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["q_proj", "qq_proj"], r"no layer is called qq_proj; there are down_proj, .*q_proj"),
        (["q_proj", "lm_head"], r"lm_head is no linear layer of the decoder|no layer is called lm_head"),
        (["q_proj", "embed_tokens"], r"model\.embed_tokens is no linear layer of the decoder"),
        (r"nothing.*", r"lora: "),
    ],
)
def test_targets_that_are_no_linear_layers_of_the_decoder_are_refused(tiny_llama, targets, sentence):
    with pytest.raises(UserError, match=sentence):
        layers_of(tiny_llama, targets)


def test_a_family_without_usual_targets_says_which_layers_there_are(tmp_path):
    with pytest.raises(UserError, match=r"lora\.targets must be given for phi3: all-linear, or some of .*qkv_proj"):
        layers_of(build("phi3", tmp_path), None)


@pytest.mark.parametrize("alpha", [0.0, -8.0, float("inf"), float("nan")])
def test_alpha_is_positive_and_finite(alpha):
    with pytest.raises(UserError, match=r"alpha=.* must be (>0|finite)"):
        LoRA(alpha=alpha)
