"""SampleLog: what people read of a rollout, and what a resume leaves of it."""

import json

import pytest
import torch

from lrlhf import SampleLog
from lrlhf.types import Rollout
from tests.modules.helpers import ppo, prompt_data, trainer
from tests.modules.test_ppo_policy import Recorder

PROMPTS, RESPONSES = ["Rain?", 'Tea or "milk"?\n', "<b>"], ["yes", "té", ""]


class Policy:
    """A policy as far as the log asks it: every token id is a character."""

    iteration = 7

    def decode(self, ids, mask):
        return ["".join(map(chr, row[keep].tolist())) for row, keep in zip(ids, mask, strict=True)]


class Trainer:
    """A trainer as far as the log looks at it."""

    def __init__(self, folder, *, is_global_zero=True, sanity_checking=False, training=True):
        self.default_root_dir, self.is_global_zero = str(folder), is_global_zero
        self.sanity_checking, self.training, self.testing = sanity_checking, training, False


def characters(texts: list[str], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as ids and mask, with X in the padding."""
    width = max(map(len, texts))
    rows = [text.rjust(width, "\0") if left else text.ljust(width, "\0") for text in texts]
    ids = torch.tensor([[ord(c) for c in row] for row in rows])
    return ids.masked_fill(ids == 0, ord("X")), ids != 0


def rollout() -> Rollout:
    text = *characters(PROMPTS, left=True), *characters(RESPONSES, left=False)
    zeros = torch.zeros(text[-1].shape)
    more = {"parts": torch.zeros(3, 0), "groups": torch.arange(3)}
    return Rollout(*text, logprobs=zeros, scores=torch.tensor([1.25, -2.0, 1 / 3]), **more)


REWARDS = torch.tensor([[-0.25, 0.0, 1.25], [0.5, -2.0, 0.0], [1 / 3, 0.0, 0.0]])


def write(log: SampleLog, where, rewards=REWARDS, **trainer) -> None:
    log.on_rollout_end(Trainer(where, **trainer), Policy(), rollout(), rewards)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_line_is_a_response_with_its_prompt_its_score_and_the_sum_of_its_rewards(tmp_path):
    write(SampleLog(), tmp_path)
    whole = {"stage": "train", "iteration": 7}
    assert lines(tmp_path) == [
        {**whole, "prompt": PROMPTS[0], "response": "yes", "score": 1.25, "reward": 1.0},
        {**whole, "prompt": PROMPTS[1], "response": "té", "score": -2.0, "reward": -1.5},
        {**whole, "prompt": PROMPTS[2], "response": "", "score": 0.3333, "reward": 0.3333},
    ]


@pytest.mark.parametrize(("count", "written"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_of_every_rollout_the_first_responses_are_kept(tmp_path, count, written):
    log = SampleLog(count)
    write(log, tmp_path / "run")
    write(log, tmp_path / "run", training=False)
    found = lines(tmp_path / "run")
    assert [row["response"] for row in found] == 2 * RESPONSES[:written]
    assert [row["stage"] for row in found] == ["train"] * written + ["val"] * written


def test_neither_another_process_nor_a_sanity_check_writes(tmp_path):
    write(SampleLog(), tmp_path, is_global_zero=False)
    write(SampleLog(), tmp_path, sanity_checking=True)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_drops_what_was_written_after_the_checkpoint_and_goes_on_as_if_it_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = SampleLog()
    for factor in (1, 2, 3):
        write(log, whole, factor * REWARDS)
    log = SampleLog()
    write(log, killed, REWARDS)
    saved = log.state_dict()
    write(log, killed, 99 * REWARDS)
    again = SampleLog()
    again.setup(Trainer(killed), None, "fit")
    again.load_state_dict(saved)
    again.on_train_start(Trainer(killed), None)
    assert len(lines(killed)) == 3
    for factor in (2, 3):
        write(again, killed, factor * REWARDS)
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_new_run_begins_a_new_file_also_with_a_log_that_was_used_before(tmp_path):
    log = SampleLog()
    write(log, tmp_path)
    log.setup(Trainer(tmp_path), None, "fit")
    log.on_train_start(Trainer(tmp_path), None)
    assert lines(tmp_path) == []


def test_another_process_leaves_the_file_alone_at_the_start_of_a_run(tmp_path):
    write(SampleLog(), tmp_path)
    SampleLog().on_train_start(Trainer(tmp_path, is_global_zero=False), None)
    assert len(lines(tmp_path)) == 3


def test_in_a_run_the_lines_are_the_texts_of_its_rollouts(tmp_path, tiny_llama, data_files):
    (tmp_path / "samples.jsonl").write_text("of a run before\n")
    recorder, module = Recorder(), ppo(tiny_llama)
    runner = trainer(tmp_path, callbacks=[SampleLog(3), recorder], limit_train_batches=2, enable_checkpointing=False)
    runner.fit(module, prompt_data(tiny_llama, data_files))
    expected = []
    for iteration, seen in enumerate(recorder.rollouts):
        for row in range(3):
            prompt, response = (
                module.tokenizer.decode(ids[row][mask[row]], skip_special_tokens=True)
                for ids, mask in ((seen.prompt_ids, seen.prompt_mask), (seen.response_ids, seen.response_mask))
            )
            expected.append((iteration, prompt, response, round(float(seen.scores[row]), 4)))
    assert len(expected) == 6
    assert [(x["iteration"], x["prompt"], x["response"], x["score"]) for x in lines(tmp_path)] == expected
