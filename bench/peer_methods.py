"""The same work in TRL's newest release (DPOTrainer, RLOOTrainer, GRPOTrainer, with LoRA); prints one JSON line.

Runs in an environment of its own, with the model as a folder (see bench/README.md):

trl-venv/bin/python bench/peer_methods.py --method dpo --model FOLDER --rows ROWS.jsonl
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

parser = argparse.ArgumentParser()
parser.add_argument("--method", choices=["dpo", "rloo", "grpo"], required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--group", type=int, default=4)
parser.add_argument("--response", type=int, default=64)
parser.add_argument("--micro", type=int, default=8)
parser.add_argument("--steps", type=int, default=3)
options = parser.parse_args()


class Clock(TrainerCallback):
    """Seconds of each step, its sampling included."""

    def __init__(self):
        self.seconds, self.begun = [], 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        self.seconds.append(round(now - self.begun, 2))
        self.begun = now


def length_reward(prompts, completions, **_):
    """Of characters: some reward, for a price that nobody notices."""
    return [float(len(completion)) / 100 for completion in completions]


def main():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|endoftext|>"
    rows = [json.loads(line) for line in Path(options.rows).read_text().splitlines()]
    pairs = options.batch // 2
    common = {
        "output_dir": tempfile.mkdtemp(),
        "learning_rate": 1e-5,
        "max_steps": options.steps,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": options.micro,
    }
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=64, lora_dropout=0.0, task_type=TaskType.CAUSAL_LM, target_modules=targets)
    clock = Clock()
    shared = {
        "model": AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
        "processing_class": tokenizer,
        "peft_config": lora,
        "callbacks": [clock],
    }
    if options.method == "dpo":
        data = Dataset.from_list(rows[: pairs * options.steps])
        config = trl.DPOConfig(**common, gradient_accumulation_steps=pairs // options.micro, beta=0.1)
        trainer = trl.DPOTrainer(args=config, train_dataset=data, **shared)
    else:
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        sampling = {
            "num_generations": options.group,
            "max_completion_length": options.response,
            "generation_kwargs": {"min_new_tokens": options.response},
            "gradient_accumulation_steps": options.batch // options.micro,
            "shuffle_dataset": False,
        }
        if options.method == "rloo":
            config, kind = trl.RLOOConfig(**common, **sampling, beta=0.05), trl.RLOOTrainer
        else:
            config, kind = trl.GRPOConfig(**common, **sampling, beta=0.04, loss_type="grpo"), trl.GRPOTrainer
        trainer = kind(args=config, train_dataset=data, reward_funcs=length_reward, **shared)
    trainer.train()
    print(
        json.dumps(
            {
                "engine": f"TRL {trl.__version__} {type(trainer).__name__}",
                **{k: v for k, v in vars(options).items() if k not in ("rows", "model")},
                "s_per_step": clock.seconds,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            }
        )
    )


if __name__ == "__main__":
    main()
