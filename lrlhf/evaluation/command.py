"""`lrlhf evaluate`: run an evaluation that a config names, print its table, and keep it for the report."""

from pathlib import Path
from typing import Any

from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.evaluation.evaluation import Evaluation, write_result

DESCRIPTION = """Whether a model became better: win rates by any judge, factual precision, reward-model accuracy.
Configs for each are in configs/evaluate/."""


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a bad option or config, or an input that cannot be used.
    """
    evaluation, folder = parse(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"evaluation": type(evaluation).__name__, **evaluation.run(folder)}
    write_result(folder, result)
    print_result(result)
    print(f"Written: {folder}")


def parse(arguments: list[str]) -> tuple[Evaluation, Path]:
    """The evaluation that a command line describes, and the folder of its result.

    Raises:
        UserError: a bad option or config.
    """
    parser = CommandParser("evaluate", DESCRIPTION)
    parser.add_subclass_arguments(Evaluation, "evaluation", required=False)
    parser.add_argument("--to", type=str | None, help="folder of the result (default: runs/evaluations/CLASS)")
    parsed = parser.parse_args(arguments)
    if parsed.get("evaluation") is None:
        raise UserError("evaluate: name an evaluation, such as --config configs/evaluate/reward_model.yaml.")
    try:
        evaluation = parser.instantiate_classes(parsed).evaluation
    except UserError:
        raise
    except ValueError as error:
        parser.error(str(error), error)
    return evaluation, Path(parsed.to or f"runs/evaluations/{type(evaluation).__name__}").expanduser()


def print_result(result: dict[str, Any]) -> None:
    """The lines as a table, and the notes under it."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise UserError(f"lrlhf evaluate needs {error.name}: pip install 'lrlhf[evaluate]'.") from None
    table = Table(title=Text(result["title"], "bold"), title_justify="left")
    table.add_column("")
    for heading in ("Value", "95 % interval", "n"):
        table.add_column(heading, justify="right")
    for label, (value, low, high, n), style in result["lines"]:
        interval = f"{low:{style}} to {high:{style}}" if low == low else ""
        table.add_row(Text(label), f"{value:{style}}", interval, str(n or ""))
    Console().print(table, *(Text(note) for note in result["notes"]), sep="\n")
