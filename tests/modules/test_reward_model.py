"""The reward model prefers what people prefer, and scores the same wherever it is loaded."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrlhf import AlpacaDataModule, RewardModel
from lrlhf.datamodules.collate import collate_preferences
from tests.modules.helpers import SMALL, adamw, train_reward, train_sft, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, data_files):
    folder = tmp_path_factory.mktemp("reward")
    train_sft(tiny_llama, data_files, folder / "sft")
    return train_reward(tiny_llama, data_files, folder / "reward", sft=str(folder / "sft/handover")), folder


def pairs(base, files, rows=8):
    data = AlpacaDataModule(train=files["pairs"], tokenizer=base, task="preference")
    data.setup("fit")
    return collate_preferences(data.rows["train"][:rows])


def test_the_loss_is_bradley_terry_at_the_last_response_token(tiny_llama, data_files):
    module, batch = RewardModel(base_model=tiny_llama, centering=0.01, **SMALL), pairs(tiny_llama, data_files)
    module.configure_model()
    head = module.backbone.heads["reward"]
    with torch.no_grad(), module.backbone.role("reward"):
        ours = module.pair_loss(batch).sum()
        scores = []
        for side in (batch.chosen, batch.rejected):
            rows = []
            for row in range(len(batch)):
                ids = side.ids[row][side.mask[row]][None]
                states = module.backbone.model.model(input_ids=ids).last_hidden_state
                rows.append(float(head(states[0, -1])))
            scores.append(torch.tensor(rows, dtype=torch.float64))
    chosen, rejected = scores
    expected = torch.log1p(torch.exp(rejected - chosen)) + 0.01 * (chosen + rejected) ** 2
    assert float(ours) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_it_learns_a_visible_preference(tmp_path, tiny_llama, data_files):
    rows = [json.loads(line) for line in Path(data_files["pairs"]).read_text().splitlines()]
    path = tmp_path / "clear.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"output_1": "yes", "output_2": "no", "preference": 1}) + "\n" for row in rows)
    )
    module = RewardModel(base_model=tiny_llama, optimizer=adamw(1e-2), **SMALL)
    data = AlpacaDataModule(train=str(path), val=str(path), tokenizer=tiny_llama, task="preference", batch_size=8)
    runner = trainer(tmp_path, enable_checkpointing=False, max_epochs=6)
    runner.fit(module, data)
    assert float(runner.callback_metrics["val/accuracy"]) == 1.0
    assert float(runner.callback_metrics["val/longer_accuracy"]) == 1.0
    assert float(runner.callback_metrics["val/pairs"]) == len(rows)


def test_a_fresh_process_scores_bit_for_bit_and_plain_peft_up_to_rounding(trained, tiny_llama, data_files):
    module, folder = trained
    batch = pairs(tiny_llama, data_files, rows=4).chosen
    with torch.no_grad(), module.backbone.role("reward"):
        here = [float(module.backbone.scores(batch.rows(torch.tensor([i])))) for i in range(4)]
    rows = [batch.ids[i][batch.mask[i]].tolist() for i in range(4)]
    prompt_lengths = batch.prompt_mask.sum(-1).tolist()
    script = f"""
        import json, sys, torch
        torch.set_num_threads(1)
        from safetensors.torch import load_file
        rows, prompts = {rows}, {prompt_lengths}
        folder, base = {str(folder / "reward/handover")!r}, {tiny_llama!r}

        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder + "/sft", adapter_name="sft")
        model.load_adapter(folder + "/reward", adapter_name="reward")
        model.base_model.set_adapter(["sft", "reward"])
        model.eval()
        head = load_file(folder + "/head.safetensors")
        with torch.no_grad():
            trunk = model.base_model.model.model
            last = [trunk(input_ids=torch.tensor([r]), use_cache=False).last_hidden_state[:, -1] for r in rows]
            peft = [float(torch.nn.functional.linear(h, head["weight"])) for h in last]

        from lrlhf.model.backbone import Backbone
        from lrlhf.run.handover import Handover
        from lrlhf.types import Sequences
        handover = Handover.read(folder)
        backbone = Backbone(base).eval()
        backbone.load_role("reward", handover.stack, handover.folder, head=True)
        ours = []
        with torch.no_grad(), backbone.role("reward"):
            for r, p in zip(rows, prompts):
                ids = torch.tensor([r]); mask = torch.ones_like(ids, dtype=torch.bool)
                ours.append(float(backbone.scores(Sequences(ids[:, :p], mask[:, :p], ids[:, p:], mask[:, p:]))))
        print(json.dumps([peft, ours]))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    peft, ours = json.loads(run.stdout.splitlines()[-1])
    assert ours == here
    assert peft == pytest.approx(here, rel=1e-6)  # fp32 sums in another order
    assert len(set(here)) == 4


def test_the_manifest_s_probe_is_scored_again_to_the_last_bit(trained, tiny_llama):
    from lrlhf.run.handover import Handover, score_probe

    module, folder = trained
    handover = Handover.read(folder / "reward/handover")
    assert score_probe(module.backbone, "reward", module.tokenizer) == handover.probe_score
    assert handover.stack == ("sft", "reward")


@pytest.mark.parametrize("size", [1, 3, 8])
def test_validation_counts_every_pair_once_however_the_batch_is_cut(size, tiny_llama, data_files):
    """Five pairs in pieces of `size`: the mean of -log sigmoid(chosen - rejected), pair by pair."""
    module, batch = RewardModel(base_model=tiny_llama, micro_batch_size=size, **SMALL), pairs(tiny_llama, data_files, 5)
    module.configure_model()
    module.validation_step(batch, 0)
    with torch.no_grad(), module.backbone.role("reward"):
        margins = torch.cat([torch.sub(*module.pair_scores(pairs_of(batch, row)).unbind(1)) for row in range(5)])
    assert float(module.val_loss.compute()) == pytest.approx(float(-margins.sigmoid().log().mean()), rel=1e-4)


def pairs_of(batch, row):
    index = torch.tensor([row])
    return replace(
        batch, chosen=batch.chosen.rows(index), rejected=batch.rejected.rows(index), margin=batch.margin[index]
    )
