"""Every legal combination of the shipped files parses, builds on the meta device, and says what its paper says."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig

from lrlhf.__main__ import main
from lrlhf.cli.lightning import parse_config
from tests.conftest import save_tiny_llama

CONFIGS = Path(__file__).parent.parent / "configs"
DIVERGENCES = sorted((CONFIGS / "divergence").glob("*.yaml"))
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
COMBINATIONS = [
    *[("sft", None, h) for h in HARDWARE],
    *[("reward", None, h) for h in HARDWARE],
    *[("ppo", d, h) for d in [*DIVERGENCES, None] for h in HARDWARE],
]


@pytest.fixture(scope="session")
def llama_7b_shape(tmp_path_factory) -> str:
    """The config of LLaMA-7B and a tokenizer: enough to build it on the meta device."""
    folder = tmp_path_factory.mktemp("llama-7b")
    AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("tokenizer"))).save_pretrained(folder)
    LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32).save_pretrained(
        folder
    )
    return str(folder)


def resolve(capsys, tmp_path: Path, *files: Path | str, options=()) -> Path:
    """The resolved config of `lrlhf fit --config ... --print_config`, as a file."""
    arguments = [argument for file in files for argument in ("--config", str(file))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *options, "--print_config"])
    assert stop.value.code == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize(("stage", "divergence", "hardware"), COMBINATIONS)
def test_every_combination_builds_on_the_meta_device(capsys, tmp_path, llama_7b_shape, stage, divergence, hardware):
    files = [CONFIGS / "base.yaml", CONFIGS / f"{stage}.yaml", *([divergence] if divergence else []), hardware]
    options = ["--model.init_args.base_model", llama_7b_shape]
    if stage != "sft":
        options += ["--model.init_args.sft", "null"]
    if stage == "ppo":
        options += ["--model.init_args.reward_model", "null"]
        options += ["--model.init_args.reward_function", "lrlhf.rewards.vader_sentiment"]
    path = resolve(capsys, tmp_path, *files, options=options)
    values, module, data = parse_config(path)
    with torch.device("meta"):
        module.configure_model()
    trained = sum(p.numel() for p in module.backbone.trainable())
    adapter, head = 8_388_608, 4_097  # FACTS of the paper: r 8 on q, k, v, o of LLaMA-7B; the value head
    assert trained == {"sft": adapter, "reward": adapter + head, "ppo": 2 * adapter + head}[stage]
    assert all(p.device.type == "meta" for p in module.backbone.parameters())
    assert data.task == module.task
    assert data.tokenizer_name == llama_7b_shape
    callbacks = [c["class_path"].rpartition(".")[2] for c in values["trainer"]["callbacks"] or []]
    assert callbacks.count("DivergenceCallback") == (1 if divergence else 0)


def test_ppo_has_the_paper_s_numbers(capsys, tmp_path, llama_7b_shape):
    files = [CONFIGS / "base.yaml", CONFIGS / "ppo.yaml", CONFIGS / "divergence/js_paper.yaml"]
    values = yaml.safe_load(resolve(capsys, tmp_path, *files).read_text())
    model, data = values["model"]["init_args"], values["data"]["init_args"]
    assert (model["lora"]["r"], model["lora"]["alpha"], model["lora"]["dropout"]) == (8, 64, 0.1)
    assert (data["batch_size"], model["minibatch_size"], model["inner_epochs"]) == (256, 128, 2)
    assert model["optimizer"]["init_args"]["lr"] == 1e-5
    assert model["optimizer"]["init_args"]["eps"] == 1e-5
    assert (model["clip_range"], model["value_clip_range"], model["value_coefficient"]) == (0.2, 0.2, 0.1)
    assert (model["discount"], model["trace_decay"], model["whiten_rewards"]) == (1.0, 0.95, True)
    assert (data["max_prompt_tokens"], model["sampling"]["max_new_tokens"]) == (192, 300)
    callback = values["trainer"]["callbacks"][-1]["init_args"]
    assert (callback["divergence"], callback["coefficient"]) == ("lrlhf.functional.js_paper", 0.02)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_demo_file_runs_alone(capsys, tmp_path, stage):
    path = resolve(
        capsys,
        tmp_path,
        CONFIGS / "demo" / f"{stage}.yaml",
        options=["--model.init_args.reward_function", "lrlhf.rewards.vader_sentiment"] if stage == "ppo" else [],
    )
    _, module, data = parse_config(path)
    assert data.task == module.task == {"sft": "sft", "reward": "preference", "ppo": "prompts"}[stage]
    assert Path(data.sources["train"]).is_file()


def test_a_divergence_is_named_by_the_function_it_says():
    for path in DIVERGENCES:
        (callback,) = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
        name = callback["init_args"]["divergence"].rpartition(".")[2]
        assert path.stem in (name, f"adaptive_{name}", "none", "others")
