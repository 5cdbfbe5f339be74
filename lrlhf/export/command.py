"""`lrlhf export`: what a run trained, in the form that another tool takes, with a model card."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.evaluation.system import System
from lrlhf.export.card import write_card
from lrlhf.export.formats import FORMATS, save_tokenizer
from lrlhf.export.hub import check_token, push
from lrlhf.model.pretrained import first_line
from lrlhf.run.folder import written_whole

DESCRIPTION = """Write what a run trained in the form that another tool takes, with tokenizer, chat template and model
card, in a folder that is whole or not there."""


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a source that trained nothing, a folder that is there, or a form that cannot hold the role.
    """
    given = parse(arguments)
    export(
        given.source,
        given.to,
        form=given.format,
        dtype=given.dtype,
        dequantize=given.dequantize,
        overwrite=given.overwrite,
        licence=given.license,
        push_to_hub=given.push_to_hub,
    )


def parse(arguments: list[str]) -> Namespace:
    """The options of a command line."""
    parser = CommandParser("export", DESCRIPTION)
    parser.add_argument("source", type=str, help="a run folder or a hand-over folder")
    parser.add_argument("--to", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--format",
        type=Literal["adapter", "merged", "gguf", "reward"],
        default="adapter",
        help="adapter: one peft adapter; merged: a model of transformers; gguf: for llama.cpp and Ollama; reward: a "
        "sequence classifier of transformers",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        help="of the weights; null takes that of the run's base. q8_0 is for gguf; adapters are float32",
    )
    parser.add_argument("--dequantize", action="store_true", help="merge into a quantised base, dequantised")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    parser.add_argument("--license", type=str | None, help="for the card, by its name on the hub, e.g. apache-2.0")
    parser.add_argument("--push-to-hub", type=str | None, help="ORG/NAME of a model on the Hugging Face hub")
    return parser.parse_args(arguments)


def export(
    source: str,
    to: str,
    *,
    form: Literal["adapter", "merged", "gguf", "reward"] = "adapter",
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Write an export; the options are those of the command.

    Returns:
        The folder.

    Raises:
        UserError: as `main`.
    """
    folder = Path(to).expanduser()
    if folder.exists() and not overwrite:
        raise UserError(f"{to} is there already; choose another folder, or replace it with --overwrite.")
    if dtype == "q8_0" and form != "gguf":
        raise UserError("export: dtype q8_0 is for --format gguf; choose float32, bfloat16 or float16.")
    if dtype and form == "adapter":
        raise UserError(
            "export: adapters are float32, as they were trained; leave --dtype out, or use --format merged."
        )
    if push_to_hub:
        check_token(push_to_hub)
    system = System(source)
    if system.quantize and form != "adapter" and not dequantize:
        raise UserError(
            f"{source} was trained on a base in {system.quantize.kind}, into which nothing is merged; --dequantize "
            "merges into the dequantised weights that it was trained on."
        )
    if system.handover is None:
        raise UserError(f"{source} is no run and no hand-over; there is nothing to export.")
    try:
        with written_whole(folder) as scratch:
            notes = save_tokenizer(system, scratch, reward=form == "reward")
            stored = "float32" if form == "adapter" else dtype or system.dtype
            notes.append(FORMATS[form](system, scratch, stored))
            (scratch / "README.md").unlink(missing_ok=True)
            write_card(system, scratch, folder, form, dtype=stored, licence=licence, notes=notes)
            if form == "adapter":
                replace(system.handover, folder=scratch).write_plain(scratch)
                system.copy_config(scratch)
    except UserError:
        raise
    except Exception as error:  # safetensors and tokenizers have no type of their own for a full disk
        raise UserError(f"{to} could not be written ({first_line(error)}); what was there is as it was.") from error
    print("\n".join(notes))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Written: {folder} ({size / 1e6:,.1f} MB)")
    if push_to_hub:
        push(folder, push_to_hub)
    return folder
