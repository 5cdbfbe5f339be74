"""One system against another, or several: win rates by a judge, with intervals, and with lengths beside them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from lrlhf.config import DType, Sampling, check_ranges
from lrlhf.datamodules.containers import ending
from lrlhf.datamodules.formats import Row, read_rows
from lrlhf.datamodules.prompts import Template
from lrlhf.errors import UserError
from lrlhf.evaluation.estimates import Estimate, Line
from lrlhf.evaluation.evaluation import Evaluation
from lrlhf.evaluation.judges import Judge, Order, annotate
from lrlhf.evaluation.pairs import Annotation, Output, pair_up, read_annotations, read_outputs
from lrlhf.evaluation.system import System, prompt_row
from lrlhf.evaluation.win_rate import WinRate, bradley_terry, paired_difference, win_rate_lines
from lrlhf.files import write_json

USABLE = 0.6
"""Pairs in which a judge must give the same answer in both orders for its win rate to say something."""


class HeadToHead(Evaluation):
    """Win rate of a model against a reference.

    Args:
        model: outputs in AlpacaEval's format (.json, .jsonl), a run folder, a hand-over folder, or a base model.
        judge: by class path.
        reference: the same; null takes the reference that the model's run started from.
        prompts: file of instructions to answer; null takes those of the outputs file.
        order: both shows each pair twice, the second time swapped; hash once, swapped for half of the instructions.
        sampling: how answers are drawn; null takes the run's own.
        template: how instructions are rendered; null takes the run's own, and for a base model its chat template.
        dtype: of the frozen base of what answers; null takes the run's own, and for a base model
            what `auto` means in training (`lrlhf.model.precision.fast_dtype`).
        limit: prompts at most.
    """

    def __init__(
        self,
        model: str,
        judge: Judge,
        reference: str | None = None,
        prompts: str | None = None,
        order: Order = "both",
        sampling: Sampling | None = None,
        template: Template | None = None,
        dtype: DType | None = None,
        limit: PositiveInt | None = None,
    ):
        self.model, self.judge, self.reference, self.prompts = model, judge, reference, prompts
        self.order, self.limit = order, limit
        self.settings: dict[str, Any] = {"sampling": sampling, "template": template, "dtype": dtype}
        check_ranges(self)

    def run(self, folder: Path) -> dict[str, Any]:
        """Answer, judge, count; writes the outputs, and annotations.json in AlpacaEval's format."""
        sides = {"reference": self._side(self.reference), "model": self._side(self.model)}
        written = next((side for side in sides.values() if isinstance(side, list)), None)
        outputs: dict[str, list[Output]] = {}
        for name in list(sides):
            side = sides.pop(name)  # so that a model has left memory when the next one is loaded
            if isinstance(side, System):
                outputs[name] = _answers(side, self._rows(written))
                write_json(folder / f"{name}_outputs.json", outputs[name])
            else:
                outputs[name] = side[: self.limit]
        annotations = annotate(self.judge, pair_up(outputs["reference"], outputs["model"]), self.order)
        write_json(folder / "annotations.json", annotations)
        return summary(annotations, self.judge.notes())

    def _side(self, source: str | None) -> list[Output] | System:
        if source is not None:
            return read_outputs(source) if is_outputs(source) else System(source, **self.settings)
        if is_outputs(self.model):
            raise UserError(
                "evaluation.reference: outputs have no reference of their own; give outputs, a run or a model."
            )
        return System(self.model, role="reference", **self.settings)

    def _rows(self, written: list[Output] | None) -> list[Row]:
        if self.prompts is not None:
            rows = list(read_rows(self.prompts))
            if not rows:
                raise UserError(f"evaluation.prompts={self.prompts} holds no rows.")
        elif written is not None:
            rows = [prompt_row(output.instruction) for output in written]
        else:
            raise UserError("evaluation.prompts: name a file of instructions for the models to answer.")
        return rows[: self.limit]


def _answers(system: System, rows: Sequence[Row]) -> list[Output]:
    answers = system.respond([system.encode(row) for row in rows])
    return [Output(said(row), answer, system.name, row.dataset) for row, answer in zip(rows, answers, strict=True)]


class Leaderboard(Evaluation):
    """Several systems that were judged: win rates, differences to the first paired by prompt, and Elo.

    Args:
        annotations: files in AlpacaEval's format, of one system or of several.
    """

    def __init__(self, annotations: list[str]):
        self.annotations = annotations

    def run(self, folder: Path) -> dict[str, Any]:
        """One block of lines a system."""
        systems: dict[str, list[Annotation]] = {}
        for annotation in (a for source in self.annotations for a in read_annotations(source)):
            systems.setdefault(annotation.generator_2, []).append(annotation)
        lines, first = [], next(iter(systems.values()), [])
        for name, judged in systems.items():
            found = measure(judged)
            lines += [
                Line(f"{name}: win rate", found["win_rate"], ".1%"),
                Line(f"{name}: length-controlled", found["length_controlled_win_rate"], ".1%"),
                Line(f"{name}: characters", found["model_length"], ".0f"),
            ]
            if judged is not first:
                lines.append(
                    Line(f"{name}: difference to {next(iter(systems))}", paired_difference(first, judged), "+.1%")
                )
        ratings = bradley_terry([a for judged in systems.values() for a in judged])
        lines += [Line(f"{name}: Elo", rating, "+.0f") for name, rating in ratings.items()]
        return {
            "title": f"{len(systems)} systems",
            "lines": lines,
            "notes": ["Elo by Bradley-Terry, the reference at 0."],
        }


def is_outputs(source: str) -> bool:
    """Whether a name is that of a file of outputs, rather than a run or a model."""
    return ending(Path(source)) in (".json", ".jsonl", ".csv", ".parquet")


def said(row: Row) -> str:
    """A prompt as the judge reads it: its one turn, or all turns with who speaks."""
    return (
        row.messages[0][1] if len(row.messages) == 1 else "\n\n".join(f"{turn[0]}: {turn[1]}" for turn in row.messages)
    )


def measure(annotations: Sequence[Annotation]) -> dict[str, Estimate]:
    """`WinRate` of all annotations there are; may run in one process of several."""
    metric = WinRate(sync_on_compute=False)
    metric.add(annotations)
    return metric.compute()


def summary(annotations: Sequence[Annotation], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The result of a head-to-head comparison: title, lines, notes and samples.

    Args:
        annotations: of one model against one reference by one judge.
        notes: the judge's.
    """
    found, first = measure(annotations), annotations[0]
    said = [*_verdict(found, first), *_unanswered(annotations)]
    places = dict.fromkeys(round(i * (len(annotations) - 1) / 4) for i in range(5))
    samples = [vars(annotations[i]) | {"word": annotations[i].word} for i in places]
    return {
        "title": f"{first.generator_2} against {first.generator_1}, judged by {first.annotator}",
        "judge": first.annotator,
        "lines": win_rate_lines(found),
        "notes": [*said, *notes],
        "samples": samples,
    }


def _verdict(found: Mapping[str, Estimate], first: Annotation) -> list[str]:
    """Who is preferred, if this can be told, and whether length alone may explain it."""
    rate, controlled, consistency = (
        found[name] for name in ("win_rate", "length_controlled_win_rate", "swap_consistency")
    )
    told = f"{rate.value:.1%}, 95 % interval {rate.low:.1%} to {rate.high:.1%}, {rate.n} prompts"
    if consistency.n and consistency.value < USABLE:
        return [
            f"No verdict: the judge gives the same answer in both orders for {consistency.value:.0%} of the pairs; "
            f"below {USABLE:.0%} it judges the position more than the text, and its win rate ({told}) says little."
        ]
    if rate.low != rate.low:
        return ["Too few judged pairs to say which is better."]
    if rate.low <= 0.5 <= rate.high:
        return [f"No difference is shown: the interval of the win rate includes 50 % ({told})."]
    said = [f"{first.generator_2 if rate.value > 0.5 else first.generator_1} is preferred ({told})."]
    if controlled.low <= 0.5 <= controlled.high:
        interval = f"{controlled.value:.1%}, {controlled.low:.1%} to {controlled.high:.1%}"
        said.append(f"At equal lengths no difference is shown (length-controlled {interval}): it may be length.")
    return said


def _unanswered(annotations: Sequence[Annotation]) -> list[str]:
    asked = Counter(answer is None for a in annotations for answer in a.answers)
    pairs = sum(a.preference is None for a in annotations)
    if not pairs:
        return []
    return [
        f"{pairs} of {len(annotations)} pairs have no preference: {asked[True]} of {asked.total()} of the judge's "
        "answers were missing or could not be read. They are in annotations.json, and in no rate."
    ]
