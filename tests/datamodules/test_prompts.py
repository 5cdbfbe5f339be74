import pytest
from transformers import AutoTokenizer

from lrlhf.datamodules import AlpacaTemplate, ChatTemplate, Template, TextTemplate
from lrlhf.datamodules.formats import BadRow, Row
from lrlhf.errors import UserError


def row(*turns: tuple[str, str], instruction: str = "", context: str = "") -> Row:
    return Row(turns, instruction or turns[-1][1], context, (), 0.0, "here")


ADD = row(("user", "Add.\n\n1 and 2"), instruction="Add.", context="1 and 2")
GREET = row(("user", "Say hi."))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_alpaca_without_input():
    assert AlpacaTemplate().render(GREET, None) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )


def test_alpaca_with_input():
    assert AlpacaTemplate().render(ADD, None) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    )


def test_braces_in_a_row_are_text():
    braces = row(("user", "{x} {input} {{"))
    assert TextTemplate("<{instruction}>").render(braces, None) == "<{x} {input} {{>"


def test_text_with_two_strings():
    template = TextTemplate("Q: {instruction}\n", "Q: {instruction} ({input})\n")
    assert template.render(GREET, None) == "Q: Say hi.\n"
    assert template.render(ADD, None) == "Q: Add. (1 and 2)\n"


def test_text_with_one_string_joins_the_input():
    assert TextTemplate("Q: {instruction}\n").render(ADD, None) == "Q: Add.\n\n1 and 2\n"


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        (("hi",), "template.without_input must use {instruction}"),
        (("{instruction} {input}",), "template.without_input must use {instruction}"),
        (("{instruction}", "{input}"), "template.with_input must use {instruction}"),
        (("{instruction} {name}",), "it uses ['instruction', 'name']"),
        (("{instruction",), "template.without_input is no format string"),
    ],
)
def test_a_string_that_cannot_be_filled_is_refused(strings, words):
    with pytest.raises(UserError) as error:
        TextTemplate(*strings)
    assert words in str(error.value)


@pytest.mark.parametrize("template", [AlpacaTemplate(), TextTemplate("{instruction}")])
@pytest.mark.parametrize(
    "turns", [[("system", "s"), ("user", "u")], [("user", "a"), ("assistant", "b"), ("user", "c")]]
)
def test_a_single_turn_template_refuses_more(template, turns):
    with pytest.raises(BadRow, match="need data.template: lrlhf.datamodules.ChatTemplate"):
        template.render(row(*turns), None)


@pytest.mark.parametrize(
    "turns",
    [[("user", "u")], [("system", "s"), ("user", "u")], [("user", "a"), ("assistant", "b"), ("user", "c")]],
)
def test_chat_is_what_the_tokenizer_itself_makes_of_the_turns(tokenizer, turns):
    text = ChatTemplate().render(row(*turns), tokenizer)
    assert text == "".join(f"<{who}>{what}\n" for who, what in turns) + "<assistant>"
    ids = tokenizer.apply_chat_template(
        [{"role": who, "content": what} for who, what in turns], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer(text, add_special_tokens=ChatTemplate.adds_special_tokens)["input_ids"] == ids


def test_chat_without_a_template_in_the_tokenizer_is_refused(tiny_llama):
    bare = AutoTokenizer.from_pretrained(tiny_llama)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template; use AlpacaTemplate or TextTemplate"):
        ChatTemplate().render(GREET, bare)


def test_templates_that_render_differently_have_different_fingerprints():
    templates = [
        AlpacaTemplate(),
        ChatTemplate(),
        TextTemplate("{instruction}"),
        TextTemplate("{instruction}\n"),
        TextTemplate("{instruction}", "{instruction}\n{input}"),
    ]
    assert len({template.fingerprint for template in templates}) == len(templates)


def test_a_fingerprint_depends_on_the_strings_alone():
    assert TextTemplate("a{instruction}").fingerprint == TextTemplate("a{instruction}").fingerprint


def test_a_template_of_ones_own_is_two_methods():
    class Shout(Template):
        signature = "shout"

        def render(self, row, tokenizer):
            return row.instruction.upper()

    assert Shout().render(GREET, None) == "SAY HI."
    assert len(Shout().fingerprint) == 16
