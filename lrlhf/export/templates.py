"""Prompt templates in the languages of other tools: Jinja for transformers, vLLM and llama.cpp, Go for Ollama.

Each is tried on an instruction and its answer before it is written; one that renders otherwise than the run did is left
out, and said so.
"""

import json
import re
import string
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lrlhf.datamodules.prompts import TextTemplate
from lrlhf.evaluation.system import System, prompt_row

ASKED, ANSWERED, TOLD = "Q7f3 ask", "A7f3 answer", "S7f3 tell"
"""Texts by which the parts of a rendered template are found."""


def chat_template(system: System, *, ends: bool) -> tuple[str | None, list[str]]:
    """A Jinja chat template that gives the tokens which the run trained on.

    Args:
        system: with its tokenizer loaded.
        ends: whether a conversation must end exactly at the token that ends a response.

    Returns:
        The template, None if no tried one is right, and what the reader should know.
    """
    system.backbone  # noqa: B018 loads the tokenizer
    own = _from_text(system) if isinstance(system.template, TextTemplate) else system.tokenizer.chat_template
    closed = "{%- set text -%}" + str(own) + "{%- endset -%}{{ text if add_generation_prompt else text.rstrip() }}"
    for template in (own, closed):
        if template is not None and _renders(system, template, ends):
            notes = []
            if isinstance(system.template, TextTemplate):
                notes.append("The run trained on single instructions: further turns and system messages are new to it.")
            if getattr(system.template, "with_input", None):
                notes.append("Rows with an input use another text than the chat template; see the run's config.")
            return template, notes
    return None, [
        f"The run's prompts ({type(system.template).__name__}) have no chat template that renders them alike; "
        "the tokenizer has none. Render prompts as the run's config says."
    ]


def _from_text(system: System) -> str | None:
    """An instruction and its answer as a TextTemplate renders them; several turns one behind the other.

    llama.cpp's server tries a template on several turns when it starts, so it must take them.
    """
    template: Any = system.template
    parts = []
    for text, name, spec, conversion in string.Formatter().parse(template.without_input):
        parts += [json.dumps(text, ensure_ascii=False)] if text else []
        parts += ["message.content"] if name else []
        if spec or conversion:
            return None
    tokenizer = system.tokenizer
    begins = template.adds_special_tokens and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = "{{- bos_token -}}" if begins else ""
    end = json.dumps(tokenizer.convert_ids_to_tokens(system.end), ensure_ascii=False)
    return (
        f"{start}{{%- for message in messages -%}}"
        f"{{%- if message.role == 'user' -%}}{{{{- {' ~ '.join(parts)} -}}}}"
        f"{{%- elif message.role == 'assistant' -%}}{{{{- message.content ~ {end} -}}}}"
        '{%- else -%}{{- message.content ~ "\\n\\n" -}}{%- endif -%}{%- endfor -%}'
    )


def _renders(system: System, template: str, ends: bool) -> bool:
    """Whether it gives the tokens that the run saw, of a prompt, and of a prompt with its answer."""
    tokenizer = system.tokenizer
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]

    def tokens(**options: Any) -> list[int]:
        return tokenizer.apply_chat_template(chat_template=template, return_dict=False, **options)

    prompt = system.encode(prompt_row(ASKED))
    answer = tokenizer(ANSWERED, add_special_tokens=False)["input_ids"]
    try:
        whole = tokens(conversation=turns)
        right = tokens(conversation=turns[:1], add_generation_prompt=True) == prompt
    except TemplateError:
        return False
    return right and (not ends or whole == [*prompt, *answer, system.end])


def write_modelfile(system: System, folder: Path) -> None:
    """How Ollama runs model.gguf: the prompt of each turn, the tokens that end an answer, and how the run sampled.

    Args:
        system: that was trained.
        folder: in which model.gguf lies.
    """
    sampling, tokenizer = system.sampling, system.tokenizer
    template, told = _go_template(system)
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{told}"""'] if told else []
    lines += [f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(i))}" for i in system.stop_ids.tolist()]
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": 0.0}
    settings |= {"repeat_penalty": 1.0, "num_predict": sampling.max_new_tokens}
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _go_template(system: System) -> tuple[str, str]:
    """The template of one turn in Go, without the begin-of-sequence token, and the default system message."""
    if isinstance(system.template, TextTemplate):
        text = system.template.without_input.format(instruction=ASKED)
        return text.replace(ASKED, "{{ .Prompt }}") + "{{ .Response }}", ""
    tokenizer = system.tokenizer
    user = {"role": "user", "content": ASKED}

    def render(*turns: dict[str, str]) -> str:
        text = tokenizer.apply_chat_template([*turns], tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token or "")

    alone, told, start = render(user), "", ""
    try:
        given = render({"role": "system", "content": TOLD}, user)
    except TemplateError:  # it takes no system message
        given = alone
    before, found, behind = given.partition(TOLD)
    if found and (closing := re.match(re.escape(tokenizer.convert_ids_to_tokens(system.end)) + r"\s*", behind)):
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{closing[0]}{{{{ end }}}}"
        if default := re.match(re.escape(before) + "(.*?)" + re.escape(closing[0]), alone, re.S):
            told, alone = default[1], alone[default.end() :]
    return start + alone.replace(ASKED, "{{ .Prompt }}") + "{{ .Response }}", told
