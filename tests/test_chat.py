"""`lrlhf chat`: what is shown is what the models answer, in a terminal and over a pipe."""

import io
import json
import os
import pty
import re
import select
import sys
import time

import pytest

from lrlhf import AlpacaDataModule, Sampling, UserError
from lrlhf.__main__ import main
from lrlhf.chat import Chat
from lrlhf.datamodules.prompts import ChatTemplate
from lrlhf.evaluation.system import System, prompt_row
from tests.export.test_formats import hand_over
from tests.modules.helpers import ppo, prompt_data, train_reward, train_sft, trainer

TEN = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module")
def runs(tiny_llama, data_files, tmp_path_factory) -> dict[str, str]:
    """A PPO run on an SFT and a reward model, which its config names."""
    folder = tmp_path_factory.mktemp("runs")
    train_sft(tiny_llama, data_files, folder / "sft", limit_train_batches=2)
    sft = str(folder / "sft/handover")
    train_reward(tiny_llama, data_files, folder / "reward", sft=sft, limit_train_batches=2)
    reward = str(folder / "reward/handover")
    module = ppo(tiny_llama, lr=0.05, reward_function=None, reward_model=reward, sft=sft)
    data = prompt_data(tiny_llama, data_files)
    assert isinstance(data, AlpacaDataModule)
    trainer(folder / "ppo", limit_train_batches=2).fit(module, data)
    config = {"model": {"init_args": {"reward_model": reward, "sampling": {"max_new_tokens": 10}}}}
    (folder / "ppo/config.yaml").write_text(json.dumps(config))
    return {name: str(folder / name) for name in ("sft", "reward", "ppo")}


def three(runs, **options) -> Chat:
    policy = System(runs["ppo"], **options)
    reference = System(runs["ppo"], role="reference", beside=policy, **options)
    return Chat({"policy": policy, "reference": reference}, System(runs["reward"], beside=policy))


def test_what_streams_is_what_respond_draws_token_by_token(runs):
    system = System(runs["ppo"], sampling=TEN)
    ids = system.encode(prompt_row("sun rain"))
    for seed in range(3):
        grown = list(system.stream(ids, seed=seed))
        assert [grown[-1]] == system.respond([ids], seed=seed)
        assert len(grown) > 2
        assert all(after.startswith(before) for before, after in zip(grown, grown[1:], strict=False))


def test_policy_reference_and_reward_model_share_one_base_and_answer_as_when_alone(runs):
    chat = three(runs)
    *_, record = chat.ask("sun rain")
    systems = [*chat.systems.values(), chat.reward]
    assert len({id(system.backbone) for system in systems}) == 1
    alone = {"policy": System(runs["ppo"]), "reference": System(runs["ppo"], role="reference")}
    row, reward = prompt_row("sun rain"), System(runs["reward"])
    for name, system in alone.items():
        assert record["answers"][name] == system.respond([system.encode(row)], seed=1)[0]
        expected = float(reward.score([row], [record["answers"][name]])[0])
        assert record["scores"][name] == pytest.approx(expected, abs=1e-5)
    assert record["answers"]["policy"] != record["answers"]["reference"]


def test_adapters_of_one_name_that_differ_are_never_shared(runs, tiny_llama, tmp_path):
    """Both have an adapter named sft; on one base the second would silently be the first."""
    policy = System(runs["ppo"])
    other = System(hand_over(tiny_llama, tmp_path / "handover", "reward"), beside=policy)
    assert other.backbone is not policy.backbone
    row = prompt_row("tea")
    assert other.score([row], ["yes"]) == System(other.source).score([row], ["yes"])


def test_turns_are_remembered_where_the_template_takes_several_each_model_by_its_own_answers(runs, tiny_llama):
    chat = Chat({name: System(tiny_llama, template=ChatTemplate(), sampling=TEN) for name in ("a", "b")})
    chat.turns["a"] = [("user", "x"), ("assistant", "y")]
    asked = []
    for name, system in chat.systems.items():
        encode = system.encode
        system.encode = lambda row, name=name, encode=encode: asked.append((name, row.messages)) or encode(row)
    list(chat.ask("z"))
    assert asked == [("a", (("user", "x"), ("assistant", "y"), ("user", "z"))), ("b", (("user", "z"),))]
    assert chat.turns["b"][0] == ("user", "z")
    chat.command("/new")
    assert chat.turns == {"a": [], "b": []}
    single = three(runs)
    list(single.ask("x"))
    assert not single.remembers


def test_commands_change_the_temperature_save_and_refuse_what_they_do_not_know(runs, tmp_path):
    chat = three(runs)
    assert chat.command("/temperature 0") == "Temperature 0."
    first, second = ([*chat.ask("tea")][-1]["answers"] for _ in range(2))
    assert first == second
    for line, sentence in (
        ("/temperature hot", "/temperature takes a number from 0 up, not hot"),
        ("/temperature -1", "/temperature takes a number from 0 up, not -1"),
        ("/save", "/save takes a file"),
        (f"/save {tmp_path}/no/where", "No such file"),
        ("/foo", "there is no command /foo"),
    ):
        with pytest.raises(UserError, match=sentence):
            chat.command(line)
    chat.command(f"/save {tmp_path}/talk.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert saved == chat.records
    assert len(saved) == 2


def test_over_a_pipe_each_line_is_a_prompt_and_each_answer_a_line_of_json(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("tea cat\n\n/temperature x\nroad\n/quit\nnever\n"))
    main(["chat", runs["ppo"], "--beside", "reference"])
    out, error = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["tea cat", "road"]
    assert all(record["answers"].keys() == record["scores"].keys() == {"policy", "reference"} for record in records)
    assert "lrlhf: /temperature takes a number" in error
    with pytest.raises(SystemExit):
        main(["chat", runs["reward"]])
    assert "is a reward model, which scores" in capsys.readouterr().err


def test_in_a_terminal_answers_stream_beside_each_other_with_scores_and_a_history(runs, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "LRLHF_CACHE": str(tmp_path)}
        os.execv(sys.executable, [sys.executable, "-m", "lrlhf", "chat", runs["ppo"], "--beside", "reference"])
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        until = time.monotonic() + 90
        while not re.search(pattern, seen, re.S):
            assert time.monotonic() < until, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536).decode("utf-8", "replace")

    wait_for("stands alone.*> ")
    seen = ""
    os.write(terminal, b"tea cat\n")
    wait_for(r"policy.*reference.*score -?\d.*score -?\d.*> ")
    seen = ""
    os.write(terminal, b"/foo\n")
    wait_for("there is no command /foo.*> ")
    os.write(terminal, b"\x1b[A\x1b[A\n")  # twice up: the first prompt again
    wait_for(r"tea cat.*score -?\d.*score -?\d.*> ")
    os.write(terminal, b"/quit\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "tea cat" in (tmp_path / "chat_history").read_text()
