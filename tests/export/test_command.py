"""Exports are whole or not there, bad input is one sentence, cards tell what was measured, uploads go in one commit."""

import base64
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lrlhf import Quantization, TextTemplate, UserError
from lrlhf.__main__ import main
from lrlhf.evaluation.system import System, prompt_row
from lrlhf.export import formats
from lrlhf.export.command import export
from lrlhf.export.templates import chat_template, write_modelfile
from lrlhf.model.adapters import concatenate
from lrlhf.model.pretrained import load_tokenizer
from lrlhf.run.handover import Handover
from tests.conftest import save_tiny_llama
from tests.export.test_formats import hand_over
from tests.modules.helpers import ppo, prompt_data, train_reward, train_sft, trainer


@pytest.fixture(scope="module")
def policy(tiny_llama, tmp_path_factory) -> str:
    return hand_over(tiny_llama, tmp_path_factory.mktemp("policy") / "handover", "policy")


@pytest.fixture(scope="module")
def reward(tiny_llama, tmp_path_factory) -> str:
    return hand_over(tiny_llama, tmp_path_factory.mktemp("reward") / "handover", "reward")


def told(capsys, *arguments: str) -> str:
    """The one sentence that a bad command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(["export", *arguments])
    assert stop.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrlhf")]
    assert len(lines) == 1
    return lines[0]


# Bad input


def test_what_cannot_be_exported_is_one_sentence_and_leaves_no_folder(capsys, tmp_path, tiny_llama, policy, reward):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1")
    (run / "metrics.csv").write_text("")
    to = str(tmp_path / "out")
    for arguments, sentence in (
        ([str(run)], "a run without a hand-over"),
        ([tiny_llama], "is no run and no hand-over"),
        ([str(Path(policy).parents[1])], "holds several runs; name one: "),
        ([f"{tmp_path}/nowhere/x"], "there is no run"),
        ([reward], "handed over a reward model; export it with --format reward"),
        ([policy, "--format", "reward"], "handed over a policy model; export it with --format adapter"),
        ([policy, "--format", "gguf"], "BPE with merges here, not BPE with 0"),
        ([policy, "--dtype", "float32"], "adapters are float32"),
        ([policy, "--format", "merged", "--dtype", "q8_0"], "q8_0 is for --format gguf"),
        ([policy, "--push-to-hub", "name"], "give ORG/NAME"),
        ([policy, "--formt", "merged"], "unknown option --formt"),
    ):
        assert sentence in told(capsys, *arguments, "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_is_there_is_replaced_only_when_asked(capsys, tmp_path, policy):
    to = tmp_path / "out"
    to.mkdir()
    (to / "mine.txt").write_text("mine")
    assert "is there already" in told(capsys, policy, "--to", str(to))
    assert (to / "mine.txt").read_text() == "mine"
    export(policy, str(to), overwrite=True)
    assert not (to / "mine.txt").exists()
    assert (to / "adapter_model.safetensors").is_file()


def test_another_base_is_refused(capsys, tmp_path):
    base = str(save_tiny_llama(tmp_path / "base"))
    source = hand_over(base, tmp_path / "handover", "policy")
    shutil.rmtree(base)
    save_tiny_llama(tmp_path / "base", seed=5)
    assert "trained with another base model" in told(capsys, source, "--to", str(tmp_path / "out"))


def test_a_family_that_gguf_does_not_know_is_refused_by_name(capsys, tmp_path):
    from tests.families import build

    source = hand_over(build("olmo2", tmp_path / "base"), tmp_path / "handover", "sft")
    assert "not olmo2" in told(capsys, source, "--to", str(tmp_path / "out"), "--format", "gguf")


@pytest.mark.parametrize("form", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_old_export_and_nothing_beside_it(tmp_path, policy, form):
    """Files cannot grow beyond a few bytes in the process, as on a disk without room."""
    to = tmp_path / "out"
    export(policy, str(to), form=form)
    before = {path.name: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    run = subprocess.run(
        [sys.executable, "-m", "lrlhf", "export", policy, "--to", str(to), "--format", form, "--overwrite"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.strip().count("\n") == 0, run.stderr
    assert {path.name: path.read_bytes() for path in to.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_is_not_the_role_is_refused_and_not_kept(tmp_path, policy, monkeypatch):
    """The first adapter of the stack alone, as if the second had been lost on the way."""
    monkeypatch.setattr(formats, "concatenate", lambda folders, to: concatenate(folders[:1], to))
    with pytest.raises(UserError, match="log-probs of the export differ by .* from the run's, more than rounding"):
        export(policy, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# Kinds of adapters and bases


def test_a_quantised_base_is_merged_only_when_asked_and_then_as_it_was_trained(tmp_path, tiny_llama, data_files):
    train_sft(tiny_llama, data_files, tmp_path / "run", quantize=Quantization("nf4"), limit_train_batches=2)
    settings = {"model": {"init_args": {"quantize": {"kind": "nf4"}}}}
    (tmp_path / "run/config.yaml").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="base in nf4, into which nothing is merged; --dequantize"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), form="merged")
    export(str(tmp_path / "run"), str(tmp_path / "out"), form="merged", dequantize=True)
    system, ids = System(str(tmp_path / "run")), torch.arange(12)
    with system.backbone.role("sft"):
        expected = system.backbone.plain_logits(ids)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids[None]).logits[0], expected, atol=1e-3, rtol=1e-3)


def test_a_merged_model_is_rounded_once(tmp_path, tiny_llama):
    """A base in bfloat16 with fp32 adapters, stored in fp32, is the policy to fp32 rounding."""
    source = hand_over(tiny_llama, tmp_path / "handover", "policy", dtype="bfloat16")
    export(source, str(tmp_path / "out"), form="merged", dtype="float32")
    base = load_file(Path(tiny_llama) / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    expected = base[f"{name}.weight"].bfloat16().double()
    for adapter in ("sft", "policy"):
        found = load_file(Path(source) / adapter / "adapter_model.safetensors")
        down, up = (found[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected += 5 / 3 * up @ down
    merged = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)


def test_export_import_export_are_equal(tmp_path, policy, tiny_llama, data_files):
    """The exported adapter is an SFT adapter of its own: it answers alike, trains on, and leaves as it came."""
    export(policy, str(tmp_path / "one"))
    export(str(tmp_path / "one"), str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    prompts = [System(policy).encode(prompt_row(f"tea {i}")) for i in range(3)]
    assert System(str(tmp_path / "one")).respond(prompts) == System(policy).respond(prompts)
    module = ppo(tiny_llama, sft=str(tmp_path / "one"))
    trainer(tmp_path / "run", limit_train_batches=1).fit(module, prompt_data(tiny_llama, data_files))
    assert Handover.read(tmp_path / "run/handover").stack == ("sft", "policy")


# What others made


def test_a_plain_peft_adapter_is_an_sft_adapter(tmp_path, policy, tiny_llama):
    """Made by peft alone, without a manifest."""
    export(policy, str(tmp_path / "one"))
    (tmp_path / "one/manifest.json").unlink()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "one").eval()
    module = ppo(tiny_llama, sft=str(tmp_path / "one"))
    module.configure_model()
    ids = torch.arange(12)
    with torch.no_grad(), module.backbone.role("policy"):
        torch.testing.assert_close(
            module.backbone.plain_logits(ids), plain(input_ids=ids[None]).logits[0], atol=1e-4, rtol=1e-4
        )


def test_adapters_of_others_that_are_more_or_do_not_fit_are_refused(tmp_path, policy, tiny_llama):
    export(policy, str(tmp_path / "one"))
    (tmp_path / "one/manifest.json").unlink()
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    for change, sentence in (
        ({"modules_to_save": ["lm_head"]}, "also changes modules_to_save"),
        ({"peft_type": "IA3"}, "is of type IA3"),
    ):
        (tmp_path / "one/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=sentence):
            ppo(tiny_llama, sft=str(tmp_path / "one"))
    (tmp_path / "one/adapter_config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "one/adapter_model.safetensors")
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in weights.items()}
    save_file(moved, tmp_path / "one/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"do not fit \(model\.layers\.1\."):
        ppo(tiny_llama, sft=str(tmp_path / "one")).configure_model()


def test_ppo_earns_the_scores_that_a_sequence_classifier_gives(tmp_path, reward, tiny_llama, data_files):
    """The classifier is our own export, loaded as a stranger's; its scores are those of plain transformers."""
    export(reward, str(tmp_path / "classifier"), form="reward")
    module = ppo(tiny_llama, reward_function=None, reward_model=str(tmp_path / "classifier"))
    seen = []
    original = module.score
    module.score = lambda sequences, batch: seen.append((sequences, batch, original(sequences, batch))) or seen[-1][2]
    trainer(tmp_path / "run", limit_train_batches=1).fit(module, prompt_data(tiny_llama, data_files))
    sequences, batch, scores = seen[0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    tokenizer = load_tokenizer(str(tmp_path / "classifier"))
    texts = module.decode(sequences.response_ids, sequences.response_mask)
    for source, text, score in zip(batch.sources, texts, scores, strict=True):
        turns = [{"role": "user", "content": source["instruction"]}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert float(score) == pytest.approx(float(model(input_ids=ids).logits), abs=1e-4)
    assert scores.std() > 0


def test_a_classifier_that_is_no_reward_model_is_refused(tmp_path, tiny_llama, reward):
    export(reward, str(tmp_path / "classifier"), form="reward")
    config = json.loads((tmp_path / "classifier/config.json").read_text())
    two = config | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "classifier/config.json").write_text(json.dumps(two))
    with pytest.raises(UserError, match=r"no sequence classifier could be loaded|has 2 labels"):
        ppo(tiny_llama, reward_function=None, reward_model=str(tmp_path / "classifier")).configure_model()


# Templates and cards


def test_a_text_template_becomes_jinja_and_go_and_a_wrong_one_is_left_out(tmp_path, policy):
    odd = 'Say "{instruction}" with \\n, {{braces}} and\n### é:'
    system = System(policy, template=TextTemplate(odd))
    system.handover.__dict__["template"] = None
    template, _ = chat_template(system, ends=True)
    text = system.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], chat_template=template, tokenize=False
    )
    assert text == 'Say "hi" with \\n, {braces} and\n### é:'
    write_modelfile(system, tmp_path)
    assert (
        'TEMPLATE """Say "{{ .Prompt }}" with \\n, {braces} and\n### é:{{ .Response }}"""'
        in (tmp_path / "Modelfile").read_text()
    )

    class Mine(type(system.template).__mro__[1]):
        def render(self, row, tokenizer):
            return f"mine {row.instruction}"

        @property
        def signature(self):
            return "mine"

    system.template = Mine()
    template, notes = chat_template(system, ends=False)
    assert template is None
    assert "have no chat template" in notes[0]


def test_the_card_tells_base_data_config_and_curves_and_is_valid_metadata(tmp_path, tiny_llama, data_files):
    train_reward(tiny_llama, data_files, tmp_path / "run", limit_train_batches=2)
    config = {"model": {"class_path": "lrlhf.RewardModel"}, "data": {"init_args": {"train": data_files["pairs"]}}}
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    (tmp_path / "run/metrics.csv").write_text("step,train/loss\n0,0.7\n1,0.6\n")
    export(str(tmp_path / "run"), str(tmp_path / "out"), form="reward", licence="mit")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-classification"
    text = card.content
    digest = hashlib.sha256(Path(data_files["pairs"]).read_bytes()).hexdigest()
    for part in (
        digest,
        "class_path: lrlhf.RewardModel",
        "plots/reward_loss.png",
        "AutoModelForSequenceClassification",
    ):
        assert part in text
    assert (tmp_path / "out/plots/reward_loss.png").read_bytes()[:4] == b"\x89PNG"


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['host']}/me/model/commit/{'0' * 40}"
            answer = {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        else:
            answer = {"url": f"http://{self.headers['host']}/me/model", "name": "me/model"}
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def reply(self, answer):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


def test_an_upload_needs_a_token_before_anything_is_made(capsys, tmp_path, policy, monkeypatch):
    monkeypatch.setattr("lrlhf.export.hub.get_token", lambda: None)
    sentence = told(capsys, policy, "--to", str(tmp_path / "out"), "--push-to-hub", "me/model")
    assert "needs a token of the hub: run hf auth login, or set HF_TOKEN" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_upload_sends_every_file(tmp_path, policy):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lrlhf", "export", policy, "--to", str(tmp_path / "out"), "--push-to-hub"]
    run = subprocess.run([*command, "me/model"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    sent = {name: (tmp_path / "out" / name).read_bytes() for name in Hub.files}
    assert sent == Hub.files
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= sent.keys()
    server.shutdown()
