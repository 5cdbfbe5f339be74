"""DPO, RLOO or GRPO of lrlhf on the work that TRL's trainer is timed on; prints one JSON line.

python bench/engine_methods.py --method dpo --rows ROWS.jsonl
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--method", choices=["dpo", "rloo", "grpo"], required=True)
parser.add_argument("--rows", required=True, help="lines with prompt, chosen and rejected")
parser.add_argument("--base-model", default="smollm2-135m-instruct")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--batch", type=int, default=32, help="responses of a step; of DPO half as many pairs")
parser.add_argument("--group", type=int, default=4, help="responses to a prompt")
parser.add_argument("--response", type=int, default=64, help="new tokens of a response, all of which are sampled")
parser.add_argument("--micro", type=int, default=8)
parser.add_argument("--steps", type=int, default=3)
options = parser.parse_args()

from lrlhf.cli.start import keep_few_kernels, keep_freed_memory, quiet  # noqa: E402

quiet()
keep_freed_memory()
keep_few_kernels()

import lightning as L  # noqa: E402
import torch  # noqa: E402

import lrlhf  # noqa: E402
from lrlhf.doctor.timing import UNUSED, Clock  # noqa: E402
from lrlhf.memory.measure import bare_trainer  # noqa: E402


def length_reward(prompts, responses):
    """Of characters: some reward, for a price that nobody notices."""
    return [float(len(response)) / 100 for response in responses]


class NoEnd(L.Callback):
    """No response ends early."""

    def on_train_start(self, trainer, module):
        module.stop_ids = torch.tensor([UNUSED])


def build():
    """Module, data and callbacks."""
    common = {
        "base_model": options.base_model,
        "dtype": options.dtype,
        "micro_batch_size": options.micro,
        "lora": lrlhf.LoRA(r=8, alpha=64),
        "sampling": lrlhf.Sampling(max_new_tokens=options.response),
    }
    rows = [json.loads(line) for line in Path(options.rows).read_text().splitlines()]
    path, batch, group = Path(tempfile.mkdtemp()) / "rows.json", options.batch // 2, 1
    if options.method == "dpo":
        rows = rows[: batch * options.steps]
    else:
        batch, group = options.batch, options.group
        rows = [{"prompt": row["prompt"]} for row in rows[: batch // group * options.steps]]
    path.write_text(json.dumps(rows))
    data = lrlhf.AlpacaDataModule(
        str(path),
        task="preference" if options.method == "dpo" else "prompts",
        tokenizer=options.base_model,
        template=lrlhf.TextTemplate("{instruction}"),
        batch_size=batch,
        responses_per_prompt=group,
        group_by_length=False,
    )
    if options.method == "dpo":
        return lrlhf.DPO(**common, precompute_reference=False), data, []
    grouped = {"reward_function": length_reward, "updates": lrlhf.Updates(minibatch_size=batch, inner_epochs=1)}
    if options.method == "rloo":
        return lrlhf.RLOO(**common, **grouped), data, [lrlhf.DivergenceCallback(coefficient=0.05)]
    return lrlhf.GRPO(**common, **grouped, divergence_coefficient=0.04), data, []


def main():
    L.seed_everything(0, verbose=False)
    module, data, callbacks = build()
    clock = Clock()
    bare_trainer(tempfile.mkdtemp(), [*callbacks, NoEnd(), clock]).fit(module, data)
    print(
        json.dumps(
            {
                "engine": f"lrlhf {lrlhf.__version__}",
                **{k: v for k, v in vars(options).items() if k not in ("rows", "base_model")},
                "s_per_step": [round(s, 2) for s in clock.seconds],
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "trainable": sum(p.numel() for p in module.backbone.trainable()),
            }
        )
    )


if __name__ == "__main__":
    main()
