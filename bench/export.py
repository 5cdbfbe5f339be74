"""Seconds, peak memory and size of each export of a run, and tokens per second of its GGUF in llama.cpp beside ours.

python bench/export.py runs/demo/rl runs/demo/reward
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from lrlhf import Sampling
from lrlhf.evaluation.system import System, prompt_row

PROMPTS = [f"Tell me something about {what}." for what in ("tea", "rain", "cats", "roads", "songs", "gardens")]
TOKENS = 40


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of `lrlhf export ARGUMENTS` in a process of its own."""
    start = time.perf_counter()
    code = (
        "import sys, resource; from lrlhf.__main__ import main; main(sys.argv[1:]); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code, "export", *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(re.findall(r"PEAK (\d+)", run.stdout)[0]) / 2**20


def llama_cpp(path: Path, prompts: list[list[int]]) -> float:
    """Tokens per second of greedy answers, one prompt at a time."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.port = str(path), 1024, 1, 0
    parameters.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)
    count, seconds = 0, 0.0
    for ids in prompts:
        body = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        address = server.listening_address + "/completion"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
        timings = json.loads(urllib.request.urlopen(request).read())["timings"]
        count, seconds = count + timings["predicted_n"], seconds + timings["predicted_ms"] / 1000
    del server
    return count / seconds


def ours(source: str) -> tuple[float, float, list[list[int]]]:
    """Tokens per second, one prompt at a time and all together, and the prompts."""
    system = System(source, sampling=Sampling(max_new_tokens=TOKENS, temperature=0))
    prompts = [system.encode(prompt_row(prompt)) for prompt in PROMPTS]
    system.stop_ids = torch.tensor([-1])
    system.respond(prompts[:1])
    speeds = []
    for groups in ([[p] for p in prompts], [prompts * 8]):
        start = time.perf_counter()
        for group in groups:
            system.respond(group)
        speeds.append(sum(map(len, groups)) * TOKENS / (time.perf_counter() - start))
    return speeds[0], speeds[1], prompts


def main(policy: str, reward: str) -> None:
    """Print one line a format."""
    with tempfile.TemporaryDirectory() as folder:
        forms = [("adapter", None, policy), ("merged", None, policy), ("reward", None, reward)]
        forms += [("gguf", dtype, policy) for dtype in ("float16", "bfloat16", "q8_0")]
        for form, dtype, source in forms:
            to = Path(folder) / f"{form}-{dtype}"
            more = ["--dtype", dtype] if dtype else []
            seconds, peak = measure([source, "--to", str(to), "--format", form, *more])
            files = ("*.safetensors", "*.gguf")
            size = sum(path.stat().st_size for glob in files for path in to.glob(glob))
            print(f"{form} {dtype or ''}: {seconds:.1f} s, {peak:.2f} GiB, weights {size / 1e6:.1f} MB", flush=True)
        alone, together, prompts = ours(policy)
        print(f"ours: {alone:.1f} tokens/s one prompt at a time, {together:.1f} with 48 together", flush=True)
        for dtype in ("float16", "bfloat16", "q8_0"):
            speed = llama_cpp(Path(folder) / f"gguf-{dtype}/model.gguf", prompts)
            print(f"llama.cpp {dtype}: {speed:.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
