"""Sampling with a cache is sampling from the model."""

import torch
from transformers import AutoModelForCausalLM

from lrlhf.config import Sampling
from lrlhf.functional import position_ids
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import sample_responses

STOP = torch.tensor([2])


def prompts(rows: int = 6):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(7) >= torch.arange(rows)[:, None]
    return torch.randint(3, 250, (rows, 7), generator=generator) * mask, mask


def sample(backbone, ids, mask, sampling, uniforms, stop=STOP):
    with backbone.role("base"):
        return sample_responses(backbone, ids, mask, sampling=sampling, stop_ids=stop, uniforms=uniforms)


def made(folder) -> Backbone:
    backbone = Backbone(folder)
    backbone.add_role("base")
    return backbone


def test_greedy_responses_are_those_of_transformers(tiny_llama):
    ids, mask = prompts()
    stops = torch.arange(2, 60)  # rows end at different steps
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": stops.tolist()}
    theirs = model.generate(ids, attention_mask=mask.long(), **settings)[:, 7:]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    ours, ended = sample(made(tiny_llama), ids, mask, greedy, torch.zeros(6, 12), stops)
    assert torch.equal(ours, theirs)
    assert len(set(ended.sum(-1).tolist())) > 2


def test_a_response_does_not_depend_on_the_rest_of_the_batch(tiny_llama):
    ids, mask = prompts()
    backbone, sampling = made(tiny_llama), Sampling(max_new_tokens=10)
    uniforms = torch.rand(6, 10)
    stops = torch.arange(2, 120)  # many stop tokens: rows leave the batch early and at different steps
    together, ended = sample(backbone, ids, mask, sampling, uniforms, stops)
    assert len(set(ended.sum(-1).tolist())) > 2
    for row in range(6):
        alone, alone_mask = sample(backbone, ids[[row]], mask[[row]], sampling, uniforms[[row]], stops)
        length = int(alone_mask.sum())
        assert torch.equal(together[row, :length], alone[0, :length])
        assert int(ended[row].sum()) == length


def test_sampled_tokens_follow_the_model_s_distribution(tiny_llama):
    ids, mask = prompts(1)
    backbone, n = made(tiny_llama), 4000
    uniforms = ((torch.arange(n) + 0.5) / n)[:, None]
    tokens, _ = sample(
        backbone, ids.repeat(n, 1), mask.repeat(n, 1), Sampling(max_new_tokens=1, temperature=0.7), uniforms
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits[0, -1]
    expected = torch.softmax(logits / 0.7, -1)
    found = torch.bincount(tokens[:, 0], minlength=len(expected)) / n
    # a grid of n uniforms resolves every probability to 1/n
    assert float((found - expected).abs().max()) <= 1.5 / n


def test_a_response_stops_after_its_first_stop_token_and_is_zero_after(tiny_llama):
    ids, mask = prompts()
    tokens, ended = sample(
        made(tiny_llama), ids, mask, Sampling(max_new_tokens=20), torch.rand(6, 20), torch.arange(2, 60)
    )
    for row, keep in zip(tokens, ended, strict=True):
        length = int(keep.sum())
        assert keep[:length].all()
        assert (row[length:] == 0).all()
        stops = [i for i, t in enumerate(row.tolist()) if 2 <= t < 60]
        assert (stops[0] + 1 == length) if stops else length == tokens.shape[1]
