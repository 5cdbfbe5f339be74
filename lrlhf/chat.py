"""`lrlhf chat`: talk to what a run trained, with its reference beside it and the reward model's score under each.

In a terminal the answers stream; over a pipe each line is a prompt, and each answer a line of JSON.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from lrlhf.cli.messages import CommandParser
from lrlhf.config import Sampling
from lrlhf.datamodules.prompts import ChatTemplate
from lrlhf.errors import UserError
from lrlhf.evaluation.system import System, prompt_row
from lrlhf.model.pretrained import cache_folder
from lrlhf.report.tables import printable

DESCRIPTION = "Talk to what a run trained. Over a pipe each line is a prompt, and each answer a line of JSON."
HELP = "/temperature T   /save FILE   /new (forget the turns before)   /help   /quit"


class Chat:
    """Systems that answer the same prompts, and a reward model that scores each answer.

    Args:
        systems: by the name that is shown.
        reward: a reward model; None scores nothing.
        temperature: instead of each system's own.
        max_new_tokens: instead of each system's own.
        seed: of the draws; with the number of the prompt it fixes an answer.
    """

    def __init__(
        self,
        systems: dict[str, System],
        reward: System | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 1,
    ):
        self.systems, self.reward, self.seed = systems, reward, seed
        changed = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        self.changes: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
        self.turns: dict[str, list[tuple[str, str]]] = {name: [] for name in systems}
        self.records: list[dict[str, Any]] = []

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are part of a prompt: where the template takes several."""
        return all(isinstance(system.template, ChatTemplate) for system in self.systems.values())

    def ask(self, prompt: str) -> Iterator[dict[str, Any]]:
        """The record of a prompt as it grows: prompt, answers by system, and at the end scores by system.

        Args:
            prompt: of the user.

        Raises:
            UserError: a prompt that leaves no room for an answer.
        """
        record: dict[str, Any] = {"prompt": prompt, "answers": {}, "scores": {}}
        for name, system in self.systems.items():
            row = prompt_row(prompt, self.turns[name] if self.remembers else ())
            sampling = replace(system.sampling, **self.changes)
            for text in system.stream(system.encode(row), sampling, self.seed + len(self.records)):
                record["answers"][name] = text
                yield record
        for name, answer in record["answers"].items():
            if self.reward:
                several = isinstance(self.reward.template, ChatTemplate) and self.remembers
                row = prompt_row(prompt, self.turns[name] if several else ())
                record["scores"][name] = float(self.reward.score([row], [answer])[0])
            self.turns[name] += [("user", prompt), ("assistant", answer)]
        self.records.append(record)
        yield record

    def command(self, line: str) -> str:
        """What a line that begins with / does; a sentence that says so.

        Raises:
            UserError: no such command, or a value that it does not take.
        """
        name, _, value = line.partition(" ")
        if name == "/temperature":
            try:
                Sampling(temperature=float(value))  # refuses what is out of range
            except ValueError:
                raise UserError(f"/temperature takes a number from 0 up, not {value or 'nothing'}.") from None
            self.changes["temperature"] = float(value)
            return f"Temperature {float(value):g}."
        if name == "/save":
            if not value.strip():
                raise UserError("/save takes a file, e.g. /save talk.jsonl.")
            path = Path(value.strip()).expanduser()
            try:
                path.write_text("".join(f"{to_json(record)}\n" for record in self.records), encoding="utf-8")
            except OSError as error:
                raise UserError(f"{error}.") from None
            return f"Saved {len(self.records)} prompts with their answers in {path}."
        if name == "/new":
            self.turns = {name: [] for name in self.systems}
            return "A new conversation."
        if name == "/help":
            return HELP
        raise UserError(f"there is no command {name}; there are {HELP}.")


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a source that holds no model that answers.
    """
    given = parse(arguments)
    first = System(given.source)
    if first.handover and first.handover.head:
        raise UserError(
            f"{given.source} is a reward model, which scores and does not answer; give an SFT or policy run."
        )
    systems = {first.role_name: first}
    if given.beside == "reference":
        systems["reference"] = System(given.source, role="reference", beside=first)
    elif given.beside:
        other = System(given.beside, beside=first)
        systems[given.beside if other.role_name in systems else other.role_name] = other
    reward = _reward_model(given.reward_model, first)
    chat = Chat(systems, reward, given.temperature, given.max_new_tokens, given.seed)
    for system in (*systems.values(), *([reward] if reward else [])):
        system.backbone  # noqa: B018 loads it before the first prompt
    if sys.stdin.isatty() and sys.stdout.isatty():
        talk(chat)
    else:
        answer_lines(chat, sys.stdin)


def parse(arguments: list[str]) -> Namespace:
    """The options of a command line."""
    parser = CommandParser("chat", DESCRIPTION)
    parser.add_argument("source", type=str, help="a run folder, a hand-over, an exported adapter or a base model")
    parser.add_argument("--beside", type=str | None, help="reference, or another such source, that answers too")
    parser.add_argument("--reward_model", type=str | None, help="scores answers (default: the run's; none for none)")
    parser.add_argument("--temperature", type=NonNegativeFloat | None, help="of all answers (default: the run's)")
    parser.add_argument("--max_new_tokens", type=PositiveInt | None, help="of an answer (default: the run's)")
    parser.add_argument("--seed", type=NonNegativeInt, default=1, help="of the draws")
    return parser.parse_args(arguments)


def _reward_model(named: str | None, first: System) -> System | None:
    source = str(named or first.reward_model)
    if source in ("None", "none") or (named is None and not (Path(source).expanduser() / "manifest.json").is_file()):
        return None
    reward = System(source, beside=first)
    if reward.handover is None or not reward.handover.head:
        raise UserError(f"--reward_model {source} is no reward model; give the run folder of a RewardModel run.")
    return reward


def answer_lines(chat: Chat, lines: Iterable[str]) -> None:
    """One line of JSON for each prompt; what goes wrong with one is told on stderr, and the next one is answered."""
    for line in filter(None, map(str.strip, lines)):
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(chat.command(line), file=sys.stderr)
            else:
                *_, record = chat.ask(line)
                print(to_json(record), flush=True)
        except UserError as error:
            print(f"lrlhf: {error}", file=sys.stderr)


def to_json(record: dict[str, Any]) -> str:
    """A line."""
    return json.dumps(record, ensure_ascii=False)


def talk(chat: Chat) -> None:
    """The terminal: a prompt with history, answers that stream side by side, scores under them."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise UserError(f"lrlhf chat needs {error.name}: pip install 'lrlhf[evaluate]'.") from None

    def show(record: dict[str, Any]) -> Table:
        table = Table(expand=True, show_footer=bool(record["scores"]))
        for name in chat.systems:
            score = record["scores"].get(name)
            footer = "" if score is None else f"score {score:.3f}"
            table.add_column(Text(name, "bold"), ratio=1, footer=Text(footer, "cyan"))
        table.add_row(*(Text(printable(record["answers"].get(name, ""))) for name in chat.systems))
        return table

    console, history = Console(), _history()
    turns = "Turns are remembered." if chat.remembers else "Every prompt stands alone, as the run was trained."
    console.print(Text(f"{turns} {HELP}", "dim"))
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                console.print(Text(chat.command(line), "dim"))
            elif line:
                with Live(console=console) as live:
                    for record in chat.ask(line):
                        live.update(show(record))
        except UserError as error:
            console.print(Text(str(error), "red"))
        except KeyboardInterrupt:
            console.print(Text("Stopped; the answer is not kept.", "dim"))
    history()


def _history() -> Any:
    """Reads the prompts of earlier talks for the arrow keys; what it returns writes them."""
    try:
        import readline
    except ImportError:  # not on every system
        return lambda: None
    path = cache_folder() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    return lambda: readline.write_history_file(path)
