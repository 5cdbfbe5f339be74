"""Before and after: the policy beside its reference on held-out prompts, with the same random draws."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lrlhf.callbacks.divergence import measure
from lrlhf.cli.lightning import parse_config
from lrlhf.errors import UserError
from lrlhf.evaluation.evaluation import write_result
from lrlhf.evaluation.head_to_head import summary
from lrlhf.evaluation.judges import Judge, annotate, higher
from lrlhf.evaluation.pairs import Annotation, Pair
from lrlhf.files import write_json
from lrlhf.functional import exact_forward_kl, exact_js, exact_kl, exact_total_variation, js, js_paper, kl
from lrlhf.report import AFTER, BEFORE, STAGES
from lrlhf.report.curves import read_curves
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.run.checkpoints import load, newest_checkpoint
from lrlhf.types import Prompts, Sequences

MEASURED = (kl, js, js_paper, exact_kl, exact_forward_kl, exact_js, exact_total_variation)


def compare(
    run: Path,
    gold: RewardFunction | None = None,
    prompts: str | None = None,
    count: int = 96,
    judge: Judge | None = None,
) -> None:
    """Write run/comparison.json: responses of reference and policy, their rewards and lengths, every divergence.

    And run/evaluations: win rates of after against before by the learned reward, by gold and by the judge.

    Args:
        run: folder of an align run whose last stage is done.
        gold: a reward function that training never saw; None leaves it out.
        prompts: file of held-out prompts; None takes the last stage's validation prompts.
        count: prompts at most.
        judge: of the pairs of responses, in both orders; None leaves it out. Each row then holds, as `judged` of its
            side after, whether that was better than before: 1, 0, between, or None without an answer.
    """
    start = time.perf_counter()
    config, module, data = load_run(run / "rl")
    data.task, data.val_limit = "prompts", count  # of a method that learns from pairs, the prompts of its pairs
    if prompts is not None:
        data.sources["val"] = prompts
    data.setup("validate")
    rows: list[dict[str, Any]] = []
    divergences: dict[str, list[tuple[float, int]]] = {}
    for number, batch in enumerate(tqdm(data.val_dataloader(), desc="comparing before and after")):
        sides = {}
        for side, role in (("before", "reference"), ("after", "policy")):
            sequences = Sequences(batch.prompt_ids, batch.prompt_mask, *module.sample(batch, role, "compare", number))
            sides[side] = _describe(module, sequences, batch, gold)
        for name, values in measure(module, sequences, module.logprobs(sequences, "policy"), MEASURED).items():
            tokens = int(sequences.response_mask.sum())
            divergences.setdefault(name, []).append((float(values.sum()) / tokens, tokens))
        for source, before, after in zip(batch.sources, sides["before"], sides["after"], strict=True):
            rows.append({"instruction": source["instruction"], "before": before, "after": after})
    result = {
        "gold": gold.__name__ if gold else None,
        "base_model": module.base_model,
        "seed": config.get("seed_everything"),
        "reward_model": _reward_model_accuracy(run / "reward"),
        "divergences": {k: sum(v * n for v, n in means) / sum(n for _, n in means) for k, means in divergences.items()},
        "seconds": {**_stage_seconds(run), "comparison": round(time.perf_counter() - start, 1)},
        "rows": rows,
    }
    write_json(run / "comparison.json", result)  # before the judge, whose failure must not cost the responses
    pairs = [
        Pair(row["instruction"], row["before"]["response"], row["after"]["response"], BEFORE, AFTER) for row in rows
    ]
    for name, key in (("the learned reward", "learned"), (result["gold"], "gold")):
        if name and rows[0]["before"][key] is not None:
            scores = [(row["before"][key], row["after"][key]) for row in rows]
            judged = [
                Annotation(**vars(pair), annotator=name, preference=higher(*both))
                for pair, both in zip(pairs, scores, strict=True)
            ]
            _write_win_rate(run / "evaluations" / key, judged)
    if judge is not None:
        judged = annotate(judge, pairs)
        _write_win_rate(run / "evaluations" / "judge", judged, judge.notes())
        for row, one in zip(rows, judged, strict=True):
            row["after"]["judged"] = None if one.preference is None else one.preference - 1
        write_json(run / "comparison.json", result)


def _write_win_rate(folder: Path, judged: list[Annotation], notes: Sequence[str] = ()) -> None:
    write_result(folder, {"evaluation": "HeadToHead", **summary(judged, notes)})
    write_json(folder / "annotations.json", judged)


def load_run(folder: Path) -> tuple[Any, Any, Any]:
    """Config, module (with the weights it ended with) and data module of a run folder."""
    path = folder / "config.yaml"
    newest = newest_checkpoint(folder)
    if not path.is_file() or newest is None:
        raise UserError(f"{folder} holds no run (config.yaml and checkpoints/); run its stage first.")
    config, module, data = parse_config(path)
    module.configure_model()
    checkpoint = load(newest)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.eval()
    return config, module, data


def _describe(module: Any, sequences: Sequences, batch: Prompts, gold: Any) -> list[dict[str, Any]]:
    responses = module.decode(sequences.response_ids, sequences.response_mask)
    nothing = [None] * len(responses)
    learned = module.score(sequences, batch).tolist() if hasattr(module, "score") else nothing
    told = list(batch.texts), responses, batch.columns, sequences.lengths.tolist(), batch.places
    gold = Reward(gold).scores(*told).tolist() if gold else nothing
    ended = torch.isin(sequences.response_ids, module.stop_ids).any(-1).tolist()
    names = ("response", "learned", "gold", "length", "ended")
    columns = (responses, learned, gold, sequences.lengths.tolist(), ended)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _reward_model_accuracy(folder: Path) -> dict[str, float] | None:
    """The last validation of the reward model, with the number of pairs."""
    curves = read_curves(folder / "metrics.csv")
    if "val/accuracy" not in curves:
        return None
    return {name: float(curves[f"val/{name}"].iloc[-1]) for name in ("accuracy", "longer_accuracy", "pairs")}


def _stage_seconds(run: Path) -> dict[str, float]:
    records = {stage: run / stage / "stage.json" for stage in STAGES}
    return {stage: json.loads(path.read_text())["seconds"] for stage, path in records.items() if path.is_file()}
