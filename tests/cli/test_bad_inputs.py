"""What a user can get wrong ends with exit code 1 and one sentence that says what, where and how to mend it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lrlhf.__main__ import main
from lrlhf.run.checkpoints import load, newest_checkpoint
from tests.conftest import save_tiny_llama

REPOSITORY = Path(__file__).parents[2]
TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "limit_train_batches": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
TEXT = {"class_path": "lrlhf.TextTemplate", "init_args": {"without_input": "Q: {instruction}\n"}}
MODEL = {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}, "micro_batch_size": 4}
PPO = {"ppo.minibatch_size": 4, "sampling": {"max_new_tokens": 4}}
RLOO = {"updates.minibatch_size": 4, "sampling": {"max_new_tokens": 4}}
CLASSES = {"sft": "SFT", "reward": "RewardModel", "ppo": "PPOPolicy", "dpo": "DPO", "rloo": "RLOO"}
DATA = {"sft": "sft", "reward": "pairs", "ppo": "prompts", "dpo": "pairs", "rloo": "prompts"}


@dataclass
class Lab:
    """Configs and hand-over folders that work, for a case to break one thing of."""

    folder: Path
    base: str
    files: dict[str, str]
    stages: Path

    def config(self, values: dict | list | str, name: str = "more.yaml") -> list[str]:
        """--config with these values."""
        path = self.folder / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return ["--config", str(path)]

    def fit(self, stage: str, *more: str, command: str = "fit", **settings: str) -> list[str]:
        """Arguments of a stage that would run; `more` and the settings of model.init_args come last."""
        values = {
            "seed_everything": 1,
            "trainer": {**TRAINER, "default_root_dir": str(self.folder / "run")},
            "model": {
                "class_path": f"lrlhf.{CLASSES[stage]}",
                "init_args": {"base_model": self.base, **MODEL, **{"ppo": PPO, "rloo": RLOO}.get(stage, {})},
            },
            "data": {
                "class_path": "lrlhf.AlpacaDataModule",
                "init_args": {"train": self.files[DATA[stage]], "template": TEXT, "batch_size": 8},
            },
        }
        options = [part for key, value in settings.items() for part in (f"--model.init_args.{key}", value)]
        return [command, *self.config(values, f"{stage}.yaml"), *options, *more]

    def ppo(self, *more: str, **settings: str) -> list[str]:
        """PPO from the SFT and reward folders."""
        return self.fit(
            "ppo", *more, **{"sft": self.handover("sft"), "reward_model": self.handover("reward"), **settings}
        )

    def rows(self, *rows: object, stage: str = "sft", ending: str = ".jsonl", more: tuple[str, ...] = ()) -> list[str]:
        """A stage on these rows; text is written as it is."""
        path = self.folder / f"rows{ending}"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return self.fit(stage, "--data.init_args.train", str(path), *more)

    def empty(self) -> Path:
        folder = self.folder / "empty"
        folder.mkdir()
        return folder

    def data(self, *options: str, stage: str = "sft") -> list[str]:
        """A stage with options of data.init_args, as (name, value, name, value, ...)."""
        return self.fit(stage, *self._options("data.init_args", options))

    def trainer(self, *options: str, stage: str = "sft") -> list[str]:
        """A stage with options of the trainer."""
        return self.fit(stage, *self._options("trainer", options))

    def callback(self, name: str, stage: str = "ppo", **settings: object) -> list[str]:
        """A stage with one callback."""
        callback = {"class_path": f"lrlhf.{name}", "init_args": settings}
        more = self.config({"trainer": {"callbacks": [callback]}})
        return self.ppo(*more) if stage == "ppo" else self.fit(stage, *more)

    def align(self, values: dict | list | str, *more: str) -> list[str]:
        """lrlhf align with this file."""
        return ["align", *self.config(values, "align.yaml"), *more]

    def handover(self, name: str, damage: Callable[[Path], object] | None = None) -> str:
        """A stage's hand-over folder, or a damaged copy of it."""
        if damage is None:
            return str(self.stages / name / "handover")
        folder = self.folder / f"{name}_handover"
        shutil.copytree(self.stages / name / "handover", folder)
        damage(folder)
        return str(folder)

    def damaged_base(self, damage: Callable[[Path], object]) -> str:
        """A damaged copy of the base model."""
        folder = self.folder / "base"
        shutil.copytree(self.base, folder)
        damage(folder)
        return str(folder)

    def checkpoint(self, change: Callable[[dict], object]) -> str:
        """A copy of the SFT run's checkpoint, changed."""
        checkpoint = load(newest_checkpoint(self.stages / "sft"))
        change(checkpoint)
        path = self.folder / "changed.ckpt"
        torch.save(checkpoint, path)
        return str(path)

    @staticmethod
    def _options(prefix: str, options: tuple[str, ...]) -> list[str]:
        return [f"--{prefix}.{part}" if i % 2 == 0 else part for i, part in enumerate(options)]


@pytest.fixture(scope="session")
def other_base(tmp_path_factory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=1))


@pytest.fixture(scope="session")
def stages(tmp_path_factory, tiny_llama, data_files) -> Path:
    """One batch of SFT, of SFT with another seed, and of a reward model on the first, through the command line."""
    folder = tmp_path_factory.mktemp("stages")
    lab = Lab(folder, tiny_llama, data_files, folder)
    runs = {
        "sft": lab.fit("sft"),
        "sft2": lab.fit("sft", "--seed_everything", "2"),
        "reward": lab.fit("reward", sft=str(folder / "sft" / "handover")),
    }
    for stage, arguments in runs.items():
        main([*arguments, "--trainer.default_root_dir", str(folder / stage)])
    return folder


@pytest.fixture
def lab(tmp_path, tiny_llama, data_files, stages) -> Lab:
    return Lab(tmp_path, tiny_llama, data_files, stages)


Case = Callable[[Lab], list[str]]
PAIR = {"instruction": "Add.", "output_1": "3", "output_2": "12"}
GOOD = {"instruction": "Add.", "output": "3"}
HI = "\n\nHuman: hi\n\nAssistant: "
CHAT = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]

ROWS: dict[str, tuple[Case, list[str]]] = {
    "a pair without chosen": (
        lambda lab: lab.rows({"prompt": "Add.", "rejected": "12"}, stage="dpo"),
        ["rows.jsonl, row 1", "chosen"],
    ),
    "nothing but ties": (
        lambda lab: lab.rows({**PAIR, "preference": 0}, stage="dpo", more=("--data.init_args.verdicts", "from_one")),
        ["rows.jsonl", "no row is left", "tie"],
    ),
    "missing output": (lambda lab: lab.rows(GOOD, {"instruction": "i"}), ["row 2", "the sft task needs an output"]),
    "output is null": (lambda lab: lab.rows({**GOOD, "output": None}), ["row 1", "output must be text, got NoneType"]),
    "output is a number": (lambda lab: lab.rows({**GOOD, "output": 3}), ["row 1", "output must be text, got int"]),
    "output is a list": (lambda lab: lab.rows({**GOOD, "output": ["3"]}), ["row 1", "output must be text, got list"]),
    "empty instruction": (lambda lab: lab.rows({**GOOD, "instruction": ""}), ["row 1", "no instruction", "is empty"]),
    "unknown columns": (lambda lab: lab.rows({"frage": "q"}), ["row 1", "no instruction, prompt, messages"]),
    "row is no object": (lambda lab: lab.rows([1, 2]), ["row 1", "named columns, got int"]),
    "broken JSON line": (lambda lab: lab.rows(GOOD, '{"instruction": \n'), ["rows.jsonl, row 2", "not valid JSON"]),
    "broken JSON file": (lambda lab: lab.rows("[{", ending=".json"), ["rows.json: not valid JSON"]),
    "JSON that is no list": (
        lambda lab: lab.rows('{\n"data": []\n}', ending=".json"),
        ["rows.json", "a JSON list of rows, or a row a line, got one object"],
    ),
    "parquet that is not": (lambda lab: lab.rows(GOOD, ending=".parquet"), ["rows.parquet: not a parquet file"]),
    "unknown ending": (lambda lab: lab.rows("a,b\n", ending=".xls"), ["'.xls'", "use .json, .jsonl, .csv"]),
    "no such file": (lambda lab: lab.data("train", "nowhere/rows.jsonl"), ["nowhere/rows.jsonl does not exist"]),
    "an empty folder": (
        lambda lab: lab.data("train", str(lab.empty())),
        ["is a folder without data files", "name a file"],
    ),
    "a pattern": (lambda lab: lab.data("train", "nowhere/*.jsonl"), ["nowhere/*.jsonl: no file matches"]),
    "hub id offline": (lambda lab: lab.data("train", "nobody/nothing"), ["nobody/nothing", "hub"]),
    "empty file": (lambda lab: lab.rows(""), ["rows.jsonl", "no row is left to train on (the files are empty)"]),
    "all rows too long": (
        lambda lab: lab.data("max_prompt_tokens", "3"),
        ["no row is left", "40 prompts over 3 tokens"],
    ),
    "preference 3": (lambda lab: lab.rows({**PAIR, "preference": 3}, stage="reward"), ["row 1", "1 or 2", "got 3"]),
    "no preference": (lambda lab: lab.rows(PAIR, stage="reward"), ["row 1", "a pair needs a preference (1 or 2)"]),
    "only ties": (lambda lab: lab.rows({**PAIR, "preference": 1.5}, stage="reward"), ["no row is left", "1 ties"]),
    "pair of one side": (
        lambda lab: lab.rows({"prompt": "p", "chosen": "c"}, stage="reward"),
        ["row 1", "a pair needs both chosen and rejected"],
    ),
    "demonstrations for a reward model": (
        lambda lab: lab.rows(GOOD, stage="reward"),
        ["row 1", "the preference task needs two responses and a preference"],
    ),
    "two different dialogues": (
        lambda lab: lab.rows({"chosen": HI + "a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, stage="reward"),
        ["row 1", "must be one dialogue with two different last answers"],
    ),
    "unknown role": (
        lambda lab: lab.rows({"messages": [{"role": "poet", "content": "o"}]}),
        ["row 1", "turn 1 of messages has the unknown role 'poet'"],
    ),
    "several turns in a template for one": (
        lambda lab: lab.rows({"messages": CHAT}),
        ["row 1", "several turns", "data.template: lrlhf.datamodules.ChatTemplate"],
    ),
    "several turns in Alpaca's template": (
        lambda lab: lab.rows({"messages": CHAT}, more=("--data.init_args.template", "lrlhf.AlpacaTemplate")),
        ["row 1", "several turns", "lrlhf.datamodules.ChatTemplate"],
    ),
}


def one_argument(prompts):
    """A reward function that asks for too little."""


CONFIGS: dict[str, tuple[Case, list[str]]] = {
    "a group of one": (
        lambda lab: lab.fit("rloo", reward_function="lrlhf.rewards.vader_sentiment"),
        ["RLOO compares the responses to one prompt", "data.responses_per_prompt"],
    ),
    "a group that does not fit the batch": (
        lambda lab: lab.fit(
            "rloo", "--data.init_args.responses_per_prompt", "3", reward_function="lrlhf.rewards.vader_sentiment"
        ),
        ["data.responses_per_prompt=3", "data.batch_size=8"],
    ),
    "a reward function with a wrong signature": (
        lambda lab: lab.fit("rloo", reward_function=f"{__name__}.one_argument"),
        ["the reward function one_argument must take prompts and responses; it takes prompts"],
    ),
    "a reward function that asks for a column that is not there": (
        lambda lab: lab.fit(
            "rloo",
            *("--data.init_args.responses_per_prompt", "4"),
            reward_function="lrlhf.rewards.exact_answer",
        ),
        ["the reward function exact_answer asks for the column 'answer', which the data does not have"],
    ),
    "an ensemble of one": (
        lambda lab: lab.fit("reward", "--model", "lrlhf.RewardEnsemble", "--model.init_args.members", "1"),
        ["members", "1"],
    ),
    "a divergence that gives no implicit reward": (
        lambda lab: lab.fit("dpo", divergence="lrlhf.functional.absolute"),
        ["model.divergence: absolute gives no implicit reward"],
    ),
    "best of n that should train": (
        lambda lab: lab.fit("rloo", "--model", "lrlhf.BestOfN", reward_function="lrlhf.rewards.vader_sentiment"),
        ["BestOfN trains nothing", "lrlhf predict"],
    ),
    "a plan of what trains nothing": (
        lambda lab: lab.fit("rloo", "--model", "lrlhf.BestOfN", command="plan"),
        ["BestOfN trains nothing"],
    ),
    "unknown command": (lambda lab: ["train"], ["there is no command 'train'", "lrlhf --help"]),
    "unknown option": (lambda lab: lab.fit("sft", "--learning_rate", "1"), ["--learning_rate", "--help"]),
    "unknown key on top": (lambda lab: lab.fit("sft", *lab.config({"modle": 1})), ["config key modle", "no such key"]),
    "unknown key of the model": (lambda lab: lab.fit("sft", rank="8"), ["config key model.rank: there is no such key"]),
    "unknown key of LoRA": (
        lambda lab: lab.fit("sft", *lab.config({"model": {"init_args": {"lora": {"rank": 8}}}})),
        ["config key model.lora.rank: there is no such key"],
    ),
    "unknown key of the data": (
        lambda lab: lab.data("batchsize", "8"),
        ["config key data.batchsize: there is no such key"],
    ),
    "unknown key of a callback": (
        lambda lab: lab.callback("DivergenceCallback", coeff=0.1),
        ["config key trainer.callbacks.coeff: there is no such key"],
    ),
    "a word for a number": (
        lambda lab: lab.trainer("max_epochs", "two"),
        ["trainer.max_epochs: expected int", "got two"],
    ),
    "a fraction for a count": (
        lambda lab: lab.data("batch_size", "1.5"),
        ["data.batch_size: expected a whole number, got 1.5"],
    ),
    "a word for a rank": (
        lambda lab: lab.fit("sft", **{"lora.r": "x"}),
        ["model.lora.r: expected a whole number, got x"],
    ),
    "unknown dtype": (lambda lab: lab.fit("sft", dtype="int8"), ["model.dtype", "'bfloat16'", "got int8"]),
    "unknown schedule": (
        lambda lab: lab.fit("sft", **{"schedule.name": "z"}),
        ["model.schedule.name", "'cosine'", "got z"],
    ),
    "unknown model class": (lambda lab: lab.fit("sft", "--model", "lrlhf.SFFT"), ["config key model", "lrlhf.SFFT"]),
    "unknown package": (
        lambda lab: lab.fit("sft", "--model", "nowhere.SFT"),
        ["nowhere.SFT", "No module named 'nowhere'"],
    ),
    "a class of another kind": (lambda lab: lab.fit("sft", "--model", "lrlhf.LoRA"), ["model", "a LightningModule"]),
    "unknown callback": (lambda lab: lab.callback("Divergnce"), ["trainer.callbacks", "lrlhf.Divergnce"]),
    "unknown template": (lambda lab: lab.data("template", "lrlhf.Tmpl"), ["config key data.template", "lrlhf.Tmpl"]),
    "template without its text": (
        lambda lab: lab.data("template", "lrlhf.ChatTemplate", "template", "lrlhf.TextTemplate"),
        ["data.template", "without_input"],
    ),
    "template that ignores the instruction": (
        lambda lab: lab.data("template.init_args.without_input", "hi"),
        ["template.without_input must use {instruction}"],
    ),
    "unknown divergence": (
        lambda lab: lab.callback("DivergenceCallback", divergence="lrlhf.functional.hellinger"),
        ["trainer.callbacks.divergence", "lrlhf.functional.hellinger cannot be imported"],
    ),
    "unknown reward function": (
        lambda lab: lab.fit("ppo", reward_function="lrlhf.rewards.nope"),
        ["model.reward_function", "lrlhf.rewards.nope cannot be imported"],
    ),
    "unknown optimizer": (
        lambda lab: lab.fit("sft", optimizer="torch.optim.Adan"),
        ["model.optimizer", "torch.optim.Adan"],
    ),
    "negative learning rate": (
        lambda lab: lab.fit("sft", optimizer="torch.optim.AdamW", **{"optimizer.init_args.lr": "-1"}),
        ["model.optimizer: Invalid learning rate: -1"],
    ),
    "no such config file": (
        lambda lab: ["fit", "--config", "nowhere.yaml"],
        ["there is no config file", "nowhere.yaml"],
    ),
    "config is a folder": (lambda lab: ["fit", "--config", str(lab.folder)], ["there is no config file"]),
    "config is not YAML": (lambda lab: ["fit", *lab.config("a: 1\nb: [")], ["more.yaml: not valid YAML (line 2"]),
    "config is a list": (lambda lab: ["fit", *lab.config([1])], ["more.yaml: expected keys", "got list"]),
    "no config at all": (lambda lab: ["fit"], ["model"]),
    "LoRA of rank 0": (
        lambda lab: lab.fit("sft", **{"lora.r": "0"}),
        ["config key model.lora.r: expected a number >0, got 0"],
    ),
    "dropout of 1": (
        lambda lab: lab.fit("sft", **{"lora.dropout": "1"}),
        ["config key model.lora.dropout: expected a number >=0 and <1, got 1"],
    ),
    "unknown LoRA option": (
        lambda lab: lab.fit("sft", **{"lora.options": "{use_magic: true}"}),
        ["lora.options", "use_magic"],
    ),
    "targets that match nothing": (lambda lab: lab.fit("sft", **{"lora.targets": "[query]"}), ["lora", "query"]),
    "no targets": (
        lambda lab: lab.fit("sft", **{"lora.targets": "[]"}),
        ["lora.targets is empty; name the linear layers"],
    ),
    "LoRA start that moves the base": (
        lambda lab: lab.fit("sft", **{"lora.options": "{init_lora_weights: pissa}"}),
        ["init_lora_weights must be true or gaussian"],
    ),
    "unknown short name": (
        lambda lab: lab.fit("sft", base_model="smollm3"),
        ["base_model=smollm3", "smollm2-135m-instruct"],
    ),
    "no base folder": (lambda lab: lab.fit("sft", base_model="./none"), ["base_model=./none: there is no such folder"]),
    "base folder without a model": (lambda lab: lab.fit("sft", base_model=str(lab.folder)), ["holds no config.json"]),
    "no such GGUF file": (lambda lab: lab.fit("sft", base_model="x.gguf"), ["base_model=x.gguf", "no such GGUF file"]),
    "micro-batch of 0": (
        lambda lab: lab.fit("sft", micro_batch_size="0"),
        ["config key model.micro_batch_size: expected a number >0, got 0"],
    ),
    "gradient norm of 0": (
        lambda lab: lab.fit("sft", max_grad_norm="0"),
        ["config key model.max_grad_norm: expected a number >0, got 0"],
    ),
    "negative warm-up": (
        lambda lab: lab.fit("sft", **{"schedule.warmup": "-1"}),
        ["config key model.schedule.warmup: expected a number >=0, got -1"],
    ),
    "negative limit": (lambda lab: lab.data("limit", "-3"), ["config key data.limit: expected a number >0, got -3"]),
    "negative workers": (
        lambda lab: lab.data("num_workers", "-1"),
        ["config key data.num_workers: expected a number >=0, got -1"],
    ),
    "run folder that is a file": (
        lambda lab: lab.trainer("default_root_dir", lab.files["sft"]),
        ["trainer.default_root_dir=", "is a file; name a folder"],
    ),
    "half a base model": (
        lambda lab: lab.fit("sft", base_model=lab.damaged_base(truncate("model.safetensors"))),
        ["base_model=", "no causal language model there"],
    ),
    "half a tokenizer": (
        lambda lab: lab.fit("sft", base_model=lab.damaged_base(truncate("tokenizer.json"))),
        ["base_model=", "no tokenizer could be loaded"],
    ),
    "negative centering": (
        lambda lab: lab.fit("reward", centering="-1"),
        ["config key model.centering: expected a number >=0, got -1"],
    ),
    "batch of 0": (
        lambda lab: lab.data("batch_size", "0"),
        ["config key data.batch_size: expected a number >0, got 0"],
    ),
    "negative temperature": (
        lambda lab: lab.ppo(**{"sampling.temperature": "-1"}),
        ["config key model.sampling.temperature: expected a number >=0, got -1"],
    ),
    "top_p of 0": (
        lambda lab: lab.fit("sft", **{"sampling.top_p": "0"}),
        ["config key model.sampling.top_p: expected a number >0 and <=1, got 0"],
    ),
    "top_p for PPO": (
        lambda lab: lab.ppo(**{"sampling.top_p": "0.9"}),
        ["PPOPolicy's ratio needs the whole distribution", "top_p at 1"],
    ),
    "minibatch that does not divide": (
        lambda lab: lab.ppo(**{"ppo.minibatch_size": "3"}),
        ["model.ppo.minibatch_size=3 does not divide data.batch_size=8"],
    ),
    "negative clip range": (
        lambda lab: lab.ppo(**{"ppo.clip_range": "-0.2"}),
        ["config key model.ppo.clip_range: expected a number >0"],
    ),
    "discount above 1": (
        lambda lab: lab.ppo(**{"ppo.discount": "1.5"}),
        ["model.ppo.discount: expected a number >=0 and <=1, got 1.5"],
    ),
    "negative coefficient": (
        lambda lab: lab.callback("DivergenceCallback", coefficient=-0.1),
        ["config key trainer.callbacks.coefficient: expected a number >=0, got -0.1"],
    ),
    "negative target of a coefficient": (
        lambda lab: lab.callback("DivergenceCallback", coefficient={"target": -1.0}),
        ["config key trainer.callbacks.coefficient.target: expected a number >0, got -1.0"],
    ),
    "negative penalty": (
        lambda lab: lab.callback("MissingEOSPenalty", penalty=-1),
        ["config key trainer.callbacks.penalty: expected a number >=0, got -1"],
    ),
    "divergence with SFT": (
        lambda lab: lab.callback("DivergenceCallback", stage="sft"),
        ["DivergenceCallback works with modules that make rollouts", "SFT makes none"],
    ),
    "no source of reward": (lambda lab: lab.fit("ppo"), ["one source of reward", "model.reward_model or"]),
    "two sources of reward": (
        lambda lab: lab.ppo(reward_function="lrlhf.rewards.vader_sentiment"),
        ["one source of reward"],
    ),
    "gradient_clip_val": (
        lambda lab: lab.trainer("gradient_clip_val", "1"),
        ["gradient_clip_val", "model.max_grad_norm"],
    ),
    "accumulate_grad_batches": (
        lambda lab: lab.trainer("accumulate_grad_batches", "2"),
        ["accumulate_grad_batches", "model.micro_batch_size"],
    ),
    "max_steps for PPO": (
        lambda lab: lab.ppo("--trainer.max_steps", "5"),
        ["max_steps", "trainer.limit_train_batches"],
    ),
    "run without an end": (lambda lab: lab.trainer("max_epochs", "-1"), ["no end", "trainer.max_epochs"]),
    "unknown accelerator": (lambda lab: lab.trainer("accelerator", "abacus"), ["trainer", "abacus", "cpu"]),
    "unknown precision": (lambda lab: lab.trainer("precision", "99"), ["trainer.precision", "'bf16'", "got 99"]),
    "no devices": (lambda lab: lab.trainer("devices", "0"), ["devices", "0"]),
    "batch of more prompts than there are": (
        lambda lab: lab.ppo("--data.init_args.batch_size", "64"),
        ["data.batch_size=64 is more than the 40 prompts of data.train"],
    ),
    "no training file": (
        lambda lab: lab.fit("sft", *lab.config({"data": {"init_args": {"train": None}}})),
        ["data.train names no file to train on"],
    ),
    "split without sizes": (lambda lab: lab.data("train_split", "main"), ["'main' is no key of data.splits"]),
    "validating on training rows": (
        lambda lab: lab.data("splits", "{a: 10, b: null}", "val_split", "a"),
        ["data.val_split='a' needs data.train_split"],
    ),
    "training and validating on one split": (
        lambda lab: lab.data("splits", "{a: 10, b: null}", "train_split", "a", "val_split", "a"),
        ["data.val_split='a' is data.train_split too"],
    ),
    "splits larger than the file": (
        lambda lab: lab.data("splits", "{a: 30, b: 30}", "train_split", "a", "val_split", "b"),
        ["data.splits asks for 60 rows, data.train has 40"],
    ),
    "a word for the size of a split": (
        lambda lab: lab.data("splits", "{a: x}"),
        ["data.splits: expected int or null, got x"],
    ),
}

STAGES = {"sft": ["nowhere.yaml"]}
ALIGN: dict[str, tuple[Case, list[str]]] = {
    "no config": (lambda lab: ["align", "--run", "r"], ["stages names no config files", "--config FILE"]),
    "no such file": (lambda lab: ["align", "--config", "nowhere.yaml"], ["there is no config file nowhere.yaml"]),
    "unknown option": (lambda lab: ["align", "--speed", "9"], ["unknown option --speed", "--help lists them"]),
    "an option without its value": (lambda lab: ["align", "--config"], ["--config: expected one argument"]),
    "a bare word": (lambda lab: ["align", "now"], ["unexpected argument now"]),
    "not YAML": (lambda lab: lab.align("a: ["), ["align.yaml: not valid YAML"]),
    "a list": (lambda lab: lab.align([1]), ["align.yaml: expected keys and values, got list"]),
    "unknown key": (
        lambda lab: lab.align({"stage": {"sft": []}}),
        ["config key stage.sft: there is no such key", "stages"],
    ),
    "unknown stage": (
        lambda lab: lab.align({"stages": {"dpo": []}}),
        ["config key stages.dpo: there is no such key", "rl"],
    ),
    "no stages": (lambda lab: lab.align({"run": "r"}), ["stages names no config files", "sft, reward, rl"]),
    "stages as a list": (
        lambda lab: lab.align({"stages": ["sft"]}),
        ["config key stages: expected keys and values, got ['sft']"],
    ),
    "a stage that is no list": (
        lambda lab: lab.align({"stages": {"sft": "a"}}),
        ["config key stages.sft: expected a list"],
    ),
    "unknown key of compare": (
        lambda lab: lab.align({"stages": STAGES, "compare": {"golden": 1}}),
        ["config key compare.golden: there is no such key (the nearest is gold)"],
    ),
    "a gold reward that cannot be imported": (
        lambda lab: lab.align({"stages": {"sft": [lab.fit("sft")[-1]]}, "compare": {"gold": "nowhere.reward"}}),
        ["nowhere.reward cannot be imported; give the import path of a function"],
    ),
    "a stage's file is missing": (
        lambda lab: lab.align({"run": str(lab.folder), "stages": STAGES}),
        ["there is no config file", "nowhere.yaml"],
    ),
    "unknown key passed to a stage": (
        lambda lab: lab.align(
            {"run": str(lab.folder), "stages": {"sft": [lab.fit("sft")[2]]}}, "--sft.model.rank", "1"
        ),
        ["config key model.rank: there is no such key"],
    ),
}


def unlink(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def alter(name: str) -> Callable[[Path], object]:
    """Another value in one tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        tensors[min(tensors)] += 1
        save_file(tensors, folder / name)

    return change


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40])


def set_manifest(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def swap_tokens(folder: Path) -> None:
    """The same base with two tokens swapped in its vocabulary."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


FOLDERS: dict[str, tuple[Case, list[str]]] = {
    "no SFT folder": (
        lambda lab: lab.fit("reward", sft="nowhere"),
        ["nowhere is no hand-over folder", "run the stage before"],
    ),
    "no manifest": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", unlink("manifest.json"))),
        ["no manifest.json", "run the stage before first"],
    ),
    "half a manifest": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", truncate("manifest.json"))),
        ["manifest.json is damaged", "run its stage again"],
    ),
    "a manifest of another version": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", set_manifest(color="red"))),
        ["manifest.json is damaged", "color"],
    ),
    "adapter altered": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", alter("sft/adapter_model.safetensors"))),
        ["the adapter sft is not the one that was handed over"],
    ),
    "adapter missing": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", unlink("sft/adapter_model.safetensors"))),
        ["adapter_model.safetensors is missing; run its stage again"],
    ),
    "adapter config missing": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft", unlink("sft/adapter_config.json"))),
        ["sft_handover/sft", "cannot be loaded"],
    ),
    "head missing": (
        lambda lab: lab.ppo(reward_model=lab.handover("reward", unlink("head.safetensors"))),
        ["holds no head.safetensors"],
    ),
    "head altered": (
        lambda lab: lab.ppo(reward_model=lab.handover("reward", alter("head.safetensors"))),
        ["self-check: the reward model scores the probe text", "is not the model that was trained"],
    ),
    "another base": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft"), base_model="OTHER"),
        ["was trained with another base model", "train the stage again"],
    ),
    "another tokenizer": (
        lambda lab: lab.fit("reward", sft=lab.handover("sft"), base_model=lab.damaged_base(swap_tokens)),
        ["was trained with another tokenizer", "train the stage again"],
    ),
    "another template": (
        lambda lab: lab.fit("reward", "--data.init_args.template", "lrlhf.ChatTemplate", sft=lab.handover("sft")),
        ["was trained with another prompt template", "the same data.template in every stage"],
    ),
    "reward model on another SFT adapter": (
        lambda lab: lab.ppo(sft=lab.handover("sft2")),
        ["was trained on another SFT adapter than model.sft="],
    ),
    "reward model on SFT, policy without": (
        lambda lab: lab.fit("ppo", reward_model=lab.handover("reward")),
        ["['sft', 'reward']", "give model.sft the SFT run"],
    ),
    "a reward model given as SFT": (
        lambda lab: lab.fit("reward", sft=lab.handover("reward")),
        ["model.sft=", "handed over by a reward run, not by an SFT run"],
    ),
    "an SFT run given as reward model": (
        lambda lab: lab.ppo(reward_model=lab.handover("sft")),
        ["model.reward_model=", "handed over by a sft run"],
    ),
    "no such checkpoint to go on from": (
        lambda lab: lab.fit("sft", "--ckpt_path", "nowhere.ckpt"),
        ["ckpt_path=nowhere.ckpt: there is no such file"],
    ),
    "checkpoint that is none": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.files["sft"]),
        ["sft.jsonl is no checkpoint, or damaged"],
    ),
    "checkpoint of another program": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: c.pop("lrlhf"))),
        ["this checkpoint was not written by lrlhf"],
    ),
    "checkpoint of another base": (
        lambda lab: lab.fit(
            "sft", "--ckpt_path", lab.checkpoint(lambda c: c["lrlhf"].update({"base model": "0" * 16}))
        ),
        ["this checkpoint has another base model (0000000000000000, here"],
    ),
    "checkpoint of another tokenizer": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: c["lrlhf"].update(tokenizer="0" * 16))),
        ["this checkpoint has another tokenizer (0000000000000000, here"],
    ),
    "checkpoint of another class": (
        lambda lab: lab.fit("reward", "--ckpt_path", lab.checkpoint(lambda c: None)),
        ["this checkpoint has another class (SFT, here RewardModel)"],
    ),
    "checkpoint on another SFT adapter": (
        lambda lab: lab.fit(
            "reward",
            "--ckpt_path",
            str(newest_checkpoint(lab.stages / "reward")),
            sft=str(lab.stages / "sft2" / "handover"),
        ),
        ["this checkpoint has another adapter below (sft: "],
    ),
    "checkpoint with a class in it": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: c.update(extra=Path("x")))),
        ["changed.ckpt holds more than tensors and plain values"],
    ),
    "checkpoint with other tensors": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: c["state_dict"].popitem())),
        ["does not hold the 8 tensors that train here", "1 differ in name or shape, e.g. backbone"],
    ),
    "checkpoint of another rank": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: None), **{"lora.r": "4"}),
        ["this checkpoint has another lora (r: 2, here 4)", "go on with the settings"],
    ),
    "predict with no checkpoint": (
        lambda lab: lab.fit("sft", command="predict"),
        ["predict: no checkpoint in", "run fit with the same config first, or give --ckpt_path"],
    ),
    "predict from no such checkpoint": (
        lambda lab: lab.fit("sft", "--ckpt_path", "nowhere.ckpt", command="predict"),
        ["ckpt_path=nowhere.ckpt: there is no such file"],
    ),
    "test without rows to test on": (
        lambda lab: lab.fit("sft", "--ckpt_path", lab.checkpoint(lambda c: None), command="test"),
        ["data.test names no file to test on, nor does data.val"],
    ),
}

REPORT: dict[str, tuple[Case, list[str]]] = {
    "no such folder": (lambda lab: ["report", "nowhere"], ["nowhere", "folder"]),
    "no folder given": (lambda lab: ["report"], ["runs must be given"]),
    "an unfinished run": (lambda lab: ["report", str(lab.folder)], ["comparison.json", "lrlhf align"]),
    "twice the same": (lambda lab: ["report", str(lab.folder), str(lab.folder)], ["named twice"]),
}


def sentence(arguments: list[str], capsys) -> str:
    """The one line on stderr with which the command line leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "Traceback" not in error
    assert re.fullmatch(r"lrlhf: error: [^\n]+\.\n", error), error
    assert len(error) < 500
    return error


def cases(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", table)


@cases(ROWS)
def test_bad_rows(name, lab, capsys):
    arguments, words = ROWS[name]
    error = sentence(arguments(lab), capsys)
    assert all(word in error for word in words), error


@cases(CONFIGS)
def test_bad_configs(name, lab, capsys):
    arguments, words = CONFIGS[name]
    error = sentence(arguments(lab), capsys)
    assert all(word in error for word in words), error


@cases(ALIGN)
def test_bad_align_files(name, lab, capsys):
    arguments, words = ALIGN[name]
    error = sentence(arguments(lab), capsys)
    assert all(word in error for word in words), error


@cases(FOLDERS)
def test_bad_folders_and_checkpoints(name, lab, other_base, capsys):
    arguments, words = FOLDERS[name]
    error = sentence([other_base if part == "OTHER" else part for part in arguments(lab)], capsys)
    assert all(word in error for word in words), error


@cases(REPORT)
def test_bad_reports(name, lab, capsys):
    arguments, words = REPORT[name]
    error = sentence(arguments(lab), capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("unknown command", CONFIGS["unknown command"]),
        ("missing output", ROWS["missing output"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_real_process_leaves_with_1_and_no_traceback(name, case, lab):
    arguments, words = case
    run = subprocess.run(
        [sys.executable, "-m", "lrlhf", *arguments(lab)],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr + run.stdout
    *_, last = run.stderr.splitlines()
    assert last.startswith("lrlhf: error: ")
    assert all(word in last for word in words), last


def test_what_is_broken_here_works_when_it_is_not(lab, capsys):
    """Otherwise a case might be refused for another reason than its own."""
    main(lab.ppo())
    assert (lab.folder / "run" / "handover" / "manifest.json").is_file()
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["there is no config file", "config.yaml"]),
        ("trainer: [", ["config.yaml", "not valid YAML", "line 1"]),
    ],
)
def test_a_bad_config_file_is_refused_before_anything_slow_is_imported(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    program = f"import sys; sys.argv = ['lrlhf', 'fit', '--config', {str(path)!r}]; from lrlhf.__main__ import main\n"
    program += "try: main()\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stdout.split() == ["False"]
    assert all(word in run.stderr for word in words), run.stderr
