"""Time lrlhf beside TRL on this machine: runs alternate, one JSON file comes out, and a table is printed.

python bench/run.py --peer-python .venv-peer/bin/python --out bench/results.json

Leave the machine alone meanwhile. `--only ours` leaves the peer out; `--scaling` adds twice the prompts and tokens.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, AutoTokenizer

from lrlhf.datamodules import AlpacaTemplate
from lrlhf.datamodules.formats import Row
from lrlhf.doctor.machine import SHAPES
from lrlhf.doctor.timing import layer_weights, now, products
from lrlhf.kernels.linear import linear
from lrlhf.model.pretrained import resolve

HERE = Path(__file__).parent
BASE = "smollm2-135m-instruct"
METHODS = ("dpo", "rloo", "grpo")
MICRO = {"bfloat16": "16", "float32": "8"}
"""Rows of a micro-batch of ours: the default, and half of it where activations take twice the bytes. TRL's are 8."""


def prompts_file(folder: Path) -> Path:
    """96 of the demo's instructions in the Alpaca template."""
    lines = (HERE.parent / "demo/data/prompts.jsonl").read_text().splitlines()[:96]
    texts = [json.loads(line)["instruction"] for line in lines]
    rows = [Row((("user", text),), text, "", (), 0.0, "demo") for text in texts]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": AlpacaTemplate().render(row, None)}) + "\n" for row in rows))
    return path


def rates(dtype: str, device: str) -> dict[str, float]:
    """GFLOP/s of a layer-sized matrix product, and GB/s of a copy (read and written), the best of five."""
    n, inputs, outputs = {"cpu": (808, 576, 1536), "cuda": SHAPES["cuda"]}[device]
    x, w = (torch.randn(rows, inputs, dtype=getattr(torch, dtype), device=device) for rows in (n, outputs))
    source = torch.randn(50_000_000, device=device)
    target = torch.empty_like(source)

    def best(call, repeat):
        seconds = []
        for _ in range(6):
            start = now(x.device)
            for _ in range(repeat):
                call()
            seconds.append((now(x.device) - start) / repeat)
        return min(seconds[1:])

    product = best(lambda: linear(x, w), 50)
    copy = best(lambda: target.copy_(source), 1)
    return {"gflops": 2 * n * inputs * outputs / product / 1e9, "gb_per_s": 8 * source.numel() / copy / 1e9}


def floor(prompts: Path, run: dict, rate: dict[str, float]) -> dict[str, float]:
    """Seconds that an iteration's matrix products would take at that rate, by phase; two inner epochs.

    A decoded token reads all weights, which may take longer than to multiply them.
    """
    config = AutoConfig.from_pretrained(resolve(BASE))
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE))
    rows = prompts.read_text().splitlines()[: run["rollout"]]
    prompt = sum(len(tokenizer(json.loads(row)["prompt"])["input_ids"]) for row in rows)
    response = run["rollout"] * run["response"]
    seconds = {k: n / rate["gflops"] / 1e9 for k, n in products(config, prompt, response, inner_epochs=2).items()}
    weights = sum(layer_weights(config)) * (2 if run["dtype"] == "bfloat16" else 4)
    decoding = products(config, 0, response, inner_epochs=2)["generate"] / rate["gflops"] / 1e9
    reading = run["response"] * weights / rate["gb_per_s"] / 1e9
    return seconds | {"generate": seconds["generate"] + max(0, reading - decoding)}


def pairs_file(folder: Path) -> Path:
    """Preference pairs of the demo as plain texts: prompt, chosen, rejected."""
    texts = []
    for line in (HERE.parent / "demo/data/preferences.jsonl").read_text().splitlines():
        row = json.loads(line)
        row_alone = Row((("user", row["instruction"]),), row["instruction"], "", (), 0.0, "demo")
        sides = (row["output_1"], row["output_2"])[:: 1 if row["preference"] == 1 else -1]
        prompt = AlpacaTemplate().render(row_alone, None)
        texts.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def methods(options: argparse.Namespace) -> None:
    """Time DPO, RLOO and GRPO beside TRL's trainers; a table of means without the first step, which warms up."""
    rows = pairs_file(Path(tempfile.mkdtemp()))
    runs = []
    for dtype in options.dtypes:
        for method in options.methods or METHODS:
            work = ["--method", method, "--rows", str(rows), "--dtype", dtype, "--steps", str(options.iterations + 1)]
            for _ in range(options.rounds):
                runs.append(call(sys.executable, "engine_methods.py", *work))
                if not options.only:
                    runs.append(call(options.peer_python, "peer_methods.py", *work, "--model", resolve(BASE)))
                options.out.write_text(json.dumps(runs, indent=1))
    for run in runs:
        seconds = run["s_per_step"]
        print(
            f"{run['engine']:24} {run['method']:5} {run['dtype']:9} {mean(warm(seconds)):6.1f} s/step {seconds}  "
            f"{run['peak_rss_mib']:5} MiB"
        )


def warm(seconds: list[float]) -> list[float]:
    """Without the first, if there are more."""
    return seconds[1:] or seconds


def call(python: str, script: str, *arguments: str) -> dict:
    print("running", script, *arguments, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [python, str(HERE / script), *arguments], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", default=".venv-peer/bin/python")
    parser.add_argument("--prompts", type=Path, help='{"prompt": text} lines; default: the demo\'s instructions')
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="PPO alone")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=2, help="how often the two alternate")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--only", choices=["ours"], help="leave the peer out")
    parser.add_argument("--scaling", action="store_true", help="also twice the prompts and twice the tokens, bf16")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="time these instead of PPO; none named: all")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    if options.methods is not None:
        return methods(options)
    prompts = options.prompts or prompts_file(Path(tempfile.mkdtemp()))
    work = ["--prompts", str(prompts), "--iterations", str(options.iterations), "--device", options.device]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    report = {"machine": machine, "torch": torch.__version__, "runs": []}
    for dtype in options.dtypes:
        for _ in range(options.rounds):
            rate = rates(dtype, options.device)
            ours = call(sys.executable, "engine.py", *work, "--dtype", dtype, "--micro", MICRO[dtype])
            bound = floor(prompts, ours, rate)
            ours["rates"] = rate
            ours["floor"] = bound
            ours["share_of_floor"] = {k: round(v / mean(warm(ours["phases"][k])), 2) for k, v in bound.items()}
            report["runs"].append(ours)
            if not options.only:
                peer = call(options.peer_python, "peer_trl.py", *work, "--dtype", dtype, "--model", resolve(BASE))
                report["runs"].append(peer)
            options.out.write_text(json.dumps(report, indent=1))
    if options.scaling:
        for extra in ([], ["--rollout", "64"], ["--response", "128"]):
            bf16 = "--dtype", "bfloat16", "--micro", MICRO["bfloat16"]
            report["runs"].append(call(sys.executable, "engine.py", *work, *bf16, *extra))
            options.out.write_text(json.dumps(report, indent=1))
    for run in report["runs"]:
        print(
            f"{run['engine']:20} {run['dtype']:9} {run['rollout']:3} x {run['response']:3}  "
            f"{mean(warm(run['s_per_iteration'])):6.1f} s/iteration {run['s_per_iteration']}  "
            f"{run.get('peak_gpu_mib', run['peak_rss_mib']):5} MiB {'of GPU ' * ('peak_gpu_mib' in run)} "
            f"{run.get('share_of_floor', '')}"
        )


if __name__ == "__main__":
    main()
