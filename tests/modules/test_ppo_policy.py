"""PPO does what its paper says, on a model small enough to know the answer."""

import math
from dataclasses import fields, replace

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrlhf import (
    AlpacaDataModule,
    DivergenceCallback,
    LoRA,
    PPOPolicy,
    RewardModel,
    RolloutCallback,
    Sampling,
    TextTemplate,
    UserError,
)
from lrlhf.functional import kl
from lrlhf.metrics import Means
from lrlhf.types import CriticExperience, Prompts, Sequences
from tests.modules.helpers import SMALL, adamw, ppo, ppo_after_both_stages, prompt_data, train_sft, trainer


class Recorder(RolloutCallback):
    """Keeps what PPO shows its callbacks."""

    def __init__(self):
        self.rollouts, self.rewards, self.metrics = [], [], []

    def on_rollout_end(self, trainer, policy, rollout, rewards):
        self.rollouts.append(rollout)
        self.rewards.append(rewards)

    def on_train_batch_end(self, trainer, *_):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(tmp_path, module, data, *callbacks, batches=2, **settings) -> Recorder:
    recorder = Recorder()
    runner = trainer(
        tmp_path, callbacks=[*callbacks, recorder], limit_train_batches=batches, enable_checkpointing=False, **settings
    )
    runner.fit(module, data)
    return recorder


def never_zero(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.arange(1.0, len(responses) + 1)


def ending_often(base, **settings) -> PPOPolicy:
    """A policy for which many tokens end a response, so that lengths differ, and no score is 0."""
    module = ppo(base, reward_function=never_zero, **settings)
    module.configure_model()
    module.stop_ids = torch.arange(2, 80)
    return module


def experience_of(module, tiny_llama, data_files, tmp_path) -> CriticExperience:
    """One real experience, of a policy that has moved away from its reference."""
    fit(tmp_path, module, prompt_data(tiny_llama, data_files), batches=1)
    module.seed, module.iteration = 0, 5
    with torch.no_grad():
        for p in module.backbone.trainable():
            p.add_(0.02 * torch.randn_like(p))
    batch = next(iter(prompt_data_loader(tiny_llama, data_files)))
    rollout = module.rollout(batch, "test", 0)
    rewards = torch.randn(rollout.response_mask.shape) * rollout.response_mask
    experience = module.estimate_advantages(rollout, rewards)
    old = experience.logprobs + 0.1 * torch.randn_like(experience.logprobs)
    return replace(experience, logprobs=old * experience.response_mask)


def prompt_data_loader(base, files):
    data = prompt_data(base, files)
    data.setup("fit")
    return data.train_dataloader()


def gradients(module, experience) -> list[torch.Tensor]:
    for p in module.backbone.trainable():
        p.grad = None
    with module.backbone.training_pass(dropout=False):
        for loss in module.losses(experience, Means()):
            loss.backward()
    return [p.grad.clone() for p in module.backbone.trainable()]


def test_at_learning_rate_zero_every_ratio_is_one_and_no_weight_moves(tmp_path, tiny_llama, data_files):
    module = ppo(tiny_llama, lr=0.0, lora=LoRA(r=2, alpha=4, dropout=0.5))
    module.configure_model()
    for name, parameter in module.backbone.named_parameters():
        if "lora_B.policy" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    module._checked = True  # a policy that has moved, so that dropout would show
    recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    for metrics in recorder.metrics:
        # old and new log-probs come from one code path; another batch width rounds fp32 sums differently
        assert abs(metrics["train/update_kl"]) < 1e-6
        assert metrics["train/clip_fraction"] == 0
    assert module.backbone.heads["critic"].weight.abs().sum() == 0


def test_the_score_lands_on_the_last_response_token_and_nowhere_else(tmp_path, tiny_llama, data_files):
    recorder = fit(tmp_path, ending_often(tiny_llama), prompt_data(tiny_llama, data_files))
    assert len({int(n) for rollout in recorder.rollouts for n in rollout.lengths}) > 2
    for rollout, rewards in zip(recorder.rollouts, recorder.rewards, strict=True):
        for row in range(len(rollout)):
            expected = torch.zeros(rewards.shape[1])
            expected[int(rollout.response_mask[row].sum()) - 1] = rollout.scores[row]
            assert torch.equal(rewards[row], expected)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_gradients_do_not_depend_on_the_micro_batch(tmp_path, tiny_llama, data_files, size):
    module = ppo(tiny_llama, entropy_coefficient=0.01)
    experience = experience_of(module, tiny_llama, data_files, tmp_path)
    module.micro_batch_size = 8
    whole = gradients(module, experience)
    module.micro_batch_size = size
    for a, b in zip(whole, gradients(module, experience), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    assert max(float(g.abs().max()) for g in whole) > 1e-3


def test_gradients_do_not_depend_on_left_padding_or_order(tmp_path, tiny_llama, data_files):
    module = ppo(tiny_llama)
    experience = experience_of(module, tiny_llama, data_files, tmp_path)
    module.micro_batch_size = 8
    whole = gradients(module, experience)
    order = torch.randperm(len(experience))
    moved = experience.rows(order)
    pad = torch.zeros(len(moved), 9, dtype=torch.long)
    values = {field.name: getattr(moved, field.name) for field in fields(moved)}
    values["prompt_ids"] = torch.cat([pad, moved.prompt_ids], 1)
    values["prompt_mask"] = torch.cat([pad.bool(), moved.prompt_mask], 1)

    class Untrimmed(CriticExperience):
        def micro_batches(self, size):
            yield torch.arange(len(self)), self

    for a, b in zip(whole, gradients(module, Untrimmed(**values)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_the_loss_is_the_paper_s_by_hand(tmp_path, tiny_llama, data_files):
    module = ppo(tiny_llama)
    experience = experience_of(module, tiny_llama, data_files, tmp_path)
    mask, ratio_range = experience.response_mask, 0.2
    new = module.logprobs(experience, "policy").double()
    total = 0.0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(new[b, t] - experience.logprobs[b, t].double())
        advantage = float(experience.advantages[b, t])
        total += max(-advantage * ratio, -advantage * min(max(ratio, 1 - ratio_range), 1 + ratio_range))
    with module.backbone.training_pass(dropout=False):
        means = Means()
        list(module.losses(experience, means))
    assert means.compute()["policy_loss"] == pytest.approx(total / int(mask.sum()), rel=1e-4)


def test_a_fit_changes_only_the_policy_the_critic_and_its_head(tmp_path, tiny_llama, data_files):
    module = ppo_after_both_stages(tiny_llama, data_files, tmp_path)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".policy." in n or ".critic." in n}
    assert module.trained().keys() == changed
    handed_over = load_file(tmp_path / "sft/handover/sft/adapter_model.safetensors")
    assert torch.equal(
        module.backbone.model.model.layers[0].self_attn.q_proj.lora_B.sft.weight,
        handed_over["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
    )


def test_both_sampling_engines_train_the_same_policy(tmp_path, tiny_llama, data_files):
    found = []
    for engine in ("dynamic", "static"):
        torch.manual_seed(0)
        module = ending_often(tiny_llama, sampling=Sampling(max_new_tokens=8, engine=engine))
        recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files))
        found.append((recorder.rollouts[1].response_ids, module.backbone.trainable()))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_critic_warmup_leaves_the_policy_alone(tmp_path, tiny_llama, data_files):
    module = ppo(tiny_llama, critic_warmup=2)
    module.configure_model()
    before = [p.clone() for p in module.backbone.trainable("policy")]
    fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    assert all(torch.equal(a, b) for a, b in zip(before, module.backbone.trainable("policy"), strict=True))
    assert module.backbone.heads["critic"].weight.abs().sum() > 0


def test_inner_epochs_stop_when_the_update_is_too_far(tmp_path, tiny_llama, data_files):
    far = fit(
        tmp_path, ppo(tiny_llama, lr=0.1, inner_epochs=5, target_update_kl=1e-4), prompt_data(tiny_llama, data_files)
    )
    free = fit(tmp_path, ppo(tiny_llama, lr=0.1, inner_epochs=5), prompt_data(tiny_llama, data_files))
    assert far.metrics[0]["train/inner_epochs"] < 5
    assert free.metrics[0]["train/inner_epochs"] == 5


def test_a_nan_reward_stops_the_run_before_the_weights_change(tmp_path, tiny_llama, data_files):
    def broken(prompts, responses):
        return torch.tensor([float("nan")] * len(responses))

    module = ppo(tiny_llama, reward_function=broken)
    module.configure_model()
    before = [p.clone() for p in module.backbone.trainable()]
    with pytest.raises(UserError, match="reward is not finite in iteration 0"):
        fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    assert all(torch.equal(a, b) for a, b in zip(before, module.backbone.trainable(), strict=True))


def test_a_constant_reward_trains_without_noise(tmp_path, tiny_llama, data_files):
    def constant(prompts, responses):
        return torch.ones(len(responses))

    recorder = fit(tmp_path, ppo(tiny_llama, reward_function=constant), prompt_data(tiny_llama, data_files))
    assert all(math.isfinite(v) for m in recorder.metrics for v in m.values())


@pytest.mark.parametrize("stop", ["first", "never"])
def test_responses_that_end_at_once_or_never_survive(tmp_path, tiny_llama, data_files, stop):
    module = ppo(tiny_llama)
    module.configure_model()
    module.stop_ids = torch.arange(0, 300) if stop == "first" else torch.tensor([9999])
    recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    lengths = {int(n) for r in recorder.rollouts for n in r.lengths}
    assert lengths == ({1} if stop == "first" else {8})
    assert all(math.isfinite(v) for m in recorder.metrics for v in m.values())


def test_a_batch_of_one_and_a_prompt_at_the_limit_survive(tmp_path, tiny_llama, data_files):
    data = prompt_data(tiny_llama, data_files, batch_size=1)
    data.setup("fit")
    longest = max(len(row.prompt) for row in data.rows["train"])
    data = prompt_data(tiny_llama, data_files, batch_size=1, max_prompt_tokens=longest)
    recorder = fit(tmp_path, ppo(tiny_llama, minibatch_size=1), data)
    assert all(math.isfinite(v) for m in recorder.metrics for v in m.values())


def test_pad_equal_to_eos_keeps_the_real_eos(tmp_path, tmp_path_factory, data_files):
    from tests.conftest import save_tiny_llama

    base = str(save_tiny_llama(tmp_path_factory.mktemp("pad-eos"), pad="</s>"))
    sft = train_sft(base, data_files, tmp_path / "sft", lr=3e-2, max_epochs=8)
    batch = sft.trainer.datamodule.train_dataloader().collate_fn(sft.trainer.datamodule.rows["train"][:4])
    assert (batch.response_ids[torch.arange(4), batch.lengths - 1] == sft.tokenizer.eos_token_id).all()
    recorder = fit(tmp_path, ppo(base, sft=str(tmp_path / "sft/handover")), prompt_data(base, data_files))
    ended = [row[int(n) - 1] == 2 for r in recorder.rollouts for row, n in zip(r.response_ids, r.lengths, strict=True)]
    assert any(ended)


def test_the_same_seed_samples_the_same_texts_whatever_the_batch_in_memory(tmp_path, tiny_llama, data_files):
    runs = []
    for size in (3, 8):
        L.seed_everything(3)
        module = ending_often(
            tiny_llama, lr=0.0, micro_batch_size=size, sampling=Sampling(max_new_tokens=8, batch_size=size)
        )
        runs.append(fit(tmp_path, module, prompt_data(tiny_llama, data_files)))
    for a, b in zip(runs[0].rollouts, runs[1].rollouts, strict=True):
        assert torch.equal(a.response_ids, b.response_ids)


def test_on_an_enumerable_task_ppo_finds_the_optimum_in_closed_form(tmp_path, tiny_llama, data_files):
    """One token, reward by token, coefficient beta: the optimum is pi_ref exp(r / beta) / Z.

    A full model, since the optimum must lie in the family: an adapter of rank 2 cannot reach every distribution.
    """
    beta, favourites = 0.5, list(range(40, 60))

    def reward_of(token: int) -> float:
        return 1.0 if token in favourites else 0.0

    class Bandit(PPOPolicy):
        def score(self, sequences: Sequences, batch: Prompts) -> torch.Tensor:
            return torch.tensor([reward_of(int(t)) for t in sequences.response_ids[:, 0]])

    (tmp_path / "one.jsonl").write_text('{"instruction": "go"}\n' * 256)
    module = ppo(
        tiny_llama,
        kind=Bandit,
        lora=None,
        lr=3e-3,
        minibatch_size=128,
        micro_batch_size=256,
        sampling=Sampling(max_new_tokens=1),
        whiten_rewards=False,
        value_coefficient=1.0,
        value_clip_range=10.0,
        trace_decay=1.0,
    )
    template = TextTemplate("{instruction}")
    data = prompt_data(tiny_llama, {"prompts": str(tmp_path / "one.jsonl")}, batch_size=256, template=template)
    fit(tmp_path, module, data, DivergenceCallback(kl, beta), batches=1, max_epochs=120)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids, mask = batch.prompt_ids[:1], batch.prompt_mask[:1]
    one = Sequences(ids, mask, ids[:, :1], mask[:, :1])
    probabilities = {}
    for role in ("policy", "reference"):
        with torch.no_grad(), module.backbone.role(role):
            probabilities[role] = module.backbone.lm_head(module.backbone.encode(one)[0, 0]).softmax(-1)
    reward = torch.tensor([reward_of(t) for t in range(len(probabilities["reference"]))])
    optimum = probabilities["reference"] * torch.exp(reward / beta)
    optimum /= optimum.sum()
    ours, start = (float(probabilities[r][favourites].sum()) for r in ("policy", "reference"))
    goal = float(optimum[favourites].sum())
    # the mass on rewarded tokens moves from its start to the closed-form optimum, not beyond it
    assert goal - start > 0.15
    assert ours == pytest.approx(goal, abs=0.06)
    assert 0.5 * (probabilities["policy"] - optimum).abs().sum() < 0.12


def test_a_critic_that_is_a_head_learns_as_linear_regression_on_the_frozen_states(tmp_path, tiny_llama, data_files):
    """Its gradient is that of the clipped squared error by hand, and no pass runs for it."""
    module = ending_often(tiny_llama, critic="head")
    experience = experience_of(module, tiny_llama, data_files, tmp_path)
    assert {n.rpartition(".")[0] for n in module.trained() if "critic" in n} == {"backbone.heads.critic"}
    with torch.no_grad(), module.backbone.role("reference"):
        states = module.per_row(experience, experience.states.shape, module.backbone.encode)
    mask = experience.response_mask
    torch.testing.assert_close(experience.states[mask], states[mask], atol=1e-5, rtol=0)
    head = module.backbone.heads["critic"]
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight[0], head.bias))
    values = states[mask].double() @ weight + bias
    torch.testing.assert_close(experience.values[mask].double(), values.detach(), atol=1e-5, rtol=1e-5)
    old, returns = experience.values[mask].double(), experience.returns[mask].double()
    limit, both = module.ppo.value_clip_range, []
    for tried in (values, old + (values - old).clamp(-limit, limit)):
        both.append((tried - returns).square())
    (0.5 * module.ppo.value_coefficient * torch.maximum(*both).mean()).backward()
    module.zero_grad()
    encoded = []
    encode = module.backbone.encode
    module.backbone.encode = lambda rows: (encoded.append(module.backbone._role), encode(rows))[1]
    module.iteration, module.ppo = 0, replace(module.ppo, critic_warmup=1)
    for loss in module.losses(experience, Means()):
        loss.backward()
    assert encoded == []
    torch.testing.assert_close(head.weight.grad[0].double(), weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.bias.grad.double(), bias.grad, atol=1e-6, rtol=1e-4)


def test_a_run_whose_critic_is_a_head_trains_it_and_the_policy_alone(tmp_path, tiny_llama, data_files):
    module = ppo(tiny_llama, critic="head")
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    recorder = fit(tmp_path, module, prompt_data(tiny_llama, data_files))
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".policy." in n or "heads.critic" in n}
    assert recorder.rollouts[0].states.shape[2] == module.backbone.heads["critic"].in_features


@pytest.mark.parametrize("whole_reward", [False, True], ids=["reward with LoRA", "full reward"])
def test_a_full_policy_is_a_plain_model_and_its_critic_starts_as_the_reward_model(
    tmp_path, tiny_llama, data_files, whole_reward
):
    """Whatever the reward model is: its adapters are no part of the policy, and the critic has them in its weights."""
    reward = RewardModel(
        base_model=tiny_llama, optimizer=adamw(1e-2), **(SMALL | ({"lora": None} if whole_reward else {}))
    )
    pairs = AlpacaDataModule(train=data_files["pairs"], tokenizer=tiny_llama, task="preference", batch_size=8)
    trainer(tmp_path / "reward", enable_checkpointing=False).fit(reward, pairs)
    module = ppo(tiny_llama, reward_function=None, reward_model=str(tmp_path / "reward/handover"), lora=None)
    module.configure_model()
    ids = torch.arange(3, 40)
    logits = {}
    for role in ("reference", "policy", "reward", "critic"):
        with module.backbone.role(role):
            logits[role] = module.backbone.plain_logits(ids)
    assert torch.equal(logits["policy"], logits["reference"])
    assert (logits["reward"] - logits["reference"]).abs().max() > 1e-2
    torch.testing.assert_close(logits["critic"], logits["reward"], atol=1e-4, rtol=1e-4)  # merged in one rounding
    weights = len(list(AutoModelForCausalLM.from_pretrained(tiny_llama).parameters()))
    assert [len(module.backbone.trainable(role)) for role in ("policy", "critic")] == [weights, weights + 2]

    trainer(tmp_path / "ppo").fit(module, prompt_data(tiny_llama, data_files))
    with module.backbone.role("policy"):
        trained = module.backbone.plain_logits(ids)
    assert (trained - logits["policy"]).abs().max() > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/handover/model").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids[None]).logits[0], trained, atol=1e-5, rtol=1e-5)
