"""Each defect of the paper's code, against a step that is calculated by hand; without defects PaperPPO is PPOPolicy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lrlhf import LoRA, PaperPPO, PPOPolicy, UserError
from lrlhf.metrics import Means
from tests.modules.helpers import ppo, prompt_data, train_reward, train_sft
from tests.modules.test_ppo_policy import experience_of, fit, never_zero


def paper(base, *defects, **settings) -> PaperPPO:
    return ppo(base, kind=PaperPPO, defects=defects, **settings)


def policy_gradients(module, experience) -> list[torch.Tensor]:
    """Of one pass over the rows as one micro-batch."""
    parameters = module.backbone.trainable()
    for p in parameters:
        p.grad = None
    with module.backbone.training_pass(dropout=False):
        for loss in PPOPolicy.losses(module, experience, Means()):
            loss.backward()
    found = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def end_often(module):
    module.configure_model()
    module.stop_ids = torch.arange(2, 80)
    return module


def test_without_defects_it_is_ppo_bit_for_bit(tmp_path, tiny_llama, data_files):
    ours, theirs = ppo(tiny_llama), paper(tiny_llama)
    for module in (ours, theirs):
        torch.manual_seed(0)
        fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    assert any(p.abs().sum() > 0 for n, p in ours.named_parameters() if "lora_B.policy" in n)
    assert all(map(torch.equal, ours.backbone.trainable(), theirs.backbone.trainable()))


@pytest.mark.parametrize("limit", [1e9, 0.01])
def test_a_micro_batch_is_repeated_and_its_sum_is_clipped_each_time(tmp_path, tiny_llama, data_files, limit):
    settings = {"minibatch_size": 6, "micro_batch_size": 2, "max_grad_norm": limit, "optimizer": sgd(0.5)}
    module = paper(tiny_llama, "repeated_micro_batches", **settings)
    experience = experience_of(module, tiny_llama, data_files, tmp_path).rows(torch.arange(2))
    before = [p.detach().clone() for p in module.backbone.trainable()]
    once, step = policy_gradients(module, experience), None
    for _ in range(3):  # 6 / 2 passes
        step = once if step is None else [s + g for s, g in zip(step, once, strict=True)]
        norm = float(torch.sqrt(sum((s.double() ** 2).sum() for s in step)))
        step = [s * min(1.0, limit / (norm + 1e-6)) for s in step]
    if limit > 1:
        torch.testing.assert_close(step, [3 * g for g in once])
    taken = torch.optim.SGD(module.backbone.trainable(), lr=0.5)
    module.optimizers = lambda: taken
    module.manual_backward = lambda loss: loss.backward()
    with module.backbone.training_pass(dropout=False):
        module.optimization_step(module.losses(experience, Means()))
    for was, now, moved in zip(before, module.backbone.trainable(), step, strict=True):
        torch.testing.assert_close(now, was - 0.5 * moved, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_between_repetitions(tiny_llama, monkeypatch):
    """Gradients 3 x, 4 y, 1 x with a limit of 1: clipped each time they are another direction than clipped once."""
    module = paper(tiny_llama, "repeated_micro_batches", minibatch_size=6, micro_batch_size=2, max_grad_norm=1.0)
    module.configure_model()
    weight = module.backbone.heads["critic"].weight
    pulls = iter([(0, 3.0), (1, 4.0), (0, 1.0)])

    def losses(self, minibatch, *means):
        place, size = next(pulls)
        yield size * weight[0, place]

    monkeypatch.setattr(PPOPolicy, "losses", losses)
    for loss in module.losses(None):
        loss.backward()
    first = np.array([3.0, 0.0]) / 3
    second = first + [0.0, 4.0]
    third = second / np.linalg.norm(second) + [1.0, 0.0]  # the step clips once more
    np.testing.assert_allclose(weight.grad[0, :2].numpy(), third, rtol=1e-5)


def test_an_iteration_takes_a_step_for_every_micro_batch(tmp_path, tiny_llama, data_files, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: steps.append(1) and None)
    settings = {"minibatch_size": 4, "inner_epochs": 2, "micro_batch_size": 2, "optimizer": sgd(0.1)}
    fit(
        tmp_path,
        paper(tiny_llama, "repeated_micro_batches", **settings),
        prompt_data(tiny_llama, data_files),
        batches=1,
    )
    assert len(steps) == 2 * 8 // 2
    steps.clear()
    fit(tmp_path, ppo(tiny_llama, **settings), prompt_data(tiny_llama, data_files), batches=1)
    assert len(steps) == 2 * 8 // 4


def padded_rollout(tiny_llama, data_files, tmp_path):
    module = end_often(paper(tiny_llama, "padded_statistics", reward_function=never_zero))
    fit(tmp_path, module, prompt_data(tiny_llama, data_files), batches=1)
    with torch.no_grad():
        module.backbone.heads["critic"].weight.normal_()
        for p in module.backbone.trainable("critic"):
            p.add_(0.05 * torch.randn_like(p))
    data = prompt_data(tiny_llama, data_files)
    data.setup("fit")
    module.seed = 3
    batch = next(iter(data.train_dataloader()))
    rollout = module.rollout(batch, "test", 0)
    assert rollout.response_mask.shape == (8, 8)
    assert 0 < int(rollout.response_mask.sum()) < 64
    return module, rollout


def whitened(x, center):
    scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    return scaled if center else scaled + x.mean()


def test_padding_counts_in_values_whitening_and_gae(tmp_path, tiny_llama, data_files):
    module, rollout = padded_rollout(tiny_llama, data_files, tmp_path)
    # the critic's values by a plain pass of the model over prompt, response and padding
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids.masked_fill(~rollout.response_mask, 0)], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.response_mask], 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    head = module.backbone.heads["critic"]
    with torch.no_grad(), module.backbone.role("critic"):
        output = module.backbone.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True
        )
        states = output.hidden_states[-1][:, rollout.prompt_ids.shape[1] - 1 : -1]
        expected = (states @ head.weight[0] + head.bias).numpy()
    np.testing.assert_allclose(rollout.values.numpy(), expected, atol=2e-5)
    off = ~rollout.response_mask.numpy()
    assert np.abs(expected[off]).min() > 0
    # GAE over all columns, the paper's loop; whitening over all numbers
    rewards = torch.randn(8, 8) * rollout.response_mask
    scaled, values = whitened(rewards.double().numpy(), center=False), rollout.values.double().numpy()
    advantages, last = np.zeros((8, 8)), np.zeros(8)
    for t in reversed(range(8)):
        following = values[:, t + 1] if t < 7 else 0.0
        last = scaled[:, t] + following - values[:, t] + 0.95 * last
        advantages[:, t] = last
    experience = module.estimate_advantages(rollout, rewards)
    np.testing.assert_allclose(experience.returns.numpy(), advantages + values, atol=1e-4)
    np.testing.assert_allclose(experience.advantages.numpy(), whitened(advantages, center=True), atol=1e-4)
    assert torch.equal(experience.response_mask, rollout.response_mask)


def test_padding_counts_in_the_means_of_the_losses(tmp_path, tiny_llama, data_files):
    module, rollout = padded_rollout(tiny_llama, data_files, tmp_path)
    experience = module.estimate_advantages(rollout, torch.randn(8, 8) * rollout.response_mask)
    piece = next(experience.minibatches(4, torch.Generator().manual_seed(0)))
    assert piece.values.shape == (4, 8)
    moved = replace(piece, logprobs=piece.logprobs + 0.1 * piece.response_mask, values=piece.values + 0.3)
    with module.backbone.training_pass(dropout=False):
        policy, critic = (sum(float(x) for x in pair) for pair in zip(*_by_role(module, moved), strict=True))
    new = module.logprobs(moved, "policy").double().numpy()
    ratio = np.exp(new - moved.logprobs.numpy())[moved.response_mask.numpy()]
    a = moved.advantages.numpy()[moved.response_mask.numpy()]
    assert policy == pytest.approx(np.maximum(-a * ratio, -a * ratio.clip(0.8, 1.2)).sum() / 32, rel=1e-4)
    with torch.no_grad(), module.backbone.role("critic"):
        v = module._values(moved).numpy()
    old, g = moved.values.numpy(), moved.returns.numpy()
    clipped = old + (v - old).clip(-0.2, 0.2)
    by_hand = 0.1 * 0.5 * np.maximum((v - g) ** 2, (clipped - g) ** 2).mean()
    assert critic == pytest.approx(by_hand, rel=1e-4)


def _by_role(module, minibatch):
    """The losses as (policy's, critic's) of each micro-batch."""
    losses = [float(loss.detach()) for loss in module.losses(minibatch, Means())]
    half = len(losses) // 2
    return zip(losses[:half], losses[half:], strict=True)


def test_dropout_makes_the_first_ratio_another_than_one(tmp_path, tiny_llama, data_files):
    for defects, drops in (((), False), (("dropout_in_updates",), True)):
        module = paper(tiny_llama, *defects, lr=0.0, lora=LoRA(r=2, alpha=4, dropout=0.5))
        module.configure_model()
        for name, parameter in module.backbone.named_parameters():
            if "lora_B.policy" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        module._checked = True
        recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files))
        assert (recorder.metrics[0]["train/update_kl"] > 1e-3) == drops
        rollout = recorder.rollouts[0]
        torch.testing.assert_close(module.logprobs(rollout, "policy"), rollout.logprobs)  # old ones are without


def test_adapters_in_bfloat16_lose_small_steps(tmp_path, tiny_llama, data_files):
    grown = {}
    for defects in ((), ("bfloat16_adapters",)):
        module = paper(tiny_llama, *defects, lr=1e-5)
        build = module.build_roles

        def build_roles(module=module, build=build):
            build()
            start = module.backbone.trainable("policy")
            assert all(p.equal(p.bfloat16().float()) for p in start) == bool(module.defects)
            weight = module.backbone.model.model.layers[0].self_attn.q_proj.lora_A.policy.weight
            torch.nn.init.constant_(weight, 0.5)  # the next number that bfloat16 holds is 0.50390625

        module.build_roles = build_roles
        fit(tmp_path, module, prompt_data(tiny_llama, data_files))
        down = module.backbone.model.model.layers[0].self_attn.q_proj.lora_A.policy.weight
        grown[defects] = (down - 0.5).abs().max()
        held = [p.equal(p.bfloat16().float()) for p in module.backbone.trainable("policy")]
        assert all(held) == bool(defects)
        states = [s["exp_avg"] for p, s in module.optimizers().state.items() if p is down]
        assert states[0].equal(states[0].bfloat16().float()) == bool(defects)
        assert module.backbone.heads["critic"].weight.abs().max() > 0
    assert grown[()] > 5e-6
    assert grown["bfloat16_adapters",] == 0


def test_the_reward_model_reads_text_that_was_tokenised_again(tmp_path, tiny_llama, data_files):
    train_sft(tiny_llama, data_files, tmp_path / "sft")
    train_reward(tiny_llama, data_files, tmp_path / "reward", sft=str(tmp_path / "sft/handover"))
    parents = {"sft": str(tmp_path / "sft/handover"), "reward_model": str(tmp_path / "reward/handover")}
    modules = [paper(tiny_llama, *d, reward_function=None, **parents) for d in ((), ("retokenized_scores",))]
    recorders = [fit(tmp_path, m, prompt_data(tiny_llama, data_files), batches=1) for m in modules]
    plain, again = (r.rollouts[0] for r in recorders)
    assert torch.equal(plain.response_ids, again.response_ids)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [
        tokenizer.decode(torch.cat([p[a], r[b]]), skip_special_tokens=True)
        for p, a, r, b in zip(again.prompt_ids, again.prompt_mask, again.response_ids, again.response_mask, strict=True)
    ]
    backbone, changed = modules[1].backbone, 0
    for text, row, score in zip(texts, plain.ids, again.scores, strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        changed += len(ids) != int((row != 0).sum()) + 1
        with torch.no_grad(), backbone.role("reward"):
            states = backbone.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            assert float(backbone.heads["reward"](states[0, -1])) == pytest.approx(float(score), abs=1e-4)
    assert changed  # bytes that are no text came back as others
    assert not torch.allclose(plain.scores, again.scores, atol=1e-4)


def test_what_could_have_no_effect_is_refused(tiny_llama):
    with pytest.raises(UserError, match=r"lora\.dropout above 0"):
        paper(tiny_llama, "dropout_in_updates")
    with pytest.raises(UserError, match="set model.lora"):
        paper(tiny_llama, "bfloat16_adapters", lora=None)
    with pytest.raises(UserError, match="others read texts anyway"):
        paper(tiny_llama, "retokenized_scores")
    with pytest.raises(UserError, match="divides ppo.minibatch_size=4"):
        paper(tiny_llama, "repeated_micro_batches", micro_batch_size=3)
    with pytest.raises(UserError, match="critic: adapter"):
        paper(tiny_llama, "padded_statistics", critic="head")
