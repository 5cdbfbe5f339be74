"""The same work in TRL 1.12, the last line of releases with a PPOTrainer; prints one JSON line.

Its policy carries LoRA; its critic is a full model that trains whole; reward model and critic are copies of the base.
Runs in an environment of its own, with the model as a folder (see bench/README.md):

trl-venv/bin/python bench/peer_trl.py --model FOLDER --prompts bench/prompts.jsonl --dtype bfloat16
"""

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--prompts", required=True)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--rollout", type=int, default=32)
parser.add_argument("--response", type=int, default=64)
parser.add_argument("--micro", type=int, default=8)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--iterations", type=int, default=3)
options = parser.parse_args()


class Clock(TrainerCallback):
    """Notes when each iteration ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **_):
        self.ends.append(time.perf_counter())


def main():
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this environment's PyTorch sees no GPU, and TRL would take the processor")
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|endoftext|>"
    prompts = [json.loads(line)["prompt"] for line in Path(options.prompts).read_text().splitlines()]
    rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in prompts]})
    dtype = getattr(torch, options.dtype)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=dtype) for _ in range(2)
    )
    for model in (reward, critic):
        model.config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.rollout // options.micro,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=options.rollout * options.iterations,
        response_length=options.response,
        local_rollout_forward_batch_size=options.micro * 2,
        learning_rate=1e-5,
        kl_coef=0.02,
        kl_estimator="k1",
        stop_token=None,
        missing_eos_penalty=1.0,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        use_cpu=options.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=1,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=64, lora_dropout=0.0, task_type=TaskType.CAUSAL_LM, target_modules=targets)
    clock = Clock()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        peft_config=lora,
        callbacks=[clock],
    )
    start = time.perf_counter()
    trainer.train()
    ends = [start, *clock.ends]
    on_gpu = {"peak_gpu_mib": torch.cuda.max_memory_allocated() // 2**20} if options.device == "cuda" else {}
    seconds = [round(after - before, 2) for before, after in pairwise(ends)]
    print(
        json.dumps(
            {
                "engine": "TRL 1.12 PPOTrainer",
                **{k: v for k, v in vars(options).items() if k not in ("prompts", "model")},
                "s_per_iteration": seconds,
                "response_tokens": [options.rollout * options.response] * len(seconds),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **on_gpu,
                "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            }
        )
    )


if __name__ == "__main__":
    main()
