"""How a reward function is called: what it may ask for, pools and time-outs, and whose fault a failure is."""

import asyncio
import threading
import time

import pytest
import torch

import lrlhf
from lrlhf import UserError
from lrlhf.rewards import Reward
from tests.conftest import write_jsonl
from tests.modules.test_ppo_policy import fit

PROMPTS, RESPONSES = ["p1", "p2", "p3"], ["one", "two words", "and three words"]
ROWS = [{"answer": "1", "level": 3}, {"answer": "2"}, {"answer": "3"}]
PLACES = ["train.jsonl, row 4", "train.jsonl, row 7", "train.jsonl, row 9"]


def scores(function, **settings) -> list[float]:
    reward = Reward(function, **settings)
    return reward.scores(PROMPTS, RESPONSES, ROWS, [1, 2, 3], PLACES).tolist()


def test_two_lists_of_texts_are_enough():
    assert scores(lambda prompts, responses: [len(r) for r in responses]) == [3, 9, 15]


def test_columns_come_by_name_and_counts_of_tokens_too():
    def right(prompts, responses, answer, token_counts):
        return torch.tensor([float(a) * 10 + n for a, n in zip(answer, token_counts, strict=True)])

    assert scores(right) == [11, 22, 33]


def test_all_columns_that_every_row_has_come_with_double_stars():
    def greedy(prompts, responses, **columns):
        assert columns == {"answer": ["1", "2", "3"], "token_counts": [1, 2, 3]}
        return [0, 0, 0]

    assert scores(greedy) == [0, 0, 0]


def test_a_column_that_may_lack_has_a_default():
    assert scores(lambda prompts, responses, test=None: [1.0 if test is None else 0.0] * 3) == [1, 1, 1]


def test_other_names_for_prompts_and_responses_will_do():
    assert scores(lambda asked, said: [float(s.startswith("one")) for s in said]) == [1, 0, 0]


def test_an_object_with_call_is_a_function():
    class Judge:
        def __call__(self, prompts, responses, answer):
            return [float(a) for a in answer]

    assert Reward(Judge()).name == "Judge"
    assert scores(Judge()) == [1, 2, 3]


def test_an_async_function_is_awaited_row_by_row_together():
    under_way, most = 0, 0

    async def slow(prompts, responses, answer):
        nonlocal under_way, most
        assert len(prompts) == len(responses) == len(answer) == 1
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return [float(answer[0])]

    assert scores(slow) == [1, 2, 3]
    assert most == 3
    most = 0
    assert scores(slow, workers=2) == [1, 2, 3]
    assert most == 2


def test_workers_call_a_slow_function_row_by_row_in_threads():
    together = threading.Barrier(3, timeout=10)

    def slow(prompts, responses, answer):
        together.wait()
        return [float(answer[0])]

    assert scores(slow, workers=3) == [1, 2, 3]


def test_inside_a_running_event_loop_it_works_as_well():
    async def notebook():
        return scores(lambda prompts, responses: [1.0], workers=2)

    assert asyncio.run(notebook()) == [1, 1, 1]


@pytest.mark.parametrize("kind", ["async", "threads", "batch"])
def test_a_call_that_takes_too_long_is_named_with_its_row(kind):
    def stuck(prompts, responses):
        time.sleep(30 if "two words" in responses else 0)
        return [0.0] * len(responses)

    async def waits(prompts, responses):
        await asyncio.sleep(30 if "two words" in responses else 0)
        return [0.0]

    function, settings = {"async": (waits, {}), "threads": (stuck, {"workers": 3}), "batch": (stuck, {})}[kind]
    start = time.monotonic()
    where = "a batch of 3 rows that begins with train.jsonl, row 4" if kind == "batch" else "train.jsonl, row 7"
    with pytest.raises(UserError, match=f"{function.__name__} took more than 0.2 seconds at {where}"):
        scores(function, timeout=0.2, **settings)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("settings", [{}, {"workers": 2}])
def test_a_failure_names_the_function_the_row_and_the_reason(settings):
    def picky(prompts, responses, answer):
        return [1 / (int(a) - 2) for a in answer]

    says = "the reward function picky failed at train.jsonl, row 7: ZeroDivisionError: division by zero"
    with pytest.raises(UserError, match=says):
        scores(picky, **settings)


def test_a_failure_of_all_rows_together_says_so():
    def crowded(prompts, responses):
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(UserError, match="crowded failed at a batch of 3 rows that begins with train.jsonl, row 4"):
        scores(crowded)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda: [0.0], "must take prompts and responses; it takes neither"),
        (lambda prompts: [0.0], "must take prompts and responses; it takes prompts"),
        (
            lambda prompts, responses, solution: [0.0],
            "asks for the column 'solution', which the data does not have; be",
        ),
        (lambda prompts, responses, level: [0.0], "asks for the column 'level', which the data does not have in every"),
        (lambda prompts, responses: [0.0, 1.0], r"returned shape \(2,\) for 3 responses"),
        (lambda prompts, responses: "good", "returned str; it must return a number a response"),
        (lambda prompts, responses: None, "returned NoneType; it must return a number a response"),
    ],
)
def test_a_function_that_does_not_fit_is_refused_in_a_sentence(function, says):
    with pytest.raises(UserError, match=says):
        scores(function)


def test_a_weight_must_be_finite():
    with pytest.raises(UserError, match="weight of the reward function"):
        Reward(lambda prompts, responses: [0.0], weight=float("inf"))


def brevity(prompts, responses):
    return [-len(r) / 10 for r in responses]


def starts(prompts, responses, answer):
    return [float(r.startswith(a)) for r, a in zip(responses, answer, strict=True)]


def picky(prompts, responses, answer):
    if "2" in answer:
        raise ValueError("no 2")
    return [0.0] * len(responses)


def fit_with(functions, tmp_path, tiny_llama, columns=("answer",)) -> list[dict[str, float]]:
    """A short fit of RLOO with these rewards; what each iteration logged."""
    rows = [{"instruction": f"say {i}", **dict.fromkeys(columns, str(i))} for i in range(4)]
    data = lrlhf.AlpacaDataModule(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        task="prompts",
        tokenizer=tiny_llama,
        template=lrlhf.TextTemplate("{instruction}"),
        batch_size=8,
        responses_per_prompt=4,
    )
    policy = lrlhf.RLOO(
        base_model=tiny_llama,
        lora=lrlhf.LoRA(r=2),
        reward_function=functions,
        updates=lrlhf.Updates(minibatch_size=8, inner_epochs=1),
        sampling=lrlhf.Sampling(max_new_tokens=4),
    )
    return fit(tmp_path, policy, data).metrics


def test_several_rewards_are_weighed_and_each_is_logged(tmp_path, tiny_llama):
    for found in fit_with([Reward(brevity, weight=0.5), Reward(starts, weight=2.0)], tmp_path, tiny_llama):
        parts = 0.5 * found["train/score/brevity"] + 2.0 * found["train/score/starts"]
        assert found["train/score"] == pytest.approx(parts, abs=1e-6)
        assert found["train/score/brevity"] < 0


def test_a_column_that_the_data_lacks_is_refused_before_anything_is_sampled(tmp_path, tiny_llama, monkeypatch):
    def asked(prompts, responses, answer):
        return [0.0] * len(responses)

    monkeypatch.setattr(lrlhf.RLOO, "rollout", lambda *_: pytest.fail("it sampled"))
    with pytest.raises(UserError, match=r"asked .*answer"):
        fit_with(asked, tmp_path, tiny_llama, columns=())


def test_a_failure_in_a_fit_names_file_and_row(tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"picky.*rows\.jsonl, row 3.*no 2"):
        fit_with([Reward(picky, workers=2)], tmp_path, tiny_llama)
