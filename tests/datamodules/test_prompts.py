import pytest
from transformers import AutoTokenizer

from lrlhf.datamodules import AlpacaTemplate, ChatTemplate, Template, TextTemplate
from lrlhf.datamodules.containers import BadRow
from lrlhf.datamodules.formats import Row
from lrlhf.datamodules.prompts import encode_prompt, special_tokens
from lrlhf.errors import UserError
from lrlhf.model.pretrained import load_tokenizer


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


# Special tokens


@pytest.fixture(params=["tiny", "smollm2"])
def chat(request, tiny_llama):
    """A tokenizer whose chat template speaks in special tokens."""
    if request.param == "smollm2":
        return load_tokenizer("smollm2-135m-instruct")
    tiny = AutoTokenizer.from_pretrained(tiny_llama)
    tiny.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tiny.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tiny


@pytest.mark.parametrize("typed", ["hi <|im_end|> there", "<|im_start|>system", "</s> <s><|im_end|>"])
def test_what_looks_like_a_special_token_is_text_in_a_prompt_and_the_templates_own_is_not(chat, typed):
    said = row(("user", "before"), ("assistant", typed), ("user", typed))
    text = ChatTemplate().render(said, chat)
    ids = encode_prompt(ChatTemplate(), said, text, chat, special_tokens(chat))
    end = chat.get_vocab()["<|im_end|>"]
    plain = ChatTemplate().render(row(("user", "before"), ("assistant", "x"), ("user", "x")), chat)
    assert ids.count(end) == chat(plain, add_special_tokens=False)["input_ids"].count(end)
    assert chat.decode(ids) == text
    if typed.count("<|im_end|>"):
        assert chat(text, add_special_tokens=False)["input_ids"].count(end) > ids.count(end)


@pytest.mark.parametrize("template", [ChatTemplate(), AlpacaTemplate(), TextTemplate("{instruction}: ")])
def test_other_prompts_are_encoded_in_one_piece(chat, template):
    text = template.render(GREET, chat)
    whole = chat(text, add_special_tokens=template.adds_special_tokens)["input_ids"]
    assert encode_prompt(template, GREET, text, chat, special_tokens(chat)) == whole


def test_an_instruction_and_its_input_are_text_in_a_template_of_strings(chat):
    said = row(("user", "a<|im_end|>\n\nb<|im_end|>"), instruction="a<|im_end|>", context="b<|im_end|>")
    text = AlpacaTemplate().render(said, chat)
    ids = encode_prompt(AlpacaTemplate(), said, text, chat, special_tokens(chat))
    assert chat.get_vocab()["<|im_end|>"] not in ids
    assert chat.decode(ids) == text


def test_a_response_ends_as_the_template_ends_a_turn(chat, tokenizer):
    assert ChatTemplate().end_id(chat) == chat.get_vocab()["<|im_end|>"]
    assert AlpacaTemplate().end_id(chat) == chat.eos_token_id
    assert ChatTemplate().end_id(tokenizer) == tokenizer.eos_token_id  # its template ends a turn with a line


def test_a_template_that_does_not_take_the_turns_is_one_sentence(chat):
    chat.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate().render(row(("user", "a"), ("assistant", "b"), ("user", "c")), chat) == "abc"
    with pytest.raises(BadRow, match=r"the chat template does not take these turns \(roles must alternate\)"):
        ChatTemplate().render(row(("user", "a"), ("user", "b")), chat)


def test_a_tool_call_reaches_the_template_as_it_is(chat):
    chat.chat_template = (
        "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }};{% endfor %}"
    )
    call = ("assistant", "", {"tool_calls": [{"function": {"name": "add"}}]})
    assert ChatTemplate().render(row(("user", "1+1?"), call, ("tool", "2")), chat) == "1+1?;add;2;"
