"""SFT fits demonstrations, on response tokens only."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrlhf import SFT, AlpacaDataModule
from tests.modules.helpers import SMALL, adamw, train_sft, trainer


def batch_of(base, files, rows=6):
    data = AlpacaDataModule(train=files["sft"], tokenizer=base, batch_size=rows)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_the_loss_is_transformers_own_with_prompt_and_padding_left_out(tiny_llama, data_files):
    module, batch = SFT(base_model=tiny_llama, **SMALL), batch_of(tiny_llama, data_files)
    module.configure_model()
    with torch.no_grad(), module.backbone.role("sft"):
        ours = module.negative_log_likelihood(batch).sum() / batch.response_mask.sum()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    total = 0.0
    for row in range(len(batch)):
        ids = batch.ids[row][batch.mask[row]][None]
        labels = ids.clone()
        labels[:, : int(batch.prompt_mask[row].sum())] = -100
        total += float(model(input_ids=ids, labels=labels).loss) * int(batch.response_mask[row].sum())
    assert float(ours) == pytest.approx(total / int(batch.response_mask.sum()), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_gradients_do_not_depend_on_the_micro_batch(tiny_llama, data_files, size):
    module, batch = SFT(base_model=tiny_llama, **SMALL), batch_of(tiny_llama, data_files)
    module.configure_model()
    gradients = []
    for pieces in (len(batch), size):
        for p in module.backbone.trainable():
            p.grad = None
        with module.backbone.role("sft"), module.backbone.training_pass(dropout=False):
            for _, piece in batch.micro_batches(pieces):
                (module.negative_log_likelihood(piece).sum() / batch.response_mask.sum()).backward()
        gradients.append([p.grad for p in module.backbone.trainable()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_training_lowers_the_loss_and_validation_reports_perplexity(tmp_path, tiny_llama, data_files):
    module = SFT(base_model=tiny_llama, optimizer=adamw(2e-2), **SMALL)
    data = AlpacaDataModule(train=data_files["sft"], val=data_files["sft"], tokenizer=tiny_llama, batch_size=8)
    runner = trainer(tmp_path, enable_checkpointing=False, max_epochs=6)
    before = runner.validate(module, data, verbose=False)[0]
    runner.fit(module, data)
    after = {k: float(v) for k, v in runner.callback_metrics.items()}
    assert after["val/loss"] < 0.8 * before["val/loss"]
    assert after["val/perplexity"] == pytest.approx(torch.tensor(after["val/loss"]).exp().item(), rel=1e-5)


def test_a_checkpoint_holds_what_trains_and_nothing_else(tmp_path, tiny_llama, data_files):
    module = SFT(base_model=tiny_llama, **SMALL)
    data = AlpacaDataModule(train=data_files["sft"], tokenizer=tiny_llama, batch_size=8)
    runner = trainer(tmp_path, enable_checkpointing=False)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {n for n, _ in module.named_parameters() if "lora_" in n}
    assert (tmp_path / "x.ckpt").stat().st_size < 200_000


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path, tiny_llama, data_files):
    from lrlhf import UserError

    class Broken(SFT):
        def negative_log_likelihood(self, batch):
            return super().negative_log_likelihood(batch) * float("inf")

    module = Broken(base_model=tiny_llama, **SMALL)
    module.configure_model()
    before = [p.clone() for p in module.backbone.trainable()]
    data = AlpacaDataModule(train=data_files["sft"], tokenizer=tiny_llama, batch_size=8)
    with pytest.raises(UserError, match="the loss is inf in iteration 0"):
        trainer(tmp_path, enable_checkpointing=False).fit(module, data)
    assert all(torch.equal(a, b) for a, b in zip(before, module.backbone.trainable(), strict=True))


def test_full_fine_tuning_hands_over_a_model_that_can_be_the_next_base(tmp_path, tiny_llama, data_files):
    module = SFT(base_model=tiny_llama, **{**SMALL, "lora": None}, optimizer=adamw(1e-3))
    data = AlpacaDataModule(train=data_files["sft"], tokenizer=tiny_llama, batch_size=8)
    trainer(tmp_path, enable_checkpointing=False).fit(module, data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "handover/model")
    trained = dict(module.backbone.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
    assert (tmp_path / "handover/model/tokenizer.json").is_file()


def test_two_runs_of_one_seed_are_equal_bit_for_bit(tmp_path, tiny_llama, data_files):
    import lightning as L

    weights = []
    for _ in range(2):
        L.seed_everything(7)
        weights.append([p.clone() for p in train_sft(tiny_llama, data_files, tmp_path).backbone.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
