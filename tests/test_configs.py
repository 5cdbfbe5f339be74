"""The shipped config files parse, build on the meta device, and say what their paper says."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig

from lrlhf.__main__ import main
from lrlhf.cli.lightning import ConfigCLI, parse_config
from lrlhf.functional import divergence as divergences
from lrlhf.study import command as study
from lrlhf.study.trials import stages_of
from tests.conftest import save_tiny_llama

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = ("sft", "reward", "ppo")
DIVERGENCES = sorted(path.stem for path in (CONFIGS / "divergence").glob("*.yaml"))
HARDWARE = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))

ALONE = [
    *[(stage, None, None) for stage in STAGES],
    *[("ppo", divergence, None) for divergence in DIVERGENCES],
    *[("sft", None, hardware) for hardware in HARDWARE],
]
"""Each file once, with no more beside it than base.yaml and the file of a stage."""
COMBINATIONS = [
    ("sft", None, "one_gpu_12gb_4bit"),
    ("reward", None, "two_a100_ddp_4bit"),
    ("ppo", "kl", "one_gpu"),
    ("ppo", "js", "two_a100"),
    ("ppo", "js_paper", "two_a100_ddp"),
    ("ppo", "adaptive_kl", "one_gpu_12gb_4bit"),
    ("ppo", "none", "two_a100_ddp_4bit"),
    ("ppo", "others", "cpu"),
]
"""As a user composes them: every stage, divergence file and hardware file in at least one."""


@pytest.fixture(scope="session")
def llama_7b_shape(tmp_path_factory) -> str:
    """The config of LLaMA-7B and a tokenizer: enough to build it on the meta device."""
    folder = tmp_path_factory.mktemp("llama-7b")
    AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("tokenizer"))).save_pretrained(folder)
    LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def resolve(capsys, tmp_path):
    """A function that gives the resolved config of `lrlhf fit --config ... --print_config`, as a file."""

    def resolved(*files: Path, options=()) -> Path:
        arguments = [argument for file in files for argument in ("--config", str(file))]
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, *options, "--print_config"])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        path = tmp_path / "config.yaml"
        path.write_text(printed.out)
        return path

    return resolved


def test_the_combinations_hold_every_stage_divergence_and_hardware_file():
    stages, named_divergences, hardware = zip(*COMBINATIONS, strict=True)
    assert set(stages) == set(STAGES)
    assert {name for name in named_divergences if name} == set(DIVERGENCES)
    assert set(hardware) == set(HARDWARE)


@pytest.mark.parametrize(("stage", "divergence", "hardware"), [*ALONE, *COMBINATIONS])
def test_config_files_build_their_stage_on_the_meta_device(resolve, llama_7b_shape, stage, divergence, hardware):
    names = ["base", stage, divergence and f"divergence/{divergence}", hardware and f"hardware/{hardware}"]
    options = ["--model.init_args.base_model", llama_7b_shape]
    if stage != "sft":
        options += ["--model.init_args.sft", "null"]
    if stage == "ppo":
        options += ["--model.init_args.reward_model", "null"]
        options += ["--model.init_args.reward_function", "lrlhf.rewards.vader_sentiment"]
    path = resolve(*[CONFIGS / f"{name}.yaml" for name in names if name], options=options)
    values, module, data = parse_config(path)
    with torch.device("meta"):
        module.configure_model()
    trained = sum(p.numel() for p in module.backbone.trainable())
    adapter, head = 8_388_608, 4_096  # FACTS of the paper: r 8 on q, k, v, o of LLaMA-7B; the value head has a bias too
    assert trained == {"sft": adapter, "reward": adapter + head, "ppo": 2 * adapter + head + 1}[stage]
    assert all(p.device.type == "meta" for p in module.backbone.parameters())
    assert data.task == module.task
    assert data.tokenizer_name == llama_7b_shape
    callbacks = [c["class_path"].rpartition(".")[2] for c in values["trainer"]["callbacks"] or []]
    assert callbacks.count("DivergenceCallback") == (1 if divergence else 0)


METHODS = {"rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO", "expert_iteration": "ExpertIteration", "best_of_n": "BestOfN"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_config_builds_on_the_meta_device_with_nothing_but_a_policy(resolve, llama_7b_shape, method):
    options = ["--model.init_args.base_model", llama_7b_shape, "--model.init_args.sft", "null"]
    if method != "dpo":
        options += ["--model.init_args.reward_model", "null"]
        options += ["--model.init_args.reward_function", "lrlhf.rewards.vader_sentiment"]
    files = [CONFIGS / "base.yaml", CONFIGS / f"{method}.yaml", CONFIGS / "hardware/one_gpu.yaml"]
    _, module, data = parse_config(resolve(*files, options=options))
    with torch.device("meta"):
        module.configure_model()
    assert type(module).__name__ == METHODS[method]
    trained = sum(p.numel() for p in module.backbone.trainable())
    assert trained == (0 if method == "best_of_n" else 8_388_608)
    assert data.task == module.task
    assert (data.responses_per_prompt > 1) == (method in ("rloo", "grpo", "expert_iteration"))


def test_ppo_has_the_paper_s_numbers(resolve):
    files = [CONFIGS / "base.yaml", CONFIGS / "ppo.yaml", CONFIGS / "divergence/js_paper.yaml"]
    values = yaml.safe_load(resolve(*files).read_text())
    model, data = values["model"]["init_args"], values["data"]["init_args"]
    ppo = model["ppo"]
    assert (model["lora"]["r"], model["lora"]["alpha"], model["lora"]["dropout"]) == (8, 64, 0.1)
    assert (data["batch_size"], ppo["minibatch_size"], ppo["inner_epochs"]) == (256, 128, 2)
    assert model["optimizer"]["init_args"]["lr"] == 1e-5
    assert model["optimizer"]["init_args"]["eps"] == 1e-5
    assert (ppo["clip_range"], ppo["value_clip_range"], ppo["value_coefficient"]) == (0.2, 0.2, 0.1)
    assert (ppo["discount"], ppo["trace_decay"], ppo["whiten_rewards"]) == (1.0, 0.95, True)
    assert (data["max_prompt_tokens"], model["sampling"]["max_new_tokens"]) == (192, 300)
    callback = values["trainer"]["callbacks"][-1]["init_args"]
    assert (callback["divergence"], callback["coefficient"]) == ("lrlhf.functional.js_paper", 0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_a_demo_file_runs_alone(resolve, stage):
    options = ["--model.init_args.reward_function", "lrlhf.rewards.vader_sentiment"] if stage == "ppo" else []
    _, module, data = parse_config(resolve(CONFIGS / "demo" / f"{stage}.yaml", options=options))
    assert data.task == module.task == {"sft": "sft", "reward": "preference", "ppo": "prompts"}[stage]
    assert Path(data.sources["train"]).is_file()


def test_the_demo_that_can_be_checked_asks_no_held_out_question(resolve):
    _, module, data = parse_config(resolve(CONFIGS / "demo/grpo.yaml"))
    train, val = (
        {
            line["instruction"]: line["answer"]
            for line in map(json.loads, Path(data.sources[name]).read_text().splitlines())
        }
        for name in ("train", "val")
    )
    assert not train.keys() & val.keys()
    for question, answer in (train | val).items():
        assert int(answer) == max(map(int, re.findall(r"\d+", question)))
    assert type(module).__name__ == "GRPO"


# Divergences


def named_in(stem: str) -> str:
    """The divergence that a file asks for, without its import path."""
    values = yaml.safe_load((CONFIGS / f"divergence/{stem}.yaml").read_text())
    (callback,) = values["trainer"]["callbacks+"]
    return callback["init_args"]["divergence"].removeprefix("lrlhf.functional.")


def test_a_divergence_file_is_called_after_the_function_it_names():
    others = {"adaptive_kl": "kl", "none": "exact_kl", "others": "exact_kl"}
    assert {stem: named_in(stem) for stem in DIVERGENCES} == {stem: others.get(stem, stem) for stem in DIVERGENCES}


def test_every_divergence_has_a_file_or_a_line_in_others():
    text = (CONFIGS / "divergence/others.yaml").read_text()
    lines = re.findall(r"^ +(?:# )?divergence: lrlhf\.functional\.(\w+)  # \S", text, re.M)
    of_the_library = {
        name
        for name, function in inspect.getmembers(divergences, inspect.isfunction)
        if function.__module__ == divergences.__name__ and name not in ("over_vocabulary", "f_divergence")
    }
    assert sorted([*lines, *(set(DIVERGENCES) & of_the_library)]) == sorted(of_the_library)


def test_a_line_of_others_works_when_its_comment_sign_moves(resolve, tmp_path):
    name = "divergence: lrlhf.functional."
    text = (CONFIGS / "divergence/others.yaml").read_text()
    text = text.replace(f" {name}exact_kl ", f" # {name}exact_kl ").replace(f"# {name}bregman", f"{name}bregman")
    (tmp_path / "others.yaml").write_text(text)
    values = yaml.safe_load(resolve(CONFIGS / "base.yaml", CONFIGS / "ppo.yaml", tmp_path / "others.yaml").read_text())
    assert values["trainer"]["callbacks"][-1]["init_args"]["divergence"] == "lrlhf.functional.bregman"


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["divergence/kl.yaml"], []),
        ([], ["--trainer.callbacks+", "lrlhf.DivergenceCallback", "--trainer.callbacks.coefficient", "0.02"]),
    ],
    ids=["in a file's place", "without a file"],
)
def test_a_divergence_may_be_named_on_the_command_line(resolve, files, options):
    files = [CONFIGS / name for name in ("base.yaml", "ppo.yaml", *files)]
    options = [*options, "--trainer.callbacks.divergence", "lrlhf.functional.bregman"]
    callbacks = yaml.safe_load(resolve(*files, options=options).read_text())["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in callbacks] == ["lrlhf.SampleLog", "lrlhf.DivergenceCallback"]
    assert callbacks[-1]["init_args"]["divergence"] == "lrlhf.functional.bregman"
    assert callbacks[-1]["init_args"]["coefficient"] == 0.02


STUDIES = [
    path
    for path in sorted([*(CONFIGS / "studies").glob("*.yaml"), *(CONFIGS.parent / "bench/stories").glob("*.yaml")])
    if "conditions" in yaml.safe_load(path.read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_stage_of_every_condition_of_a_study_parses(path, monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIGS.parent)
    found = study.read(["--config", str(path)])
    for trial in [trial for trial in found.trials() if trial.seed == found.seeds[0]]:
        for stage, files in stages_of(trial.align).items():
            changes = dict(trial.changes.get(stage, {}))
            (tmp_path / "changes.yaml").write_text(yaml.safe_dump({"trainer": {}, **changes}))
            words = [word for file in (*files, str(tmp_path / "changes.yaml")) for word in ("--config", file)]
            words += ["--model.init_args.reward_model", "a/handover"] if stage == "rl" else []
            config = ConfigCLI(f"study: {stage}", lambda parser: None, words).config
            wanted = changes.get("model", {}).get("init_args", {})
            for key in wanted.keys() - {"lora", "optimizer", "ppo"}:
                assert config.model.init_args[key] == wanted[key], (trial.condition, stage, key)
            assert (config.model.init_args.lora is None) == ("lora" in wanted and wanted["lora"] is None)
