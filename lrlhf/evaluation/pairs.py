"""AlpacaEval's files: outputs of a system, pairs of two systems' outputs, annotations of a judge."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrlhf.datamodules.containers import BadRow, read_records
from lrlhf.errors import UserError


@dataclass(frozen=True)
class Output:
    """What a system answered to an instruction."""

    instruction: str
    output: str
    generator: str
    dataset: str = ""


@dataclass(frozen=True)
class Pair:
    """Two systems' outputs for one instruction; AlpacaEval's convention is that the first is the reference."""

    instruction: str
    output_1: str
    output_2: str
    generator_1: str = "reference"
    generator_2: str = "model"
    dataset: str = ""

    @property
    def swapped(self) -> "Pair":
        """The same two outputs in the other order."""
        return replace(
            self,
            output_1=self.output_2,
            output_2=self.output_1,
            generator_1=self.generator_2,
            generator_2=self.generator_1,
        )

    @property
    def hash_swaps(self) -> bool:
        """Whether a hash of the instruction shows the second output first: half of all, the same in every run."""
        return bool(hashlib.sha256(self.instruction.encode()).digest()[0] & 1)


@dataclass(frozen=True)
class Annotation(Pair):
    """A judged pair: preference in [1, 2], 1 for the first output, 1.5 a tie, None without an answer.

    `answers` are what the judge said, one for each order in which it saw the pair, in terms of this pair's order.
    """

    annotator: str = ""
    preference: float | None = None
    answers: tuple[float | None, ...] = field(default=())

    @property
    def word(self) -> str:
        """The judge's answer in words."""
        if self.preference is None:
            return "gave no answer"
        if self.preference == 1.5:
            return "sees a tie"
        return f"prefers {self.generator_1 if self.preference < 1.5 else self.generator_2} ({self.preference:.2f})"


def read_outputs(source: str) -> list[Output]:
    """The rows of an outputs file (AlpacaEval's model_outputs.json, or jsonl): instruction, output, generator.

    Raises:
        UserError: no such file, no rows, or a row without instruction or output, named by file and row.
    """
    outputs = []
    for place, row in _rows(source):
        for key in ("instruction", "output"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{place}: expected a text under {key!r}; it has {', '.join(row) or 'no keys'}.")
        told = {key: str(row.get(key) or "") for key in ("generator", "dataset")}
        outputs.append(
            Output(row["instruction"], row["output"], told["generator"] or Path(source).stem, told["dataset"])
        )
    return outputs


def read_annotations(source: str) -> list[Annotation]:
    """The rows of an annotations file (AlpacaEval's annotations.json, or jsonl); 0 is read as a tie, as there.

    Raises:
        UserError: no such file, no rows, or a row without the texts or with a preference outside [1, 2].
    """
    needed = ("instruction", "output_1", "output_2")
    annotations = []
    for place, row in _rows(source):
        if missing := [key for key in needed if not isinstance(row.get(key), str)]:
            raise UserError(f"{place}: expected texts under {', '.join(needed)}; {', '.join(missing)} is none.")
        preference = row.get("preference")
        preference = None if preference is None or preference != preference else preference
        if preference is not None and not (
            isinstance(preference, int | float) and (1 <= preference <= 2 or preference == 0)
        ):
            raise UserError(f"{place}: expected a preference from 1 to 2, got {preference!r}.")
        texts: dict[str, Any] = {key: row[key] for key in needed}
        texts |= {key: str(row[key]) for key in ("generator_1", "generator_2", "dataset", "annotator") if row.get(key)}
        annotations.append(Annotation(**texts, preference=1.5 if preference == 0 else preference))
    return annotations


def pair_up(reference: Sequence[Output], model: Sequence[Output]) -> list[Pair]:
    """Pairs of outputs for the same instruction, in the order of the model's; the k-th of a repeated one with the k-th.

    Raises:
        UserError: the two systems answered different instructions.
    """
    there = dict(_numbered(reference))
    here = dict(_numbered(model))
    for mine, others, whose in ((here, there, "reference"), (there, here, "model")):
        if lacking := [key for key in mine if key not in others]:
            first = " ".join(lacking[0][0].split())[:60]
            raise UserError(
                f"the two systems answered different prompts: {len(lacking)} of {len(mine)} are not in the {whose}'s "
                f"outputs, the first {first!r}; give outputs for the same prompts."
            )
    return [
        Pair(
            key[0],
            there[key].output,
            out.output,
            there[key].generator,
            out.generator,
            out.dataset or there[key].dataset,
        )
        for key, out in here.items()
    ]


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    place = ""
    for place, row in read_records(source):
        if isinstance(row, BadRow):
            raise UserError(f"{place}: {row}.")
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected keys and values, got {type(row).__name__}.")
        yield place, row
    if not place:
        raise UserError(f"{source} holds no rows.")


def _numbered(outputs: Sequence[Output]) -> Iterator[tuple[tuple[str, int], Output]]:
    seen: Counter[str] = Counter()
    for output in outputs:
        seen[output.instruction] += 1
        yield (output.instruction, seen[output.instruction]), output
