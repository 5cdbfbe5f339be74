"""Where a base comes from: the shapes that are shipped, and how a chat template ends a turn."""

import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrlhf.model.pretrained
from lrlhf.errors import UserError
from lrlhf.model.pretrained import end_of_turn, load_model, shape

PUBLISHED = {
    "huggyllama/llama-7b": 6.738,
    "huggyllama/llama-13b": 13.016,
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Llama-3.1-8B": 8.030,
    "meta-llama/Llama-3.1-8B-Instruct": 8.030,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "mistralai/Mistral-7B-v0.1": 7.242,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.494,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.544,
    "Qwen/Qwen2.5-7B-Instruct": 7.616,
}
"""Parameters in units of 10^9, as their authors count them."""


def test_shapes_are_shipped_for_every_hub_model_that_a_config_names():
    shipped = yaml.safe_load(Path(lrlhf.model.pretrained.__file__).with_name("shapes.yaml").read_text())
    assert shipped.keys() == PUBLISHED.keys()
    configs = (Path(__file__).parents[2] / "configs").rglob("*.yaml")
    named = {
        (values.get("model") or {}).get("init_args", {}).get("base_model")
        for values in map(yaml.safe_load, (path.read_text() for path in configs))
    }
    assert {name for name in named if name and "/" in name} <= shipped.keys()


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_a_shipped_shape_has_as_many_parameters_as_its_model(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_a_shape_that_is_nowhere_is_told_in_seconds(monkeypatch):
    """The hub does not answer: no waiting for retries."""
    import huggingface_hub

    class Unreachable:
        def head(self, *_, **__):
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Unreachable)
    start = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing: its config.json is not on this machine"), torch.device("meta"):
        load_model("nobody/nothing", torch.float32)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|start|>{{ m.role }}<|mid|>{{ m.content }}<|eot|>{% endfor %}", "<|eot|>"),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n"
            "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}",
            "</s>",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "</s>"),
        (None, "</s>"),
    ],
    ids=["as Llama 3", "as Mistral", "no token", "no template"],
)
def test_the_end_of_a_turn_is_what_the_chat_template_writes_behind_it(tiny_llama, template, end):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|mid|>", "<|eot|>"]})
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == tokenizer.get_vocab()[end]


def test_files_that_lack_weights_are_refused(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"files lack 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight, which would"):
        load_model(str(tmp_path), torch.float32)
