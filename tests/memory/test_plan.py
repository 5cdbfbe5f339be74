"""The plan against closed forms, and against what the allocator says of a real iteration."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lrlhf.errors import UserError
from lrlhf.memory import rehearsal
from lrlhf.memory.command import parse_size
from lrlhf.memory.job import Job
from lrlhf.memory.ledger import Ledger
from lrlhf.memory.measure import measure, small
from lrlhf.memory.plan import Plan, quantised
from lrlhf.memory.rehearsal import rehearse
from tests.conftest import save_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Large enough that its tensors outweigh Python's odds and ends."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8}
    return str(save_tiny_llama(tmp_path_factory.mktemp("plan") / "llama", vocab_size=2048, **sizes))


def job(base: str, prompt: int = 24, response: int = 40, **settings) -> Job:
    values = {
        "base_model": base,
        "sft": "runs/sft/handover",
        "reward_model": "runs/reward/handover",
        "lora": {"r": 8},
        "dtype": "float32",
        "quantize": None,
        "gradient_checkpointing": False,
        "micro_batch_size": 8,
        "ppo": {"minibatch_size": 16},
        "sampling": {"max_new_tokens": response, "batch_size": 64},
        **settings,
    }
    return Job({"class_path": "lrlhf.PPOPolicy", "init_args": values}, prompt, response, 32)


def test_the_ledger_counts_what_lives_at_the_peak_and_frees_what_dies():
    ledger = Ledger(vocabulary=7)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        weight = torch.empty(10, 100)
        ledger.own("base", [weight])
        with ledger.phase() as peak:
            logits = weight @ torch.empty(7, 100).t()
            del logits
            torch.empty(5)
    assert peak == {"base": 4000, "activations": 2800, "logits": 280}
    assert ledger.now["logits"] == 0


def test_masks_stay_real_so_that_rows_can_be_picked_by_them():
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(vocabulary=7):
        mask = torch.ones(4, 3, dtype=torch.bool)
        mask[0, 0] = False
        picked = torch.empty(4, 3, 5)[mask]
    assert picked.shape == (11, 5)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 352)])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_in_4_bits_are_those_of_bitsandbytes(rows, columns, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(rows, columns), quant_type="nf4", blocksize=64, compress_statistics=double
    )
    parts = [packed, state.absmax, state.code]
    if double:
        parts += [state.state2.absmax, state.state2.code]
    assert quantised(rows, columns, {"kind": "nf4", "double": double}) == sum(part.nbytes for part in parts)


def test_bytes_in_8_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weights, scales, _ = functional.int8_vectorwise_quant(torch.randn(64, 352, dtype=torch.float16))
    assert quantised(64, 352, {"kind": "int8"}) == weights.nbytes + scales.nbytes


def test_static_bytes_are_a_count_by_hand(llama):
    phases = Plan(job(llama, response=400)).phases
    width, inner, layers, vocabulary, keys = 128, 352, 4, 2048, 32
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    base = 4 * (vocabulary * width + layers * layer + width)
    adapter = 4 * layers * 8 * (2 * 2 * width + 2 * (width + keys))
    assert phases["load"]["adapters"] == 4 * adapter
    assert base <= phases["load"]["base"] <= base + 4 * 2 * width  # and the rotary frequencies
    assert phases["update"]["gradients"] == 2 * adapter + 4 * (width + 1)
    assert phases["rollout"]["cache"] == 32 * 4 * layers * 2 * keys * (24 + 400 - 1)


QUICK = [
    {"lora": None, "sft": None, "gradient_checkpointing": True},
    {"reward_model": None, "reward_function": "lrlhf.rewards.vader_sentiment"},
]
OTHERS = [
    {},
    {"prompt": 48, "response": 80, "gradient_checkpointing": True},
    {"dtype": "bfloat16"},
    {"gradient_checkpointing": True},
    {"prompt": 48, "response": 80},
    {"micro_batch_size": 2},
    {"lora": None, "sft": None},
    {"lora": None, "sft": None, "prompt": 48, "response": 80},
]


def test_a_rehearsal_computes_nothing(llama, monkeypatch):
    rehearsed, moments = [], rehearsal._moments

    def spy(module, *rest):
        rehearsed.extend([*module.backbone.parameters()])
        yield from moments(module, *rest)

    monkeypatch.setattr(rehearsal, "_moments", spy)
    rehearse(job(llama))
    assert len(rehearsed) > 50
    assert all(isinstance(tensor, FakeTensor) for tensor in rehearsed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_checkpointing": True, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"lora": None, "sft": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_few_layers_tell_what_all_would(tmp_path, monkeypatch, settings):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 9, "num_attention_heads": 4}
    deep = job(str(save_tiny_llama(tmp_path / "deep", vocab_size=999, **sizes)), **settings)
    told, base = rehearse(deep)
    monkeypatch.setattr(rehearsal, "FEW", 9)  # as deep as the model is
    assert (told, base) == rehearse(deep)
    assert base.layers == 9


@pytest.mark.parametrize(
    "settings", [*QUICK, *(pytest.param(more, marks=pytest.mark.slow) for more in OTHERS)], ids=str
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(llama, settings):
    little = small(job(llama, **settings))
    plan, measured = Plan(little), measure(little)
    assert plan.counted(plan.peak) == pytest.approx(max(measured.values()), rel=0.1)
    for phase, size in measured.items():
        assert plan.counted(phase) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("stage", ["SFT", "RewardModel", "DPO", pytest.param("RewardEnsemble", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"gradient_checkpointing": True, "dtype": "bfloat16"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_so_is_that_of_the_stages_without_rollouts(llama, stage, settings):
    more = {"RewardEnsemble": {"members": 3, "bootstrap": True}, "DPO": {"precompute_reference": False}}
    values = {
        "base_model": llama,
        "sft": None if stage == "SFT" else "runs/sft/handover",
        **more.get(stage, {}),
        "lora": {"r": 8},
        "dtype": "float32",
        "quantize": None,
        "gradient_checkpointing": False,
        "micro_batch_size": 8,
        **settings,
    }
    little = small(Job({"class_path": f"lrlhf.{stage}", "init_args": values}, 48, 80, 32))
    plan, measured = Plan(little), measure(little)
    assert plan.counted(plan.peak) == pytest.approx(max(measured.values()), rel=0.1)
    assert set(measured) == {"update"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("GRPO", {"updates": {"minibatch_size": 16}, "divergence_coefficient": 0.04}),
        ("RLOO", {"updates": {"minibatch_size": 16}}),
        ("ExpertIteration", {"minibatch_size": 4}),
    ],
)
def test_so_is_that_of_the_methods_with_groups(llama, method, settings):
    ours = job(llama, **settings)
    del ours.model["init_args"]["ppo"]
    model = {"class_path": f"lrlhf.{method}", "init_args": ours.model["init_args"]}
    little = small(replace(ours, model=model, group_size=4))
    plan, measured = Plan(little), measure(little)
    assert plan.counted(plan.peak) == pytest.approx(max(measured.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"prompt": 48, "response": 80}],
    ids=str,
)
def test_so_is_that_of_the_embedded_model(settings):
    little = small(job("smollm2-135m-instruct", **{"micro_batch_size": 4, **settings}))
    plan, measured = Plan(little), measure(little)
    assert plan.counted(plan.peak) == pytest.approx(max(measured.values()), rel=0.1)
    for phase, size in measured.items():
        assert plan.counted(phase) == pytest.approx(size, rel=0.1)


def test_sizes_are_read_as_vendors_write_them():
    assert parse_size("24GB") == parse_size("24 GiB") == 24 * 2**30
    assert parse_size("512mb") == 2**29


@pytest.mark.parametrize("text", ["", "many", "0GB", "-3GB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="give a size"):
        parse_size(text)
