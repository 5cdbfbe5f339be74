"""What `compare` writes of a run: a real PPO stage beside records of the other stages that were written by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import entropy
from transformers import AutoModelForCausalLM

from lrlhf.__main__ import main
from lrlhf.align.comparison import compare, load_run
from lrlhf.errors import UserError
from lrlhf.evaluation.judges import FunctionJudge
from lrlhf.rewards import vader_sentiment
from lrlhf.run.checkpoints import load, newest_checkpoint
from lrlhf.types import Sequences

COUNT = 6
DIVERGENCES = {"kl", "js", "js_paper", "exact_kl", "exact_forward_kl", "exact_js", "exact_total_variation"}


def letters(prompts: list[str], responses: list[str]) -> torch.Tensor:
    """A score that tells any two responses apart."""
    return torch.tensor([sum(map(ord, response)) % 7.0 for response in responses])


def shortest(prompts, responses):
    return [-len(response) for response in responses]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, tiny_llama, data_files):
    """Makes a run folder with a PPO stage of one iteration."""

    def make_run(lr: float):
        folder = tmp_path_factory.mktemp("run")
        model = {
            "base_model": tiny_llama,
            "reward_function": f"{__name__}.letters",
            "lora": {"r": 2, "alpha": 4},
            "ppo": {"minibatch_size": 4},
            "micro_batch_size": 4,
            "sampling": {"max_new_tokens": 6},
            "schedule": {"name": "constant", "warmup": 0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}},
        }
        rows = {"train": data_files["prompts"], "val": data_files["prompts"], "batch_size": 8, "val_batch_size": 4}
        values = {
            "seed_everything": 11,
            "trainer": {
                "accelerator": "cpu",
                "default_root_dir": str(folder / "rl"),
                "max_epochs": 1,
                "limit_train_batches": 1,
                "limit_val_batches": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
            "model": {"class_path": "lrlhf.PPOPolicy", "init_args": model},
            "data": {"class_path": "lrlhf.AlpacaDataModule", "init_args": rows},
        }
        (folder / "ppo.yaml").write_text(yaml.safe_dump(values))
        main(["fit", "--config", str(folder / "ppo.yaml")])
        return folder

    return make_run


@pytest.fixture(scope="module")
def moved(make_run):
    """A run whose policy has moved, and its comparison."""
    run = make_run(0.05)
    (run / "reward").mkdir()
    (run / "sft").mkdir()
    (run / "reward/metrics.csv").write_text(
        "epoch,step,train/loss,val/accuracy,val/longer_accuracy,val/pairs\n"
        "0,0,0.7,,,\n0,0,,0.5,0.625,16\n0,1,0.6,,,\n0,1,,0.75,0.5625,32\n0,2,0.5,,,\n"
    )
    (run / "sft/stage.json").write_text('{"fingerprint": "x", "seconds": 1.5}')
    (run / "rl/stage.json").write_text('{"fingerprint": "y", "seconds": 20.25}')
    return run, comparison(run, gold=vader_sentiment, count=COUNT)


def comparison(run, **options) -> dict:
    compare(run, **options)
    return json.loads((run / "comparison.json").read_text())


def test_the_accuracy_is_that_of_the_last_validation_and_the_seconds_those_of_the_stages_that_ran(moved):
    _, result = moved
    assert result["reward_model"] == {"accuracy": 0.75, "longer_accuracy": 0.5625, "pairs": 32}
    assert result["seconds"] == {"sft": 1.5, "rl": 20.25, "comparison": result["seconds"]["comparison"]}
    assert result["seconds"]["comparison"] > 0
    assert (result["gold"], result["seed"]) == ("vader_sentiment", 11)


def test_every_row_has_both_responses_to_one_prompt_with_their_scores_and_lengths(moved, data_files):
    _, result = moved
    prompts = [json.loads(line)["instruction"] for line in Path(data_files["prompts"]).read_text().splitlines()]
    assert [row["instruction"] for row in result["rows"]] == prompts[:COUNT]
    for row in result["rows"]:
        for side in (row["before"], row["after"]):
            assert side["learned"] == sum(map(ord, side["response"])) % 7
            assert side["gold"] == pytest.approx(float(vader_sentiment([""], [side["response"]])[0]))
            assert 1 <= side["length"] <= 6
            assert side["ended"] or side["length"] == 6
    assert any(row["before"]["response"] != row["after"]["response"] for row in result["rows"])


def test_divergences_are_means_over_the_tokens_of_the_policys_responses(moved, tiny_llama):
    """By transformers, with the adapter of the checkpoint merged by hand; two batches of unequal length."""
    run, result = moved
    _, module, data = load_run(run / "rl")
    data.val_limit = COUNT
    data.setup("validate")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    weights = load(newest_checkpoint(run / "rl"))["state_dict"]
    for name, parameter in policy.named_parameters():
        factors = {k: v for k, v in weights.items() if name.removesuffix(".weight") in k and ".policy." in k}
        if factors:
            down, up = (next(v for k, v in factors.items() if letter in k) for letter in ("lora_A", "lora_B"))
            parameter.data += 4 / 2 * up @ down
    tokens = []
    for number, batch in enumerate(data.val_dataloader()):
        text = Sequences(batch.prompt_ids, batch.prompt_mask, *module.sample(batch, "policy", "compare", number))
        for row in range(len(text)):
            ids, start = text.ids[row][text.mask[row]], int(text.prompt_mask[row].sum())
            with torch.no_grad():
                p, q = (m(input_ids=ids[None]).logits[0, start - 1 : -1].softmax(-1) for m in (policy, plain))
            tokens += entropy(p.double(), q.double(), axis=-1).tolist()
    assert len(tokens) == sum(row["after"]["length"] for row in result["rows"])
    assert result["divergences"].keys() == DIVERGENCES
    assert result["divergences"]["exact_kl"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
    assert result["divergences"]["exact_kl"] > 1e-3


def test_a_policy_that_has_not_moved_says_what_its_reference_says(make_run):
    """Both sides draw the same numbers."""
    result = comparison(make_run(0.0), count=3)
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert row["before"] == row["after"]
        assert row["before"]["gold"] is None
    assert result["divergences"] == pytest.approx(dict.fromkeys(DIVERGENCES, 0), abs=1e-6)  # fp32 rounding
    assert result["reward_model"] is None
    assert result["seconds"].keys() == {"comparison"}


def test_a_judge_says_of_every_row_whether_after_was_better(moved):
    run, _ = moved
    rows = comparison(run, judge=FunctionJudge(shortest), count=COUNT)["rows"]
    assert any(row["before"]["response"] != row["after"]["response"] for row in rows)
    for row in rows:
        before, after = (len(row[side]["response"]) for side in ("before", "after"))
        assert row["after"]["judged"] == (0.5 if before == after else float(after < before))
    assert json.loads((run / "evaluations/judge/evaluation.json").read_text())["judge"] == "shortest"


def test_other_prompts_may_be_named(moved, tmp_path):
    run, _ = moved
    (tmp_path / "other.jsonl").write_text('{"instruction": "one"}\n{"instruction": "two"}\n')
    rows = comparison(run, prompts=str(tmp_path / "other.jsonl"))["rows"]
    assert [row["instruction"] for row in rows] == ["one", "two"]


def test_a_reward_run_that_never_validated_has_no_accuracy(moved):
    run, _ = moved
    (run / "reward/metrics.csv").write_text("epoch,step,train/loss\n0,0,0.7\n")
    assert comparison(run, count=1)["reward_model"] is None


def test_a_folder_without_a_run_is_refused(moved, tmp_path):
    run, _ = moved
    with pytest.raises(UserError, match=rf"{tmp_path} holds no run .config\.yaml and checkpoints/.; run its stage"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "rl/config.yaml").read_text())
    with pytest.raises(UserError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match=r"rl holds no run"):
        compare(tmp_path)
    assert not (tmp_path / "comparison.json").exists()
