"""One PPO run of lrlhf on the work that the peer is timed on; prints one JSON line.

python bench/engine.py --prompts bench/prompts.jsonl --dtype bfloat16
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--prompts", required=True, help='a file of {"prompt": text} lines')
parser.add_argument("--base-model", default="smollm2-135m-instruct")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--rollout", type=int, default=32, help="prompts of an iteration")
parser.add_argument("--response", type=int, default=64, help="new tokens of a response, all of which are sampled")
parser.add_argument("--micro", type=int, default=8)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--iterations", type=int, default=3)
parser.add_argument("--reward", help="used within: write the hand-over folder of a reward model here")
options = parser.parse_args()

from lrlhf.cli.start import keep_few_kernels, keep_freed_memory, quiet  # noqa: E402

quiet()
keep_freed_memory()
keep_few_kernels()

import lightning as L  # noqa: E402
import torch  # noqa: E402

import lrlhf  # noqa: E402
from lrlhf.doctor.timing import TimedPPO  # noqa: E402
from lrlhf.memory.measure import bare_trainer  # noqa: E402

COMMON = {"base_model": options.base_model, "dtype": options.dtype, "micro_batch_size": options.micro}


def template():
    return lrlhf.TextTemplate("{instruction}")


def make_reward(folder):
    """A reward model that has seen two pairs: as much work as a good one."""
    rows = [{"instruction": str(i), "output_1": "yes", "output_2": "no", "preference": 1} for i in range(2)]
    path = Path(folder) / "pairs.json"
    path.write_text(json.dumps(rows))
    data = lrlhf.AlpacaDataModule(
        str(path), task="preference", tokenizer=options.base_model, template=template(), batch_size=2
    )
    bare_trainer(folder, [], device=options.device).fit(lrlhf.RewardModel(**COMMON), data)


def main():
    L.seed_everything(0, verbose=False)
    folder = tempfile.mkdtemp()
    subprocess.run([sys.executable, *sys.argv, "--reward", folder], check=True, stdout=subprocess.DEVNULL)
    rows = [{"instruction": json.loads(line)["prompt"]} for line in Path(options.prompts).read_text().splitlines()]
    path = Path(folder) / "prompts.json"
    path.write_text(json.dumps(rows[: options.rollout * options.iterations]))
    data = lrlhf.AlpacaDataModule(
        str(path),
        task="prompts",
        tokenizer=options.base_model,
        template=template(),
        batch_size=options.rollout,
        group_by_length=False,
    )
    policy = TimedPPO(
        **COMMON,
        reward_model=f"{folder}/handover",
        lora=lrlhf.LoRA(r=8, alpha=64),
        ppo=lrlhf.PPO(minibatch_size=options.rollout // 2, inner_epochs=2),
        sampling=lrlhf.Sampling(max_new_tokens=options.response),
    )
    callbacks = [lrlhf.DivergenceCallback(coefficient=0.02), lrlhf.MissingEOSPenalty(1.0)]
    bare_trainer(folder, callbacks, device=options.device).fit(policy, data)
    on_gpu = {"peak_gpu_mib": torch.cuda.max_memory_allocated() // 2**20} if options.device == "cuda" else {}
    print(
        json.dumps(
            {
                "engine": f"lrlhf {lrlhf.__version__}",
                **{k: v for k, v in vars(options).items() if k not in ("prompts", "reward", "base_model")},
                "s_per_iteration": [round(s, 2) for s in policy.iterations],
                "phases": {name: [round(s, 2) for s in seconds] for name, seconds in policy.phases.items()},
                "response_tokens": policy.response_tokens,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **on_gpu,
                "trainable": sum(p.numel() for p in policy.backbone.trainable()),
            }
        )
    )


if __name__ == "__main__":
    make_reward(options.reward) if options.reward else main()
