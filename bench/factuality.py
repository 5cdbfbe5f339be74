"""Verifiers against human labels: accuracy and AUC on FActScore's labelled facts, scores per model beside human ones.

    .venv/bin/python bench/factuality.py FOLDER [--language-model smollm2-135m-instruct --sample 300]

FOLDER holds factscore_facts_16k.parquet (model, topic, fact, label: S, NS or IR) and wikipedia_passages_157.jsonl
(topic, passages). Irrelevant facts (IR) are in no accuracy or AUC, and count as not supported in the scores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from lrlhf.evaluation import LanguageModelVerifier, LocalModel, SentenceSupport, WordRecall
from lrlhf.evaluation.factuality import factscore
from lrlhf.evaluation.knowledge import Knowledge
from lrlhf.evaluation.verifiers import Claim

FITTED = "InstructGPT"
"""The model whose facts set the thresholds; accuracy counts on the others alone."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language-model")
    parser.add_argument("--sample", type=int, default=300)
    options = parser.parse_args()
    pages = [json.loads(line) for line in (options.folder / "wikipedia_passages_157.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pages.jsonl"
        source.write_text("".join(json.dumps({"title": p["topic"], "text": p["passages"]}) + "\n" for p in pages))
        knowledge = Knowledge(str(source))
        facts = pd.read_parquet(options.folder / "factscore_facts_16k.parquet")
        facts = facts[facts.topic.isin({page["topic"] for page in pages})].reset_index(drop=True)
        start = time.perf_counter()
        claims = [
            Claim(f.topic, f.fact, tuple(knowledge.passages(f.topic, f"{f.topic} {f.fact}")))
            for f in facts.itertuples()
        ]
        print(f"{len(claims)} facts of {facts.topic.nunique()} topics; passages in {time.perf_counter() - start:.1f} s")
    for verifier in (WordRecall(), SentenceSupport()):
        report(type(verifier).__name__, verifier, facts, claims)
    if options.language_model:
        some = facts[facts.label != "IR"].sample(options.sample, random_state=0).index
        verifier = LanguageModelVerifier(LocalModel(options.language_model))
        report(options.language_model, verifier, facts.loc[some], [claims[i] for i in some])
        for other in (WordRecall(), SentenceSupport()):
            report(f"{type(other).__name__}, same sample", other, facts.loc[some], [claims[i] for i in some])
    told = {m: score(g.assign(ok=g.label == "S")) for m, g in facts.groupby("model")}
    print("human labels:", {m: f"{value:.1%}" for m, value in told.items()})


def report(name: str, verifier, facts: pd.DataFrame, claims: list[Claim]) -> None:
    """One verifier: AUC of S against NS, the best threshold on FITTED, accuracy elsewhere, scores per model."""
    start = time.perf_counter()
    facts = facts.assign(support=verifier.support(claims))
    seconds = time.perf_counter() - start
    missing = int(facts.support.isna().sum())
    judged = facts[(facts.label != "IR") & facts.support.notna()]
    fitted, others = judged[judged.model == FITTED], judged[judged.model != FITTED]
    grid = np.unique(fitted.support.round(2))
    best = max(grid, key=lambda t: ((fitted.support >= t) == (fitted.label == "S")).mean())
    accuracy = {t: ((others.support >= t) == (others.label == "S")).mean() for t in (verifier.threshold, best)}
    auc = {m: roc_auc_score(g.label == "S", g.support) for m, g in judged.groupby("model")}
    whole = roc_auc_score(judged.label == "S", judged.support)
    print(
        f"{name}: AUC {whole:.3f} ({', '.join(f'{m} {v:.3f}' for m, v in auc.items())}); {missing} without an answer;"
    )
    print(f"  threshold {verifier.threshold}: accuracy {accuracy[verifier.threshold]:.1%}; best on {FITTED} {best}: "
          f"{accuracy[best]:.1%}; all supported: {(others.label == 'S').mean():.1%}; {seconds:.1f} s")  # fmt: skip
    ok = facts.assign(ok=facts.support >= verifier.threshold)
    print(f"  scores: { {m: f'{score(g):.1%}' for m, g in ok.groupby('model')} }")


def score(facts: pd.DataFrame) -> float:
    """FActScore without penalty of one model's facts."""
    decisions = [[{"is_supported": bool(ok)} for ok in g.ok] for _, g in facts.groupby("topic")]
    return factscore(decisions, gamma=0)["init_score"].value


if __name__ == "__main__":
    main()
