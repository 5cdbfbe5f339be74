"""What `lrlhf evaluate` runs: anything that measures and answers with lines, each a number with its interval."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lrlhf.evaluation.estimates import Line


class Evaluation(ABC):
    """A measurement named in YAML by its class path. Subclass it for one of your own."""

    @abstractmethod
    def run(self, folder: Path) -> dict[str, Any]:
        """Measure, and write details (annotations, decisions) into the folder.

        Args:
            folder: for files beside the result; it exists.

        Returns:
            What evaluation.json will hold, plain JSON values: `title`, `lines` (of `Line`s), `notes` (sentences to
            print under the lines), and whatever else a reader of the file needs.

        Raises:
            UserError: an input that cannot be used.
        """


def as_json(line: Line) -> dict[str, Any]:
    """A line as evaluation.json holds it; nan becomes null."""
    numbers = {k: None if v != v else v for k, v in line.estimate._asdict().items()}
    return {"label": line.label, **numbers, "style": line.style}
