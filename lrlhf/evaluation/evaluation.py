"""What `lrlhf evaluate` runs: anything that measures and answers with lines, each a number with its interval."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lrlhf.evaluation.estimates import Line
from lrlhf.files import write_json

FILE = "evaluation.json"
"""What an evaluation found, in the folder that it was given."""


class Evaluation(ABC):
    """A measurement named in YAML by its class path. Subclass it for one of your own."""

    @abstractmethod
    def run(self, folder: Path) -> dict[str, Any]:
        """Measure, and write details (annotations, decisions) into the folder.

        Args:
            folder: for files beside the result; it exists.

        Returns:
            What evaluation.json will hold, JSON values but for `lines`: `title`, `lines` (of `Line`s), `notes`
            (sentences to print under the lines), and whatever else a reader of the file needs.

        Raises:
            UserError: an input that cannot be used.
        """


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write folder/evaluation.json, whole or not at all.

    Args:
        folder: made if there is none.
        result: of an evaluation; a number that is nan becomes null.
    """
    write_json(folder / FILE, {**result, "lines": [_as_json(line) for line in result["lines"]]})


def _as_json(line: Line) -> dict[str, Any]:
    numbers = {key: None if number != number else number for key, number in line.estimate._asdict().items()}
    return {"label": line.label, **numbers, "style": line.style}
