"""One frozen base; roles that are exactly what they claim to be."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lrlhf.config import LoRA
from lrlhf.functional import token_statistics
from lrlhf.kernels.linear import AVAILABLE, EVERYWHERE
from lrlhf.kernels.low_rank import add_low_rank
from lrlhf.model.adapters import AdaptedLinear, concatenate
from lrlhf.model.backbone import Backbone
from lrlhf.model.pretrained import install, load_model
from lrlhf.types import Sequences


def sequences(rows: int = 3, prompt: int = 5, response: int = 4, left: int = 0, seed: int = 0) -> Sequences:
    """Random tokens; row i has i padding tokens on the left of its prompt and i on the right of its response."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (rows, prompt + response), generator=generator)
    prompt_mask = torch.arange(prompt) >= torch.arange(rows)[:, None].clamp(max=prompt - 1)
    response_mask = torch.arange(response) < response - torch.arange(rows)[:, None].clamp(max=response - 1)
    pad = torch.zeros(rows, left, dtype=torch.long)
    return Sequences(
        torch.cat([pad, ids[:, :prompt] * prompt_mask], 1),
        torch.cat([pad.bool(), prompt_mask], 1),
        ids[:, prompt:] * response_mask,
        response_mask,
    )


@pytest.fixture
def backbone(tiny_llama) -> Backbone:
    made = Backbone(tiny_llama, lora=LoRA(r=2, alpha=4))
    made.add_role("reference", ("sft",))
    made.add_role("policy", ("sft", "policy"), trainable=True)
    made.add_role("reward", ("sft", "reward"), head="random")
    made.add_role("critic", ("sft", "reward", "critic"), trainable=True, head="zero")
    randomize(made, "sft", "reward")
    return made.eval()


def randomize(backbone: Backbone, *adapters: str) -> None:
    for name, parameter in backbone.named_parameters():
        if any(f".{adapter}." in name for adapter in adapters):
            torch.nn.init.normal_(parameter, std=0.3)


def train(backbone: Backbone, role: str, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(backbone.trainable(), lr=0.05)
    batch = sequences()
    for _ in range(steps):
        optimizer.zero_grad()
        with backbone.role(role), backbone.training_pass(dropout=False):
            hidden = backbone.encode(batch)
            loss = (backbone.values(hidden) - 1).square().sum() if role in backbone.heads else hidden.square().sum()
            (loss - backbone.lm_head(hidden).square().mean()).backward()
        optimizer.step()


def encode(backbone: Backbone, role: str, batch: Sequences) -> torch.Tensor:
    with torch.no_grad(), backbone.role(role):
        return backbone.encode(batch)


def test_a_new_role_is_the_stack_below_it_bit_for_bit(backbone):
    batch = sequences()
    assert torch.equal(encode(backbone, "policy", batch), encode(backbone, "reference", batch))
    assert torch.equal(encode(backbone, "critic", batch), encode(backbone, "reward", batch))
    assert not torch.equal(encode(backbone, "reward", batch), encode(backbone, "reference", batch))


def test_hidden_states_are_those_of_transformers_without_padding(tiny_llama):
    backbone, batch = Backbone(tiny_llama), sequences(left=3)
    backbone.add_role("base")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ours = encode(backbone, "base", batch)
    for row in range(3):
        ids = batch.ids[row][batch.mask[row]][None]
        theirs = model(ids, output_hidden_states=True).hidden_states[-1][0]
        length = int(batch.response_mask[row].sum())
        # fp32 sums in another order: the padding changes the shapes of the products.
        torch.testing.assert_close(ours[row, :length], theirs[-length - 1 : -1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [1, 7, 40])
def test_left_padding_changes_no_log_probability(backbone, left):
    def logprobs(batch):
        with torch.no_grad(), backbone.role("policy"):
            hidden = backbone.encode(batch)
            return token_statistics(hidden, backbone.lm_head, batch.response_ids, batch.response_mask).logprobs

    torch.testing.assert_close(logprobs(sequences(left=left)), logprobs(sequences()), atol=2e-5, rtol=1e-4)


def test_left_padding_changes_nothing_where_positions_are_absolute(tmp_path, tiny_llama):
    """LLaMA's rotary positions forgive a shift; GPT-2's learned ones do not."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    backbone = Backbone(str(tmp_path)).eval()
    backbone.add_role("base")
    torch.testing.assert_close(
        encode(backbone, "base", sequences(left=9))[0], encode(backbone, "base", sequences())[0], atol=1e-4, rtol=1e-4
    )


def test_adapters_off_give_the_base_before_and_after_training(backbone, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(20)[None]
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(backbone.model(input_ids=ids).logits)
            # Norms and products of ours add up in another order.
            torch.testing.assert_close(found[-1], model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        assert backbone.drift_of_base() == 0
        train(backbone, "policy")
        train(backbone, "critic")
    assert torch.equal(*found)
    weights = {name.replace(".base_layer", ""): p for name, p in backbone.model.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_role_gives_the_same_bits_whatever_is_adapted_or_trains(tiny_llama, dtype):
    """No faster path may depend on which layers carry adapters, or on whether gradients are asked for."""
    made = Backbone(tiny_llama, lora=LoRA(r=2), dtype=dtype).eval()
    made.add_role("reference", ("sft",))
    randomize(made, "sft")
    batch = sequences()
    before = encode(made, "reference", batch)
    made.lora = LoRA(r=2, targets=ALL_LINEAR)
    made.add_role("policy", ("sft", "policy"), trainable=True)
    assert made.drift_of_base() == 0
    assert torch.equal(encode(made, "reference", batch), before)
    assert torch.equal(encode(made, "policy", batch), before)
    with made.role("policy"), made.training_pass(dropout=False):
        assert torch.equal(made.encode(batch), before)
    train(made, "policy")
    assert made.drift_of_base() == 0
    assert torch.equal(encode(made, "reference", batch), before)


def test_weights_that_changed_between_two_passes_are_seen_by_the_second(backbone):
    """What a role without gradients keeps of its adapters ends with it, also where roles are nested."""
    randomize(backbone, "policy")
    batch = sequences()
    with backbone.role("policy"):
        with torch.no_grad(), backbone.role("reference"):
            backbone.encode(batch)
        before = backbone.encode(batch).detach()
        with torch.no_grad():
            assert torch.equal(backbone.encode(batch), before)
            randomize(backbone, "policy")
            inside = backbone.encode(batch)
    assert not torch.allclose(inside, before)
    assert torch.equal(encode(backbone, "policy", batch), inside)
    randomize(backbone, "policy")
    assert not torch.allclose(encode(backbone, "policy", batch), inside)
    with backbone.role("policy"):
        trained = backbone.encode(batch).detach()
    assert torch.equal(encode(backbone, "policy", batch), trained)


def test_a_write_to_the_base_is_seen(backbone):
    with torch.no_grad():
        backbone.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    assert backbone.drift_of_base() > 0


@pytest.mark.parametrize(("role", "parts"), [("policy", ["policy"]), ("critic", ["critic"])])
def test_only_the_tensors_of_the_role_change(backbone, role, parts):
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    train(backbone, role)
    changed = {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}
    ours = {n for n in before if any(f".{part}." in n for part in parts)}
    assert changed == ours
    assert changed


def test_inside_a_role_exactly_its_parameters_require_gradients(backbone):
    def wanting():
        return {name for name, p in backbone.named_parameters() if p.requires_grad}

    rest = wanting()
    assert rest == {n for n in rest if ".policy." in n or ".critic." in n or n.startswith("heads.critic")}
    with backbone.role("policy"):
        assert wanting() == {n for n in rest if ".policy." in n}
        with backbone.role("reward"):
            assert wanting() == set()
        assert wanting() == {n for n in rest if ".policy." in n}
    assert wanting() == rest


def test_roles_share_one_base_in_memory(backbone, tiny_llama):
    def storage(module):
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())

    base = storage(AutoModelForCausalLM.from_pretrained(tiny_llama))
    ours = [p for n, p in backbone.named_parameters() if "lora_" in n or n.startswith("heads")]
    assert storage(backbone) == base + sum(p.numel() * 4 for p in ours)


def test_gradients_of_one_role_survive_the_pass_of_another(backbone):
    batch = sequences()
    with backbone.role("policy"), backbone.training_pass(dropout=False):
        backbone.lm_head(backbone.encode(batch)).square().mean().backward()
    alone = [p.grad.clone() for p in backbone.trainable("policy")]
    with backbone.role("critic"), backbone.training_pass(dropout=False):
        backbone.values(backbone.encode(batch)).square().mean().backward()
    assert any(g.abs().sum() > 0 for g in alone)
    assert all(torch.equal(p.grad, g) for p, g in zip(backbone.trainable("policy"), alone, strict=True))
    assert all(p.grad is not None for p in backbone.heads["critic"].parameters())


def test_gradient_checkpointing_changes_no_gradient_and_really_recomputes(tiny_llama):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(tiny_llama, lora=LoRA(r=2), gradient_checkpointing=checkpointing)
        backbone.add_role("policy", ("policy",), trainable=True)
        count = [0]
        backbone.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        with backbone.role("policy"), backbone.training_pass(dropout=False):
            backbone.lm_head(backbone.encode(sequences())).square().mean().backward()
        gradients.append([p.grad for p in backbone.trainable("policy")])
        calls.append(count[0])
    assert calls == [1, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_saved_stack_is_shared_when_loaded_and_is_plain_peft(backbone, tiny_llama, tmp_path):
    batch = sequences()
    backbone.save_role("reward", tmp_path)
    fresh = Backbone(tiny_llama, lora=LoRA(r=2, alpha=4)).eval()
    fresh.load_role("reward", ("sft", "reward"), tmp_path, head=True)
    fresh.add_role("reference", ("sft",))
    assert fresh.adapters == ["sft", "reward"]
    assert torch.equal(encode(fresh, "reward", batch), encode(backbone, "reward", batch))
    assert torch.equal(encode(fresh, "reference", batch), encode(backbone, "reference", batch))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft = PeftModel.from_pretrained(model, str(tmp_path / "sft"), adapter_name="sft")
    peft.load_adapter(str(tmp_path / "reward"), adapter_name="reward")
    peft.base_model.set_adapter(["sft", "reward"])
    ids = torch.arange(12)[None]
    with torch.no_grad(), backbone.role("reward"):
        ours, theirs = (model.eval()(input_ids=ids).logits for model in (backbone.model, peft))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # fp32 sums in another order


def one_adapter(backbone, folder):
    backbone.save_role("policy", folder)
    concatenate([folder / "sft", folder / "policy"], folder / "adapter")


def test_the_exported_adapter_is_the_stack_as_one(backbone, tiny_llama, tmp_path):
    randomize(backbone, "policy")
    one_adapter(backbone, tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "adapter")).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad(), backbone.role("policy"):
        # one product of the summed rank instead of two: fp32 rounding alone.
        torch.testing.assert_close(
            backbone.model(input_ids=ids).logits, peft(input_ids=ids).logits, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_lora_a_trainable_role_is_a_full_model_and_the_base_stays(tiny_llama, dtype):
    backbone = Backbone(tiny_llama, dtype=dtype)
    backbone.add_role("reference")
    backbone.add_role("policy", ("policy",), trainable=True)
    batch = sequences()
    before = encode(backbone, "reference", batch)
    assert torch.equal(encode(backbone, "policy", batch), before)
    with backbone.role("policy"):
        assert torch.equal(backbone.encode(batch), before)
    train(backbone, "policy")
    assert torch.equal(encode(backbone, "reference", batch), before)
    assert not torch.equal(encode(backbone, "policy", batch), before)
    assert len(backbone.trainable("policy")) == len(list(backbone.model.parameters()))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_any_lora_variant_of_peft_starts_at_the_reference_and_trains(tiny_llama, options):
    backbone = Backbone(tiny_llama, lora=LoRA(r=2, options=options))
    backbone.add_role("reference")
    backbone.add_role("policy", ("policy",), trainable=True)
    batch = sequences()
    torch.testing.assert_close(
        encode(backbone, "policy", batch), encode(backbone, "reference", batch), atol=1e-6, rtol=0
    )
    train(backbone, "policy")
    assert not torch.allclose(encode(backbone, "policy", batch), encode(backbone, "reference", batch), atol=1e-3)


def test_adapters_and_heads_are_fp32_over_a_bf16_base(tiny_llama):
    backbone = Backbone(tiny_llama, lora=LoRA(r=2), dtype="bfloat16")
    backbone.add_role("critic", ("critic",), trainable=True, head="zero")
    assert {p.dtype for p in backbone.trainable()} == {torch.float32}
    assert backbone.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_exported_adapter_of_rank_stabilised_lora_is_the_stack_as_well(tiny_llama, tmp_path):
    backbone = Backbone(tiny_llama, lora=LoRA(r=2, alpha=4, options={"use_rslora": True})).eval()
    backbone.add_role("policy", ("sft", "policy"), trainable=True)
    randomize(backbone, "sft", "policy")
    one_adapter(backbone, tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "adapter")).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad(), backbone.role("policy"):
        torch.testing.assert_close(
            backbone.model(input_ids=ids).logits, peft(input_ids=ids).logits, atol=2e-4, rtol=1e-4
        )


def with_one_preamble(own: int = 4, shared: int = 30) -> Sequences:
    """Random rows behind the same 30 tokens, of different lengths."""
    batch = sequences(rows=4, prompt=own, left=3)
    preamble = torch.randint(3, 250, (shared,))
    rows = [torch.cat([preamble, row[keep]]) for row, keep in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    width = 3 + max(map(len, rows))
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return Sequences(ids, mask, batch.response_ids, batch.response_mask)


def tokens_through(backbone: Backbone, role: str, batch: Sequences) -> int:
    """Token places that the first layer sees in one pass."""
    seen = []
    hook = backbone.model.get_decoder().layers[0].register_forward_hook(lambda m, a, out: seen.append(out.shape[:2]))
    encode(backbone, role, batch)
    hook.remove()
    return sum(rows * columns for rows, columns in seen)


def test_a_preamble_runs_once_and_neither_padding_nor_last_tokens_run(backbone, monkeypatch):
    batch = with_one_preamble()
    prompts, responses = 4 + 3 + 2 + 1, 3 + 2 + 1 + 0
    assert tokens_through(backbone, "policy", batch) == 30 + prompts + responses
    monkeypatch.setattr(Backbone, "_worth_sharing", lambda *_: 0)
    assert tokens_through(backbone, "policy", batch) == 4 * 30 + prompts + responses
    monkeypatch.setattr(Backbone, "packs", lambda *_: False)
    assert tokens_through(backbone, "policy", batch) == 4 * (3 + 30 + 4 + 3)


def test_the_score_is_the_head_on_the_last_token_or_on_the_prompt_of_an_empty_response(backbone):
    batch = with_one_preamble()
    empty = torch.zeros_like(batch.response_mask[:1])
    batch = replace(batch, response_mask=torch.cat([batch.response_mask[:3], empty]))
    with torch.no_grad(), backbone.role("reward"):
        scores = backbone.scores(batch)
        for row in range(4):
            ids = batch.ids[row][batch.mask[row]][None]
            last = backbone.model.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(scores[row], backbone.values(last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", ["reference", "policy", "critic"])
def test_packing_changes_neither_states_nor_gradients(backbone, monkeypatch, role, checkpointing):
    """Behind one copy of the preamble, without padding alone, and as rows that transformers masks."""
    randomize(backbone, "policy", "critic")
    if checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, found = with_one_preamble(), []
    keep = batch.response_mask
    direction = torch.randn(4, 4, 32) * keep[..., None]
    for shared, packed in ((30, True), (0, True), (0, False)):
        assert shared in (0, backbone._worth_sharing(batch.prompt_ids, batch.prompt_mask))
        monkeypatch.setattr(backbone, "_worth_sharing", lambda *_, shared=shared: shared)
        monkeypatch.setattr(backbone, "packs", lambda packed=packed: packed)
        with backbone.role(role), backbone.training_pass(dropout=False):
            hidden = backbone.encode(batch)
            inputs = backbone.trainable(role)[: -2 if role == "critic" else None]
            gradients = torch.autograd.grad((hidden * direction).sum(), inputs) if inputs else ()
        found.append((hidden[keep], *gradients))
    assert role == "reference" or len(found[0]) > 8
    for packed in found[:2]:
        for mine, plain in zip(packed, found[2], strict=True):
            assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()  # fp32 sums in another order


def test_sampling_runs_a_preamble_once_and_draws_from_the_same_logits(backbone, monkeypatch):
    randomize(backbone, "policy")
    batch, found = with_one_preamble(), []
    new = torch.tensor([[5], [6], [7], [8]])
    for shared in (30, 0):
        monkeypatch.setattr(backbone, "_worth_sharing", lambda *_, shared=shared: shared)
        with torch.no_grad(), backbone.role("policy"):
            ids, mask, positions, cache = backbone.prefill(batch.prompt_ids, batch.prompt_mask)
            assert ids.shape == (4, 4 if shared else 3 + 30 + 4)
            first = backbone.next_token_logits(ids, mask, positions, cache)
            mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
            found.append((first, backbone.next_token_logits(new, mask, positions[:, -1:] + 1, cache)))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)


def test_a_preamble_is_not_shared_where_that_would_be_wrong(tiny_llama):
    batch = with_one_preamble()
    prompts = batch.prompt_ids, batch.prompt_mask
    made = Backbone(tiny_llama, lora=LoRA(r=2, dropout=0.5))
    made.add_role("policy", ("policy",), trainable=True)
    with made.training_pass(dropout=True):
        assert made._worth_sharing(*prompts) == 0
    assert made.eval()._worth_sharing(*prompts) == 30
    assert made._worth_sharing(*(x[:1] for x in prompts)) == 0
    made.model.config.sliding_window = 8
    assert made._worth_sharing(*prompts) == 0
    made.model.config.sliding_window = None
    made.model.set_attn_implementation("eager")
    assert made._worth_sharing(*prompts) == 0


def test_a_sharded_base_makes_no_pass_for_a_preamble(backbone):
    batch = with_one_preamble()
    backbone.synchronised = True
    with backbone.role("policy"):
        ids, *_, cache = backbone.prefill(batch.prompt_ids, batch.prompt_mask)
    assert ids is batch.prompt_ids
    assert cache.get_seq_length() == 0


def test_in_bf16_on_a_cpu_states_are_as_close_to_fp32_as_with_pytorchs_attention(tiny_llama):
    batch = sequences(rows=4, prompt=20, response=12)
    keep = batch.response_mask
    states = {}
    for name, dtype, attention in (
        ("exact", "float32", None),
        ("ours", "bfloat16", None),
        ("sdpa", "bfloat16", "sdpa"),
    ):
        made = Backbone(tiny_llama, dtype=dtype)
        made.add_role("base")
        assert made.model.config._attn_implementation == "lrlhf"
        if attention:
            made.model.set_attn_implementation(attention)
        states[name] = encode(made, "base", batch)[keep].float()
    error = {name: (states[name] - states["exact"]).abs().mean() for name in ("ours", "sdpa")}
    assert 0 < error["ours"] <= 1.2 * error["sdpa"]
    assert not torch.equal(states["ours"], states["sdpa"])


def test_adapters_multiply_in_the_bases_type_and_learn_in_fp32(tiny_llama, monkeypatch):
    made = Backbone(tiny_llama, lora=LoRA(r=2), dtype="bfloat16")
    made.add_role("policy", ("policy",), trainable=True)
    randomize(made, "policy")
    seen = []

    def spy(*tensors):
        seen.extend(tensor.dtype for tensor in tensors)
        return add_low_rank(*tensors)

    monkeypatch.setattr("lrlhf.model.adapters.add_low_rank", spy)
    with made.role("policy"), made.training_pass(dropout=False):
        made.encode(sequences()).float().square().sum().backward()
    assert seen == [torch.bfloat16] * 4 * 8
    assert {p.grad.dtype for p in made.trainable("policy")} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for p in made.trainable("policy"))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapted_layers_compute_what_pefts_do(tiny_llama, options):
    """Plain adapters by our product, and those of peft's own kinds by peft."""
    made = Backbone(tiny_llama, lora=LoRA(r=2, alpha=6, targets=["q_proj", "up_proj"], options=options))
    made.add_role("policy", ("sft", "policy"), trainable=True)
    randomize(made, "sft", "policy")
    layers = [m for m in made.model.modules() if isinstance(m, AdaptedLinear)]
    assert len(layers) == 4
    x = torch.randn(3, 5, 32)
    with made.role("policy"):
        for layer in layers:
            inputs = [p for p in layer.parameters() if p.requires_grad]
            ours, theirs = layer(x), super(AdaptedLinear, layer).forward(x)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(ours, layer.base_layer(x), atol=0.1)
            direction = torch.randn_like(ours)
            for mine, pefts in zip(*(torch.autograd.grad(y, inputs, direction) for y in (ours, theirs)), strict=True):
                torch.testing.assert_close(mine, pefts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (LlamaConfig, LlamaForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
    ],
)
def test_families_with_our_kernels_are_the_models_of_transformers(config, model):
    torch.manual_seed(0)
    settings = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    plain = model(config(**settings, **heads)).requires_grad_(False).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, mean=1 if parameter.ndim == 1 else 0, std=0.2)
    fast = install(copy.deepcopy(plain))
    changed = {type(m).__name__ for m in fast.modules() if type(m).__module__ == "lrlhf.kernels.install"}
    assert changed == {"Linear", "RMSNorm", "GatedMLP"}
    inputs = torch.randn(2, 7, 32, requires_grad=True)
    states = [m.get_decoder()(inputs_embeds=inputs).last_hidden_state for m in (fast, plain)]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)
    gradients = (torch.autograd.grad(y.square().sum(), inputs)[0] for y in states)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            fast.get_decoder()(inputs_embeds=inputs).last_hidden_state, states[1], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gated_layers_keep_less_on_any_device(tiny_llama, device):
    with torch.device(device):
        model = load_model(tiny_llama, torch.float32)
    kinds = [type(layer.mlp).__name__ for layer in model.get_decoder().layers]
    assert set(kinds) == {"GatedMLP"}


@pytest.mark.skipif(not (AVAILABLE and EVERYWHERE), reason="this processor gains nothing by it")
def test_every_product_of_an_fp32_base_is_ours(backbone):
    with torch.profiler.profile() as record, backbone.role("policy"), torch.no_grad():
        backbone.lm_head(backbone.encode(sequences(left=3)))
    counts = {event.key: event.count for event in record.key_averages()}
    linears = [name for name, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert counts["mkldnn::_linear_pointwise"] == len([name for name in linears if "lora_" not in name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_copy_recomputes_its_own_layers(tiny_llama, checkpointing):
    """A role that is a copy of the base, whose layers the base's checkpoints must not run."""
    made = Backbone(tiny_llama, gradient_checkpointing=checkpointing)
    made.add_role("policy", ("policy",), trainable=True)
    with torch.no_grad():
        made.copies["policy"].model.layers[0].mlp.up_proj.weight.mul_(2)
    batch = sequences()
    with made.role("policy"):
        with torch.no_grad():
            expected = made.encode(batch)
        with made.training_pass(dropout=False):
            states = made.encode(batch)
            states.square().mean().backward()
    torch.testing.assert_close(states[batch.response_mask], expected[batch.response_mask], atol=1e-6, rtol=1e-5)
    assert all(p.grad is not None for p in made.trainable("policy") if p.ndim > 1)
    assert all(p.grad is None for p in made.model.parameters())
