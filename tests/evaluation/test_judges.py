"""Judges: the order of outputs, ties, missing answers, and what each kind prefers."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from lrlhf.errors import UserError
from lrlhf.evaluation import FunctionJudge, LanguageModelJudge, LocalModel, RecordedJudge, RewardModelJudge
from lrlhf.evaluation.head_to_head import measure
from lrlhf.evaluation.judges import Judge, annotate, higher, read_ranking
from lrlhf.evaluation.pairs import Pair
from tests.modules.helpers import train_reward, train_sft


def pairs(n, *, better=lambda i: i % 2):
    """Pairs whose better output is the longer one, second where `better` says so."""
    return [Pair(f"prompt {i}", *(("bad", "good!") if better(i) else ("good!", "bad"))) for i in range(n)]


class Biased(Judge):
    """Knows the better output, but says so only as often as `knows`; else it takes the first it sees."""

    def __init__(self, knows=0.0, missing=()):
        self.name, self.knows, self.missing = "biased", knows, missing
        self.seen: list[Pair] = []

    def prefer(self, pairs):
        self.seen += pairs
        right = [1.0 if p.output_1 == "good!" else 2.0 for p in pairs]
        said = [self.knows * r + (1 - self.knows) * 1.0 for r in right]
        return [None if (p.instruction, p.output_1) in self.missing else s for p, s in zip(pairs, said, strict=True)]


def test_a_position_bias_is_cancelled_by_both_orders():
    made = pairs(40, better=lambda i: i < 30)
    alone = [Biased(0.2).prefer([p])[0] - 1 for p in made]
    assert sum(alone) / 40 < 0.2  # the model is better in 75 % of the prompts, and loses by standing second
    both = measure(annotate(Biased(0.2), made))
    assert both["win_rate"].value == pytest.approx(0.5 + 0.2 * 0.25)
    assert both["discrete_win_rate"].value == pytest.approx(0.75)
    blind = measure(annotate(Biased(0.0), made))
    assert blind["win_rate"].value == 0.5
    assert blind["swap_consistency"].value == 0


def test_both_orders_show_each_pair_twice_and_hash_once_half_of_them_swapped():
    judge, made = Biased(1.0), pairs(200)
    annotate(judge, made)
    assert len(judge.seen) == 400
    judge.seen = []
    rows = annotate(judge, made, "hash")
    assert len(judge.seen) == 200
    swapped = sum(seen.output_1 != p.output_1 for seen, p in zip(judge.seen, made, strict=True))
    assert 70 < swapped < 130
    assert [row.preference for row in rows] == [2.0 if i % 2 else 1.0 for i in range(200)]
    again = Biased(1.0)
    annotate(again, made, "hash")
    assert again.seen == judge.seen


def test_equal_outputs_are_a_tie_that_nobody_is_asked_about():
    judge = Biased(1.0)
    rows = annotate(judge, [Pair("a", "same", "same"), *pairs(1)])
    assert rows[0].preference == 1.5
    assert len(judge.seen) == 2


def test_a_pair_without_an_answer_in_one_order_has_no_preference_and_is_kept():
    rows = annotate(Biased(1.0, missing={("prompt 1", "bad")}), pairs(3))
    assert [row.preference for row in rows] == [1.0, None, 1.0]
    assert rows[1].answers == (None, 2.0)


def test_a_function_judges_by_its_scores_without_regard_to_order():
    calls = []

    def length(prompts, responses):
        calls.append(len(responses))
        return torch.tensor([math.nan if r == "nan" else float(len(r)) for r in responses])

    rows = annotate(
        FunctionJudge(length), [Pair("a", "xx", "y"), Pair("b", "x", "yy"), Pair("c", "x", "y"), Pair("d", "nan", "y")]
    )
    assert [row.preference for row in rows] == [1.0, 2.0, 1.5, None]
    assert calls == [4, 4]


def test_recorded_annotations_are_found_in_either_order(tmp_path):
    recorded = [
        {"instruction": "a", "output_1": "x", "output_2": "y", "preference": 1.2, "annotator": "people"},
        {"instruction": "b", "output_1": "x", "output_2": "y", "preference": None, "annotator": "people"},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(recorded))
    judge = RecordedJudge(str(tmp_path / "annotations.json"))
    asked = [Pair("a", "x", "y"), Pair("a", "y", "x"), Pair("b", "x", "y"), Pair("c", "x", "y")]
    assert judge.prefer(asked) == [1.2, 1.8, None, None]
    assert judge.name == "people"


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]", 1.0),
        ("  [{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]\n", 2.0),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_1', 'rank': 3}, {'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_1'}]", None),
        ("model_1 is better", None),
        ("__import__('os').system('true')", None),
        ("[[[[", None),
        ("", None),
        ("5", None),
    ],
)
def test_a_ranking_is_read_or_it_is_no_answer(text, rank):
    assert read_ranking(text) == rank


class Scripted:
    """A language model that remembers its prompts."""

    name = "scripted"

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def complete(self, prompts, max_tokens):
        self.prompts += prompts
        return self.answers[: len(prompts)]

    def choose(self, prompts, choices):
        self.prompts += prompts
        self.choices = choices
        return self.answers[: len(prompts)]

    def notes(self):
        return ["a note"]


def test_probabilities_become_preferences_and_texts_go_into_the_prompt_as_they_are():
    model = Scripted([[0.75, 0.25], None])
    judge = LanguageModelJudge(model, choices=("A", "B"))
    hostile = "say {output_2} or {choice_1} \\1 {instruction}"
    assert judge.prefer([Pair(hostile, "first", "second"), Pair("b", "x", "y")]) == [1.25, None]
    system, user = model.prompts[0]
    assert system["role"] == "system"
    assert system["content"].startswith("You are a highly efficient assistant")
    assert f'"instruction": """{hostile}"""' in user["content"]
    assert (
        user["content"].index('"A"')
        < user["content"].index("first")
        < user["content"].index('"B"')
        < user["content"].index("second")
    )
    assert user["content"].endswith("## Best Model Identifier")
    assert judge.notes() == ["a note"]


def test_the_prompts_are_those_of_the_alpaca_eval_package():
    alpaca_eval = importlib.util.find_spec("alpaca_eval")
    folder = f"{alpaca_eval.submodule_search_locations[0]}/evaluators_configs"
    for answer, name in (
        ("rank", "alpaca_eval_gpt4/alpaca_eval.txt"),
        ("choose", "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"),
    ):
        model = Scripted([None])
        LanguageModelJudge(model, answer=answer).prefer([Pair("Why?", "one", "two")])
        text = Path(folder, name).read_text()
        for place, value in (("{instruction}", "Why?"), ("{output_1}", "one"), ("{output_2}", "two")):
            text = text.replace(place, value)
        theirs = [part.partition("\n")[2].strip() for part in text.split("<|im_start|>") if part]
        theirs = [part.removesuffix("<|im_end|>").strip() for part in theirs]
        assert [message["content"].strip() for message in model.prompts[0]] == theirs


def test_a_prompt_of_ones_own_needs_its_places(tmp_path):
    (tmp_path / "p.txt").write_text("{instruction} {output_1}")
    with pytest.raises(UserError, match=r"it lacks \{output_2\}"):
        LanguageModelJudge(Scripted([]), prompt=str(tmp_path / "p.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        LanguageModelJudge(Scripted([]), prompt=str(tmp_path / "none.txt"))


def test_a_local_model_weighs_choices_as_transformers_does(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    chats = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": text}] for text in ("short", "much longer")
    ]
    local = LocalModel(tiny_llama, dtype="float32")
    chosen = local.choose(chats, ("A", "B"))
    for chat, ours in zip(chats, chosen, strict=True):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["A", "B"])]
        assert ours == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        greedy = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert local.complete([chat], 5) == [tokenizer.decode(greedy, skip_special_tokens=True)]


def test_a_prompt_that_does_not_fit_has_no_answer_and_is_counted(tiny_llama):
    local = LocalModel(tiny_llama, dtype="float32")
    chats = [[{"role": "user", "content": text}] for text in ("x" * 600, "short")]
    assert [answer is None for answer in local.choose(chats, ("A", "B"))] == [True, False]
    assert local.complete(chats[:1], 5) == [None]
    assert "2 prompts are longer than the 512 tokens" in local.notes()[0]


def test_choices_that_begin_alike_are_refused(tiny_llama):
    with pytest.raises(UserError, match="do not differ in their first tokens"):
        LocalModel(tiny_llama, dtype="float32").choose([[{"role": "user", "content": "x"}]], ("AB", "AC"))


def test_a_reward_model_judges_by_the_scores_that_it_gives_in_training(tiny_llama, data_files, tmp_path):
    train_sft(tiny_llama, data_files, tmp_path / "sft")
    module = train_reward(tiny_llama, data_files, tmp_path / "reward", sft=str(tmp_path / "sft/handover"))
    made = [Pair(f"sun {i}", f"yes {i}", "no " * (i + 1)) for i in range(6)]
    judge = RewardModelJudge(str(tmp_path / "reward"), batch_size=4)
    ours = judge.prefer(made)
    tokenizer, template = module.tokenizer, judge.system.template
    from lrlhf.types import Sequences

    for pair, preference in zip(made, ours, strict=True):
        scores = []
        for text in (pair.output_1, pair.output_2):
            prompt = tokenizer(
                template.without_input.format(instruction=pair.instruction), return_tensors="pt"
            ).input_ids
            answer = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
            ones = [torch.ones_like(x, dtype=torch.bool) for x in (prompt, answer)]
            with torch.no_grad(), module.backbone.role("reward"):
                scores.append(float(module.backbone.scores(Sequences(prompt, ones[0], answer, ones[1]))))
        assert preference == higher(*scores)
    with pytest.raises(UserError, match="is no reward model"):
        RewardModelJudge(str(tmp_path / "sft/handover")).prefer(made)
