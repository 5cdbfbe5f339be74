"""Both engines give the tokens that a plain loop over the model gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrlhf import Backbone, LoRA, Sampling, UserError
from lrlhf.model.decoding import StaticDecoder, StaticStep
from lrlhf.model.generation import respond, sample_responses
from tests.model.test_generation import made, prompts

STOPS = torch.arange(2, 60)


def plain_loop(folder, ids, mask, uniforms, stops, tokens):
    """Every token by a whole pass without a cache, inverting the cumulative distribution."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for row, keep, draws in zip(ids, mask, uniforms, strict=True):
        line = row[keep]
        said = []
        for step in range(tokens):
            with torch.no_grad():
                probabilities = model(line[None]).logits[0, -1].softmax(-1)
            said.append(int((probabilities.cumsum(-1) <= draws[step] * probabilities.sum()).sum()))
            line = torch.cat([line, torch.tensor(said[-1:])])
            if said[-1] in stops:
                break
        found.append(said)
    return found


@pytest.mark.parametrize("engine", ["dynamic", "static"])
def test_both_engines_draw_what_a_loop_without_a_cache_draws(tiny_llama, engine, monkeypatch):
    shapes = []
    run = StaticStep._run
    monkeypatch.setattr(StaticStep, "_run", lambda self: shapes.append(tuple(self.mask.shape)) or run(self))
    ids, mask = prompts(7)
    uniforms = torch.rand(7, 100, generator=torch.Generator().manual_seed(4))
    backbone, sampling = made(tiny_llama), Sampling(max_new_tokens=100, engine=engine)
    with backbone.role("base"):
        tokens, ended = sample_responses(
            backbone, ids, mask, sampling=sampling, stop_ids=torch.arange(2, 8), uniforms=uniforms
        )
    said = [row[keep].tolist() for row, keep in zip(tokens, ended, strict=True)]
    assert said == plain_loop(tiny_llama, ids, mask, uniforms, set(range(2, 8)), 100)
    assert (engine == "static") == bool(shapes)
    if shapes:
        assert len({shape[-1] for shape in shapes}) <= 4
        assert shapes[0][0] == 7
        assert shapes[-1][0] <= 3  # half of the rows had ended


def test_groups_and_preambles_give_the_same_tokens_with_either_engine(tiny_llama):
    backbone = Backbone(tiny_llama, lora=LoRA(r=2, alpha=4))
    backbone.add_role("policy", ("policy",), trainable=True)
    for p in backbone.trainable("policy"):
        torch.nn.init.normal_(p, std=0.2)
    head = torch.arange(3, 43)
    ids = torch.stack([torch.cat([head, torch.tensor([50 + i, 60 + i])]) for i in range(4)]).repeat_interleave(2, 0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = []
    for engine, group in (("dynamic", 1), ("dynamic", 2), ("static", 1), ("static", 2)):
        settings = {"sampling": Sampling(max_new_tokens=9, engine=engine), "stop_ids": STOPS, "group_size": group}
        with backbone.role("policy"):
            found.append(respond(backbone, ids, mask, generator=torch.Generator().manual_seed(1), **settings))
    for tokens, ended in found[1:]:
        assert torch.equal(tokens, found[0][0])
        assert torch.equal(ended, found[0][1])


def test_fixed_shapes_stay_on_the_same_memory(tiny_llama):
    backbone = made(tiny_llama)
    ids, mask = prompts(3)
    with torch.no_grad(), backbone.role("base"):
        decoder = StaticDecoder(backbone, mask, *backbone.prefill(ids, mask)[2:], 12)
        decoder(ids)
        decoder(torch.tensor([[5], [6], [7]]))
        step = decoder._fixed
        layer = step.cache.layers[0]
        held = [t.data_ptr() for t in (step.ids, step.mask, step.positions, layer.keys, layer.values)]
        for token in range(8, 18):
            decoder(torch.full((3, 1), token))
        assert [t.data_ptr() for t in (step.ids, step.mask, step.positions, layer.keys, layer.values)] == held
        assert decoder._fixed is step


def test_fixed_shapes_are_refused_where_they_would_be_wrong(tiny_llama):
    backbone = made(tiny_llama)
    ids, mask = prompts(2)
    backbone.model.config.sliding_window = 8
    with backbone.role("base"), pytest.raises(UserError, match="engine: dynamic"):
        sample_responses(
            backbone, ids, mask, sampling=Sampling(engine="static"), stop_ids=STOPS, uniforms=torch.rand(2, 300)
        )
