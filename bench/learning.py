"""Every method on the demo's task, by the clock: gold reward and exact KL on held-out prompts while it trains.

python bench/learning.py --seconds 150 --seeds 1 2 3 --out bench/learning.json

Each starts from the demo's SFT and reward model (lrlhf align --config configs/demo/align.yaml --stages.rl null), in a
process of its own. The clock runs while a method trains, and stands still while it is measured. Leave the machine
alone meanwhile.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any

METHODS = ("PPO", "RLOO", "GRPO", "expert iteration", "DPO", "f-DPO (JS)")
BEST_OF = (1, 4, 16)
BASE = "smollm2-135m-instruct"

parser = argparse.ArgumentParser()
parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="of lrlhf align, with sft and reward")
parser.add_argument("--seconds", type=float, default=150, help="of training")
parser.add_argument("--every", type=float, default=50, help="seconds of training between measurements")
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
parser.add_argument("--methods", nargs="+", default=[*METHODS, "best of n"])
parser.add_argument("--dtype", default="float32")
parser.add_argument("--prompts", type=int, default=96)
parser.add_argument("--out", type=Path, default=Path("bench/learning.json"))
parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help="used within")
options = parser.parse_args()

from lrlhf.cli.start import keep_few_kernels, keep_freed_memory, quiet  # noqa: E402

quiet()
keep_freed_memory()
keep_few_kernels()


def prompts(**settings: Any) -> Any:
    """The demo's prompts, in its template."""
    import lrlhf

    template = lrlhf.TextTemplate(
        without_input="### Instruction:\n{instruction}\n\n### Response:\n",
        with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    )
    files = {"train": "demo/data/prompts.jsonl", "val": "demo/data/val_prompts.jsonl"}
    common = {"task": "prompts", "tokenizer": BASE, "template": template, "max_prompt_tokens": 96}
    return lrlhf.AlpacaDataModule(**files | common | settings)


def build(method: str) -> tuple[Any, Any, list[Any]]:
    """Module, data and callbacks of a method; settings are the demo's where it has them."""
    from functools import partial

    import torch

    import lrlhf

    adam = partial(torch.optim.AdamW, lr=1.0e-3, weight_decay=0.0)
    common = {
        "base_model": BASE,
        "dtype": options.dtype,
        "sft": str(options.run / "sft/handover"),
        "lora": lrlhf.LoRA(r=8, alpha=32, targets=["q_proj", "v_proj"]),
        "micro_batch_size": 16,
        "sampling": lrlhf.Sampling(max_new_tokens=40, temperature=0.8),
        "optimizer": adam,
        "schedule": lrlhf.Schedule("constant", 0),
    }
    reward = {"reward_model": str(options.run / "reward/handover")}
    callbacks = [lrlhf.DivergenceCallback(coefficient=0.05), lrlhf.NormalizeScores(), lrlhf.MissingEOSPenalty(1.0)]
    updates = lrlhf.Updates(minibatch_size=16, inner_epochs=1)
    grouped = prompts(batch_size=32, responses_per_prompt=4)
    if method == "PPO":
        ppo = lrlhf.PPO(minibatch_size=16, inner_epochs=1, target_update_kl=0.1)
        common["optimizer"] = partial(torch.optim.AdamW, lr=1.5e-3, weight_decay=0.0)
        return lrlhf.PPOPolicy(**common, **reward, ppo=ppo), prompts(batch_size=32), callbacks
    if method == "RLOO":
        return lrlhf.RLOO(**common, **reward, updates=updates), grouped, callbacks
    if method == "GRPO":
        return lrlhf.GRPO(**common, **reward, updates=updates), grouped, callbacks
    if method == "expert iteration":
        module = lrlhf.ExpertIteration(**common, **reward, minibatch_size=8)
        return module, prompts(batch_size=32, responses_per_prompt=4), callbacks[2:]
    pairs = prompts(
        task="preference",
        train="demo/data/preferences.jsonl",
        val=None,
        splits={"val": 80, "train": None},
        train_split="train",
        batch_size=8,
        max_response_tokens=64,
    )
    divergence = lrlhf.functional.kl if method == "DPO" else lrlhf.functional.js
    common["optimizer"] = partial(torch.optim.AdamW, lr=5.0e-4, weight_decay=0.0)
    # the clock would count the reference of all pairs before the first step
    return lrlhf.DPO(**common, divergence=divergence, beta=0.1, precompute_reference=False), pairs, []


@cache
def held_out(batch_size: int) -> Any:
    """Batches of the held-out prompts."""
    data = prompts(val_batch_size=batch_size, val_limit=options.prompts)
    data.setup("validate")
    return data.val_dataloader()


def train(method: str, seed: int) -> list[dict[str, Any]]:
    """What was measured while a method trained."""
    import lightning as L
    import torch

    from lrlhf.functional import exact_kl
    from lrlhf.memory.measure import bare_trainer
    from lrlhf.rewards import vader_sentiment
    from lrlhf.types import Sequences

    class Clock(L.Callback):
        """Stops the clock to measure, and training when its time is over."""

        def __init__(self):
            self.seconds, self.found, self.begun = 0.0, [], 0.0

        def setup(self, trainer, module, stage):
            self.begun = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seconds += time.perf_counter() - self.begun
            print(f"{method} {seed}: {module.iteration} iterations, {self.seconds:.0f} s", file=sys.stderr)
            trainer.should_stop = self.seconds >= options.seconds
            if self.seconds >= options.every * len(self.found) or trainer.should_stop:
                self.measure(module)
            self.begun = time.perf_counter()

        @torch.no_grad()
        def measure(self, module):
            gold, divergences, lengths = [], [], []
            for number, batch in enumerate(held_out(32)):
                text = Sequences(
                    batch.prompt_ids, batch.prompt_mask, *module.sample(batch, "policy", "held out", number)
                )
                gold += vader_sentiment(list(batch.texts), module.decode(text.response_ids, text.response_mask))
                divergences += module.divergences(text, [exact_kl])[0].sum(1).tolist()
                lengths += text.lengths.tolist()
            now = {"seconds": self.seconds, "iterations": module.iteration}
            self.found.append(now | {"gold": [float(g) for g in gold], "kl": divergences, "tokens": mean(lengths)})
            print(
                f"{method} {seed}: {self.seconds:.0f} s, gold {mean(map(float, gold)):.3f}, "
                f"KL {mean(divergences):.2f} nats a response",
                file=sys.stderr,
            )

    L.seed_everything(seed, verbose=False)
    module, data, callbacks = build(method)
    clock = Clock()
    bare_trainer(tempfile.mkdtemp(), [*callbacks, clock], max_epochs=50).fit(module, data)
    return clock.found


def best_of_n(seed: int) -> list[dict[str, Any]]:
    """Best of n of the SFT model by the reward model; n = 1 is the SFT model itself."""
    import torch

    from lrlhf.functional import best_of_n_kl, best_of_n_kl_bound
    from lrlhf.rewards import vader_sentiment
    from lrlhf.types import Sequences

    module, _, _ = build("PPO")
    module.seed = seed
    module.configure_model()
    module.eval()
    found = []
    for n in BEST_OF:
        gold, divergences, seconds = [], [], 0.0
        for number, batch in enumerate(held_out(16)):
            rows, start = batch.repeat(n), time.perf_counter()
            text = Sequences(rows.prompt_ids, rows.prompt_mask, *module.sample(rows, "reference", "best of", number))
            place = module.score(text, rows).view(-1, n).argmax(1) if n > 1 else torch.zeros(len(batch)).long()
            seconds += time.perf_counter() - start
            taken = text.rows(torch.arange(0, len(rows), n) + place)
            gold += vader_sentiment(list(batch.texts), module.decode(taken.response_ids, taken.response_mask))
            divergences += best_of_n_kl(module.logprobs(taken, "reference").sum(1), n).tolist()
        found.append(
            {
                "n": n,
                "gold": [float(g) for g in gold],
                "kl": divergences,
                "bound": best_of_n_kl_bound(n),
                "seconds_an_answer": seconds / len(gold),
            }
        )
    return found


def interval(numbers: list[float]) -> str:
    """Mean and 95 % interval over prompts."""
    half = NormalDist().inv_cdf(0.975) * stdev(numbers) / math.sqrt(len(numbers))
    return f"{mean(numbers):+.3f} ± {half:.3f}"


def at(curve: list[dict[str, Any]], axis: Any, place: float) -> list[float] | None:
    """Gold of every prompt where the curve first reaches `place` of `axis`, linear between two measurements."""
    for before, after in pairwise(curve):
        low, high = axis(before), axis(after)
        if low <= place <= high:
            share = (place - low) / (high - low) if high > low else 1.0
            return [a + share * (b - a) for a, b in zip(before["gold"], after["gold"], strict=True)]
    return None


def main():
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds:
        for method in options.methods:
            if str(seed) in report.get(method, {}):
                continue
            words = [sys.executable, *sys.argv, "--one", method, str(seed)]
            found = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            report.setdefault(method, {})[str(seed)] = json.loads(found)
            options.out.write_text(json.dumps(report))
    start = {seed: runs[0]["gold"] for seed, runs in report["best of n"].items()}
    print("SFT", interval([g for gold in start.values() for g in gold]))
    for number, n in enumerate(BEST_OF[1:], start=1):
        runs = [runs[number] for runs in report["best of n"].values()]
        print(
            f"best of {n}: gold {interval([g for run in runs for g in run['gold']])}, KL "
            f"{mean(k for run in runs for k in run['kl']):.2f} (bound {runs[0]['bound']:.2f}), "
            f"{mean(run['seconds_an_answer'] for run in runs):.2f} s an answer"
        )
    for method in METHODS:
        curves = report.get(method, {})
        for name, axis, places in (
            ("seconds", lambda point: point["seconds"], (options.seconds / 3, options.seconds * 0.99)),
            ("KL", lambda point: mean(point["kl"]), (0.5, 1.0, 2.0, 4.0)),
        ):
            for place in places:
                golds = [gold for curve in curves.values() if (gold := at(curve, axis, place)) is not None]
                text = interval([g for gold in golds for g in gold]) if golds else "not reached"
                print(f"{method:16} {name} {place:6.1f}: gold {text} ({len(golds)} of {len(curves)} seeds)")
        for seed, curve in curves.items():
            goal = mean(start[seed]) + 0.2
            reached = [point["seconds"] for point in curve if mean(point["gold"]) >= goal]
            print(
                f"{method:16} seed {seed}: +0.2 after {reached[0] / 60:.1f} min"
                if reached
                else f"{method:16} seed {seed}: +0.2 not reached in {curve[-1]['seconds'] / 60:.1f} min"
            )


if __name__ == "__main__":
    if options.one:
        method, seed = options.one
        print(json.dumps(best_of_n(int(seed)) if method == "best of n" else train(method, int(seed))))
    else:
        main()
