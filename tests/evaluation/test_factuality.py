"""Factual precision against hand values, and knowledge that is searched and never obeyed."""

import json
import math
import os

import pytest

from lrlhf.__main__ import main
from lrlhf.errors import UserError
from lrlhf.evaluation import (
    FactualPrecision,
    LanguageModelSplitter,
    LanguageModelVerifier,
    SampleAgreement,
    SentenceSplitter,
    SentenceSupport,
    WordRecall,
)
from lrlhf.evaluation.factuality import abstains, factscore, sample_surprise
from lrlhf.evaluation.knowledge import Knowledge, build
from lrlhf.evaluation.verifiers import Claim, Verifier
from tests.conftest import write_jsonl

ADA = ["Ada wrote the first program for a machine.", "She was born in London in 1815.", "Her father was a poet."]
GRACE = ["Grace wrote a compiler, the first program of its kind.", "She was born in New York in 1906."]
PAGES = [
    {"title": "Ada Lovelace", "text": ADA},
    {"title": "Grace Hopper", "text": GRACE},
    {"title": 'O"Brien; DROP TABLE passages--', "text": "A page with a hostile title."},
]
HOSTILE = ['"', "a AND OR NOT b", "text:*", "' OR 1=1 --", "NEAR(a b)", "ünï çødé 数", "", "^", "(" * 50]


@pytest.fixture
def pages(tmp_path) -> str:
    return write_jsonl(tmp_path / "pages.jsonl", PAGES)


# Knowledge


def test_passages_of_the_topics_page_come_in_the_order_of_their_match(pages):
    knowledge = Knowledge(pages)
    assert knowledge.pages == 3
    assert knowledge.passages("Ada Lovelace", "born in 1815", 1) == [PAGES[0]["text"][1]]
    assert knowledge.passages("Ada Lovelace", "program machine", 2) == PAGES[0]["text"][:2]
    assert knowledge.passages("Grace Hopper", "first program", 1) == [PAGES[1]["text"][0]]
    assert knowledge.passages("Ada Lovelace", "zzz", 5) == PAGES[0]["text"]
    assert knowledge.passages("Nobody", "program", 5) == []
    assert not knowledge.has("Ada")


def test_rarer_words_count_more(tmp_path):
    text = ["common common common", "common rare", "other common", "common thing"]
    knowledge = Knowledge(write_jsonl(tmp_path / "k.jsonl", [{"title": "T", "text": text}]))
    assert knowledge.passages("T", "common rare", 1) == ["common rare"]


@pytest.mark.parametrize("query", HOSTILE)
def test_a_query_is_text_whatever_stands_in_it(pages, query):
    knowledge = Knowledge(pages)
    assert len(knowledge.passages("Ada Lovelace", query)) == 3
    assert knowledge.passages(PAGES[2]["title"], query) == [PAGES[2]["text"]]
    assert knowledge.pages == 3


def test_long_pages_are_cut_into_passages_of_256_words(tmp_path):
    source = write_jsonl(tmp_path / "k.jsonl", [{"title": "T", "text": " ".join(map(str, range(600)))}])
    assert [len(p.split()) for p in Knowledge(source).passages("T", "")] == [256, 256, 88]


def test_a_database_is_built_once_and_again_when_the_pages_change(tmp_path, pages):
    Knowledge(pages)
    database = tmp_path / "pages.sqlite"
    first = database.stat().st_mtime_ns
    Knowledge(pages)
    assert database.stat().st_mtime_ns == first
    write_jsonl(tmp_path / "pages.jsonl", PAGES[:1])
    os.utime(pages, ns=(first + 10**9, first + 10**9))
    assert Knowledge(pages).pages == 1
    assert Knowledge(str(database)).pages == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_build_that_fails_leaves_the_old_database(tmp_path, pages):
    Knowledge(pages)
    with pytest.raises(UserError, match="row 2: expected title and text, got title"):
        build(write_jsonl(tmp_path / "bad.jsonl", [PAGES[0], {"title": "x"}]), tmp_path / "pages.sqlite")
    assert Knowledge(str(tmp_path / "pages.sqlite")).pages == 3


def test_what_is_no_knowledge_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Knowledge(str(tmp_path / "none.jsonl"))
    (tmp_path / "x.sqlite").write_text("no database " * 100)
    with pytest.raises(UserError, match="cannot be read"):
        Knowledge(str(tmp_path / "x.sqlite"))


# Verifiers


def test_word_recall_is_the_share_of_content_words():
    claim = Claim("Ada", "Ada was a poet in Paris", ("Ada wrote.", "Her father was a poet."))
    assert WordRecall().support([claim]) == [pytest.approx(2 / 3)]
    assert WordRecall().support([Claim("Ada", "was it?", ("x",)), Claim("Ada", "Ada", ())]) == [0.0, 0.0]


def test_sentence_support_wants_the_words_close_together():
    near = ("She painted boats. He sold fish. A third sentence stands here.",)
    far = ("She painted houses. Nothing here. Nothing there. Boats are old.",)
    fact = "Ada painted boats"
    close, apart = SentenceSupport().support([Claim("Ada", fact, near), Claim("Ada", fact, far)])
    assert close == pytest.approx(1.0)
    assert apart == pytest.approx(0.5)
    assert WordRecall().support([Claim("", "painted boats", far)]) == [1.0]


def test_two_neighbouring_sentences_support_a_fact_together_and_three_do_not():
    passage = ("She painted often. Boats were many. Others sold fish.",)
    claims = [Claim("Ada", "Ada painted boats", passage), Claim("Ada", "Ada painted fish", passage)]
    assert SentenceSupport().support(claims) == [pytest.approx(1.0), pytest.approx(0.5)]


def test_sentence_support_by_hand():
    """Two sentences; df(red) = 2, df(ball) = 1; the fact's third word is nowhere."""
    sentences = ("A red ball. A red house.",)
    weight = lambda df: math.log(1 + (2 - df + 0.5) / (df + 0.5))  # noqa: E731
    expected = (weight(2) + weight(1)) / (weight(2) + weight(1) + weight(0))
    assert SentenceSupport().support([Claim("T", "red balls glow", sentences)]) == [pytest.approx(expected)]


class Model:
    """Remembers its prompts and answers from lists."""

    name = "model"

    def __init__(self, chosen=(), texts=()):
        self.chosen, self.texts, self.prompts = list(chosen), list(texts), []

    def choose(self, prompts, choices):
        self.prompts += prompts
        assert choices == ("True", "False")
        return self.chosen[: len(prompts)]

    def complete(self, prompts, max_tokens):
        self.prompts += prompts
        return self.texts[: len(prompts)]

    def notes(self):
        return ["a note"]


def test_a_language_model_verifies_with_factscores_prompt():
    model = Model([[0.9, 0.1], None])
    verifier = LanguageModelVerifier(model)
    claims = [Claim("Ada", "Ada was a poet.", ("one", "two")), Claim("Ada", "x", ())]
    assert verifier.support(claims) == [0.9, None]
    assert model.prompts[0][0]["content"] == (
        "Answer the question about Ada based on the given context.\n\nTitle: Ada\nText: one\n\nTitle: Ada\n"
        "Text: two\n\nInput: Ada was a poet. True or False?\nOutput:"
    )
    assert verifier.notes() == ["a note"]


# Splitting and abstaining


def test_sentences_are_facts():
    text = "Dr. Ada Lovelace was born on Dec. 10, 1815. She wrote a program! Did she?"
    assert SentenceSplitter().split(text)[:2] == ["Dr. Ada Lovelace was born on Dec. 10, 1815.", "She wrote a program!"]
    assert SentenceSplitter().split("") == []


def test_a_language_models_list_is_read_and_a_sentence_without_one_stays_whole():
    model = Model(texts=["- Ada wrote.\n-  Ada lived. \nnot a fact", None])
    assert LanguageModelSplitter(model).split("Ada wrote and lived. She died.") == [
        "Ada wrote.",
        "Ada lived.",
        "She died.",
    ]
    asked = model.prompts[0][0]["content"]
    assert asked.endswith("Please breakdown the following sentence into independent facts: Ada wrote and lived.\n")


@pytest.mark.parametrize(
    ("output", "abstained"),
    [
        (None, True),
        ("  ", True),
        ("I'm sorry, I do not know her.", True),
        ("I\u2019m sorry, no.", True),
        ("Could you provide more context?", True),
        ("I could not find any information about her.", True),
        ("Ada was born in London.", False),
        ("She said I'm sorry.", False),
    ],
)
def test_responses_that_decline_are_known(output, abstained):
    assert abstains(output) is abstained


# Scores


def atoms(supported, total):
    return [{"atom": str(i), "is_supported": i < supported} for i in range(total)]


def test_scores_by_hand():
    found = factscore([atoms(3, 4), atoms(12, 12), None, atoms(5, 10)], gamma=10)
    penalised = [0.75 * math.exp(1 - 10 / 4), 1.0, 0.5]
    assert found["score"].value == pytest.approx(sum(penalised) / 3)
    assert found["init_score"].value == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert found["respond_ratio"].value == 0.75
    assert found["num_facts_per_response"].value == pytest.approx(26 / 3)
    assert found["score"].low <= found["score"].value <= found["score"].high
    assert factscore([atoms(3, 4)], gamma=0)["score"].value == 0.75


def test_a_fact_without_a_verdict_counts_neither_way():
    decided = [*atoms(1, 2), {"atom": "?", "is_supported": None}]
    assert factscore([decided], gamma=0)["init_score"].value == 0.5


class Known(Verifier):
    """Supports what a list holds; no word on what holds a question mark."""

    threshold = 0.5

    def __init__(self, facts: str = "born"):
        self.facts = facts

    def support(self, claims):
        return [None if "?" in c.fact else float(self.facts in c.fact) for c in claims]


def test_the_command_writes_factscores_format(tmp_path, pages, capsys):
    outputs = write_jsonl(
        tmp_path / "outputs.jsonl",
        [
            {"topic": "Ada Lovelace", "output": "Ada was born in London. Ada painted."},
            {"topic": "Grace Hopper", "output": "I'm sorry, I do not know."},
            {"topic": "Grace Hopper", "output": "She was born. Was she?"},
            {"topic": "Nobody", "output": "Who was born?"},
        ],
    )
    main([
        "evaluate", "--evaluation", "lrlhf.evaluation.FactualPrecision", "--evaluation.outputs", outputs,
        "--evaluation.knowledge", pages, "--evaluation.verifier", f"{__name__}.Known", "--evaluation.gamma", "0",
        "--to", str(tmp_path / "to"),
    ])  # fmt: skip
    written = json.loads((tmp_path / "to/factscore.json").read_text())
    assert written["decisions"] == [
        [{"atom": "Ada was born in London.", "is_supported": True}, {"atom": "Ada painted.", "is_supported": False}],
        None,
        [{"atom": "She was born.", "is_supported": True}, {"atom": "Was she?", "is_supported": None}],
    ]
    assert written.keys() == {"score", "init_score", "respond_ratio", "num_facts_per_response", "decisions"}
    assert written["score"] == pytest.approx((0.5 + 1) / 2)
    assert written["respond_ratio"] == pytest.approx(2 / 3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 topics have no page" in printed
    assert "1 of 4 facts got no verdict" in printed


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"output": "x"}, "row 2: expected a topic and an output, got output"),
        ({"topic": "x"}, "row 2: expected a topic and an output, got topic"),
        ({"topic": "x", "output": 3}, "row 2: expected a topic and an output"),
        (["x"], "row 2: expected a topic and an output, got list"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, pages, row, sentence):
    outputs = write_jsonl(tmp_path / "o.jsonl", [{"topic": "a", "output": "b"}, row])
    with pytest.raises(UserError, match=sentence):
        FactualPrecision(outputs, pages, Known()).run(tmp_path)


def test_empty_files_and_foreign_topics_are_refused(tmp_path, pages):
    with pytest.raises(UserError, match="holds no rows"):
        FactualPrecision(write_jsonl(tmp_path / "o.jsonl", []), pages, Known()).run(tmp_path)
    with pytest.raises(UserError, match="has no page of any topic"):
        FactualPrecision(write_jsonl(tmp_path / "p.jsonl", [{"topic": "a", "output": "b"}]), pages, Known()).run(
            tmp_path
        )


def test_surprise_by_hand():
    """Words: response cat dog; samples cat, cat bird. Counts cat 3, dog 1, bird 1; with one added: 4, 2, 2 of 8."""
    expected = (-math.log(4 / 8) - math.log(2 / 8)) / 2
    assert sample_surprise("a cat, the dog", ["cat", "cat bird"]) == pytest.approx(expected)


def test_responses_that_samples_repeat_surprise_less(tmp_path):
    rows = [
        {"topic": "a", "output": "born in Paris", "samples": ["born in Paris"] * 3},
        {"topic": "b", "output": "born in Paris", "samples": ["lived at Rome", "died near Oslo", "fled to Bern"]},
    ]
    SampleAgreement(write_jsonl(tmp_path / "s.jsonl", rows)).run(tmp_path)
    agreeing, other = (row["surprise"] for row in json.loads((tmp_path / "agreement.json").read_text()))
    assert agreeing < other
    with pytest.raises(UserError, match="row 1: expected a list of samples"):
        SampleAgreement(write_jsonl(tmp_path / "t.jsonl", [{"topic": "a", "output": "b"}])).run(tmp_path)
