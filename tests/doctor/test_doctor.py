"""`lrlhf doctor`: what it says of a machine, and that its checks find what is wrong."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrlhf.doctor import command
from lrlhf.doctor.checks import CHECKS, Workplace, memory, numbers, stages
from lrlhf.doctor.command import main
from lrlhf.doctor.timing import layer_weights, products
from lrlhf.errors import UserError
from lrlhf.memory.plan import Plan
from lrlhf.model.backbone import Backbone


@pytest.fixture
def place(tmp_path):
    return Workplace("cpu", small=True, folder=tmp_path, rates={"float32": 1e11, "bfloat16": 1e11})


@pytest.fixture
def quick(monkeypatch):
    """No timing of products and no plan: other tests are about these."""
    monkeypatch.setattr(command, "product_rates", lambda device: {"float32": 2e11, "bfloat16": 4e11})
    monkeypatch.setattr(command, "fitting", lambda device: ["fits a run"])


def test_without_checks_it_tells_what_the_machine_is(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([])
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "float32 200 GFLOP/s, bfloat16 400 GFLOP/s" in said
    assert "fits a run" in said
    assert not list(tmp_path.iterdir())


def test_a_failed_check_is_in_the_report_and_the_others_run(quick, capsys, tmp_path, monkeypatch):
    def broken(place):
        """It breaks."""
        raise ValueError("no luck")

    def fine(place):
        """It holds."""
        return ["all well"]

    monkeypatch.setattr(command, "CHECKS", {"broken": broken, "fine": fine})
    with pytest.raises(UserError, match="broken failed"):
        main(["--check", "--out", str(tmp_path / "new/doctor.json")])
    report = json.loads((tmp_path / "new/doctor.json").read_text())
    assert [(c["check"], c["passed"], c["lines"]) for c in report["checks"]] == [
        ("broken", False, ["ValueError: no luck"]),
        ("fine", True, ["all well"]),
    ]
    assert "FAILED  broken" in (tmp_path / "new/doctor.txt").read_text()
    assert "all well" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(quick):
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        main(["--device", "cuda"])


def test_products_are_those_of_the_weights_that_a_token_meets():
    """Against a count of the parameters of the model itself."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert layer_weights(config) == (matrices, model.lm_head.weight.numel())
    found = products(config, 7, 5, inner_epochs=2)
    assert found == {
        "generate": 2 * (12 * matrices + 5 * 1600),
        "score": 2 * (4 * 12 * matrices + 2 * 5 * 1600),
        "update": 2 * (2 * 4 * 12 * matrices + 2 * 2 * 5 * 1600),
    }
    assert products(config, 7, 5, inner_epochs=2, reward_model=False)["score"] == found["score"] - 2 * 12 * matrices


def test_numbers_hold_in_every_kind_of_base(place):
    lines = numbers(place)
    assert [line.partition(":")[0] for line in lines] == ["float32", "bfloat16", "nf4", "int8"]
    assert "processor: 0 away" in lines[0]


def test_an_engine_that_is_off_by_one_position_is_found(place, monkeypatch):
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, rows: encode(self, rows).roll(1, dims=1))
    with pytest.raises(UserError, match="self-check: log-probs"):
        numbers(place)


def test_stages_run_with_their_self_checks(place):
    sft, checks, speed = stages(place)
    assert "8 self-checks held" in checks
    assert all(phase in speed for phase in ("generate", "score", "update"))


def test_a_plan_that_is_off_is_found(place, monkeypatch):
    counted = Plan.counted
    monkeypatch.setattr(Plan, "counted", lambda self, phase: int(1.2 * counted(self, phase)))
    with pytest.raises(AssertionError, match="more than a tenth off"):
        memory(place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resume", "processes", "sizes"])
def test_so_do_the_checks_that_start_processes(place, name):
    assert CHECKS[name](place)
