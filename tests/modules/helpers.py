"""Runs of the tiny LLaMA, short enough to be a test."""

import lightning as L
import torch

from lrlhf import PPO, SFT, AlpacaDataModule, LoRA, PPOPolicy, RewardModel, Sampling
from lrlhf.config import Schedule

SMALL = {"lora": LoRA(r=2, alpha=4), "schedule": Schedule("constant", 0)}


def adamw(lr: float):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def trainer(folder, **settings) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **{**quiet, "max_epochs": 1, **settings}
    )


def train_sft(base, files, folder, lr=1e-2, quantize=None, **settings) -> SFT:
    module = SFT(base_model=base, optimizer=adamw(lr), quantize=quantize, **SMALL)
    data = AlpacaDataModule(train=files["sft"], tokenizer=base, batch_size=8)
    trainer(folder, enable_checkpointing=False, **settings).fit(module, data)
    return module


def train_reward(base, files, folder, sft=None, quantize=None, **settings) -> RewardModel:
    module = RewardModel(base_model=base, sft=sft, optimizer=adamw(1e-2), quantize=quantize, **SMALL)
    data = AlpacaDataModule(train=files["pairs"], tokenizer=base, task="preference", batch_size=8)
    trainer(folder, enable_checkpointing=False, **settings).fit(module, data)
    return module


def count_vowels(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([float(sum(c in "aeiou" for c in r)) for r in responses])


def ppo(base, lr=1e-2, kind=PPOPolicy, **settings) -> PPOPolicy:
    learning = {name: settings.pop(name) for name in PPO.__dataclass_fields__ if name in settings}
    defaults = {
        "reward_function": count_vowels,
        "ppo": PPO(**{"minibatch_size": 4, **learning}),
        "micro_batch_size": 3,
        "sampling": Sampling(max_new_tokens=8),
        "optimizer": adamw(lr),
    }
    return kind(base_model=base, **{**SMALL, **defaults, **settings})


def ppo_after_both_stages(base, files, folder) -> PPOPolicy:
    """Trains SFT and a reward model in `folder`, and builds the policy that starts from them."""
    train_sft(base, files, folder / "sft")
    train_reward(base, files, folder / "reward", sft=str(folder / "sft/handover"))
    parents = {"sft": str(folder / "sft/handover"), "reward_model": str(folder / "reward/handover")}
    module = ppo(base, reward_function=None, **parents)
    module.configure_model()
    return module


def prompt_data(base, files, **settings) -> AlpacaDataModule:
    return AlpacaDataModule(
        **{"train": files["prompts"], "tokenizer": base, "task": "prompts", "batch_size": 8, **settings}
    )
