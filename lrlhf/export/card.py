"""The model card: what a model was made of and from, what was measured, how to load it. What is not known is said."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lrlhf import __version__
from lrlhf.errors import UserError
from lrlhf.evaluation.system import System
from lrlhf.model.pretrained import PACKAGED, licence_of
from lrlhf.report.runs import Run, read_run
from lrlhf.report.tables import CAVEAT, evaluation_table, make_table
from lrlhf.run.handover import Handover

USAGE = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")
model = PeftModel.from_pretrained(model, "{folder}")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")""",
    "gguf": """llama-server --model {folder}/model.gguf
ollama create {name} -f {folder}/Modelfile && ollama run {name}""",
    "reward": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
turns = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
score = model(**tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)).logits[0, 0]""",
}
"""How to load each format."""
WHAT = {
    "adapter": "A LoRA adapter, in peft's format.",
    "merged": "A model of transformers, its adapters folded into its weights.",
    "gguf": "A GGUF file for llama.cpp, with a Modelfile for Ollama.",
    "reward": "A reward model: a sequence classifier with one label, read at the last token of prompt and response.",
}


def write_card(
    system: System, folder: Path, to: Path, form: str, *, dtype: str, licence: str | None, notes: list[str]
) -> None:
    """README.md, and the plots that it shows.

    Args:
        system: that was exported.
        folder: to write into.
        to: where the export will lie.
        form: adapter, merged, gguf or reward.
        dtype: of what was written.
        licence: by its name on the hub; None takes that of the base's own card, if it has one.
        notes: sentences for the reader.
    """
    handover = system.handover
    assert handover is not None
    run = _run_of(handover)
    licence = licence or licence_of(handover.base_model)
    on_hub = handover.base_model.count("/") == 1 and not Path(handover.base_model).expanduser().exists()
    text = run.configs[_stage(run)] if run else {}
    card = ModelCard.from_template(
        ModelCardData(
            base_model=handover.base_model if on_hub else None,
            license=licence,
            library_name={"adapter": "peft", "gguf": "gguf"}.get(form, "transformers"),
            pipeline_tag="text-classification" if form == "reward" else "text-generation",
            tags=["lrlhf", "rlhf", "lora"] if handover.stack else ["lrlhf", "rlhf"],
        ),
        template_path=str(Path(__file__).with_name("card.md.j2")),
        name=to.name,
        what=WHAT[form],
        facts=_facts(handover, system, dtype),
        notes=notes,
        language="sh" if form == "gguf" else "python",
        usage=USAGE[form].format(
            imports="from lrlhf.model.pretrained import resolve\n" if _base(handover.base_model)[0] == "r" else "",
            folder=to.name,
            base=_base(handover.base_model),
            dtype=system.dtype,
            name=to.name.lower(),
        ),
        data=_data_files(run),
        tables=_tables(run),
        caveat=CAVEAT,
        plots=_draw(run, folder / "plots") if run else [],
        licence=f"Base model: {licence}." if licence else "The base model's licence is not known here; fill it in.",
        config=yaml.safe_dump(text, sort_keys=False, allow_unicode=True).rstrip() if text else "",
        version=__version__,
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _facts(handover: Handover, system: System, dtype: str) -> list[tuple[str, str]]:
    facts = [
        ("Base model", f"{handover.base_model} (fingerprint {handover.base})"),
        ("Role", f"{handover.role}: {' on '.join(reversed(handover.stack)) or 'full fine-tuning'}"),
        ("Stored in", dtype),
        ("Trained on a base in", f"{handover.dtype}{f', {system.quantize.kind}' if system.quantize else ''}"),
        ("Prompts", type(system.template).__name__),
        (
            "Ends a response",
            ", ".join(f"`{system.tokenizer.convert_ids_to_tokens(i)}`" for i in system.stop_ids.tolist()),
        ),
    ]
    return facts


def _base(base_model: str) -> str:
    """A base as Python that transformers understands; short names and GGUF files are lrlhf's to find."""
    if base_model in PACKAGED or base_model.endswith(".gguf"):
        return f'resolve("{base_model}")'
    return f'"{base_model}"'


def _run_of(handover: Handover) -> Run | None:
    """Of `lrlhf align`, or of the one stage; None for a hand-over or an export that lies alone."""
    stage = handover.folder.parent
    for folder in (stage.parent, stage) if (stage.parent / "comparison.json").is_file() else (stage,):
        try:
            return read_run(folder, folder.name)
        except UserError:
            continue
    return None


def _stage(run: Run) -> str:
    return list(run.configs)[-1]


def _data_files(run: Run | None) -> list[tuple[str, str, str]]:
    """Files that the stages' configs name: name, what for, and digest."""
    found: dict[tuple[str, str], str] = {}
    for stage, config in (run.configs if run else {}).items():
        data = (config.get("data") or {}).get("init_args") or {}
        for key in ("train", "val", "test"):
            name = data.get(key)
            path = Path(str(name)).expanduser()
            if name and path.is_file():
                with path.open("rb") as file:
                    found[path.name, f"{stage}, {key}"] = hashlib.file_digest(file, "sha256").hexdigest()
            elif name:
                found[str(name), f"{stage}, {key}"] = "not found here"
    return [(*key, digest) for key, digest in found.items()]


def _tables(run: Run | None) -> dict[str, Any]:
    if run is None:
        return {}
    tables = make_table(run.comparison) if run.comparison else {}
    return tables | {str(result["title"]): evaluation_table(result) for result in run.evaluations}


def _draw(run: Run, folder: Path) -> list[Any]:
    try:
        from lrlhf.report.drawing import image
        from lrlhf.report.plots import make_plots
    except UserError:  # without matplotlib a card has no pictures
        return []
    plots = make_plots([run])
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        image(plot).savefig(folder / f"{plot.name}.png", dpi=110)
    return plots
