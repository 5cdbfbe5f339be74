"""A language model behind an OpenAI-compatible endpoint: retried, paced, and never paid for twice."""

import asyncio
import hashlib
import json
import math
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from lrlhf.config import check_ranges
from lrlhf.errors import UserError
from lrlhf.evaluation.language_model import Messages

try:
    import openai
except ImportError as error:
    raise UserError(f"an endpoint as judge needs {error.name}: pip install 'lrlhf[evaluate]'.") from None

PASSING = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError, TimeoutError)
"""What another try may mend."""
HOPELESS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""What no request of this run will pass."""
GIVE_UP = 20
"""Requests that fail one after another, all tries of each, before the rest is left."""


class Answers:
    """Answers on the disk, each written as soon as it arrives: a run that was killed goes on where it was.

    Args:
        path: SQLite file; made if there is none.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UserError(f"endpoint.cache={path} cannot be used ({error}); give another file.") from None

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a request, if it was answered before."""
        found = self._file.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer; a kill of the process right after this does not lose it."""
        self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    def close(self) -> None:
        """The file."""
        self._file.close()


class Endpoint:
    """Chat completions of any server that speaks OpenAI's protocol. The key comes from the environment alone.

    Args:
        model: its name there.
        base_url: of the server; null is OpenAI's.
        key_variable: environment variable that holds the key; a server that asks for none ignores what it holds.
        temperature: of complete; 0 as in AlpacaEval 1.
        top_logprobs: tokens whose probabilities are asked for in choose; 5 in AlpacaEval 2.
        concurrency: requests under way at once.
        requests_per_minute: at most; null sets no pace.
        retries: of a request that failed in passing, with exponential back-off.
        timeout: seconds of one try, from sending to the last byte.
        cache: SQLite file of all answers; a request that it holds costs nothing.
        prices: in money per million tokens of prompts and of answers, for the cost in the notes.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        temperature: NonNegativeFloat = 0.0,
        top_logprobs: PositiveInt = 5,
        concurrency: PositiveInt = 8,
        requests_per_minute: PositiveFloat | None = None,
        retries: NonNegativeInt = 6,
        timeout: PositiveFloat = 60.0,
        cache: str = "runs/answers.sqlite",
        prices: tuple[NonNegativeFloat, NonNegativeFloat] | None = None,
    ):
        if base_url and "@" in base_url:
            raise UserError("endpoint.base_url holds a password; put it into an environment variable (key_variable).")
        self.name = model
        self.base_url, self.key_variable, self.temperature = base_url, key_variable, temperature
        self.top_logprobs, self.concurrency, self.requests_per_minute = top_logprobs, concurrency, requests_per_minute
        self.retries, self.timeout, self.cache, self.prices = retries, timeout, cache, prices
        check_ranges(self)
        if base_url is None and not os.environ.get(key_variable):
            raise UserError(f"{model} needs a key: set the environment variable {key_variable}.")
        self.counts: Counter[str] = Counter()
        """requests, cached, failed; tokens of prompts and answers, paid now or found in the cache."""
        self._last_fault, self._failed_in_a_row = "", 0

    def complete(self, prompts: Sequence[Messages], max_tokens: int) -> list[str | None]:
        """See LanguageModel."""
        options = {"max_tokens": max_tokens, "temperature": self.temperature}
        return [None if answer is None else answer["text"] for answer in self._ask_all(prompts, options)]

    def choose(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[list[float] | None]:
        """See LanguageModel; a choice that is not among the top tokens has probability 0, none among them no answer.

        Raises:
            UserError: the server gives no log-probabilities.
        """
        options = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": self.top_logprobs}
        answers = self._ask_all(prompts, options)
        given = [answer for answer in answers if answer is not None]
        if given and not any(answer["top"] for answer in given):
            raise UserError(f"{self.name} gives no top_logprobs; set answer: rank, which needs none.")
        return [None if answer is None else _weigh(answer["top"], choices) for answer in answers]

    def notes(self) -> list[str]:
        """Requests, tokens and cost."""
        n, counts = self.counts["requests"], self.counts
        kinds = {kind: counts[f"prompt {kind}"] + counts[f"answer {kind}"] for kind in ("paid", "cached")}
        lines = [
            f"{self.name}: {n} requests, {counts['cached']} of them answered from {self.cache}; "
            f"{counts['prompt paid']} prompt and {counts['answer paid']} answer tokens now, {kinds['cached']} before."
        ]
        if self.prices:
            cost = [sum(counts[f"{side} {kind}"] * price / 1e6 for side, price in
                        zip(("prompt", "answer"), self.prices, strict=True)) for kind in kinds]  # fmt: skip
            lines.append(f"{self.name}: cost {cost[0]:.4f} now, {cost[0] + cost[1]:.4f} with what the cache had.")
        if n_failed := counts["failed"]:
            lines.append(
                f"{self.name}: {n_failed} requests failed, the last with: {self._last_fault}. The same command asks "
                "again for these alone."
            )
        return lines

    def _ask_all(self, prompts: Sequence[Messages], options: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Answers in the order of the prompts; equal prompts are asked once."""
        asked = [{"model": self.name, "messages": messages, **options} for messages in prompts]
        keys = [self._key(request) for request in asked]
        answers = _run(self._gather(dict(zip(keys, asked, strict=True))))
        self.counts["requests"] += len(answers)
        found = [answers[key] for key in keys]
        if found and all(answer is None for answer in found):
            raise UserError(f"{self.name} answered none of {len(answers)} requests ({self._last_fault}).")
        return found

    async def _gather(self, requests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
        answers: dict[str, dict[str, Any] | None] = {}
        queue, bar = list(requests.items())[::-1], tqdm(total=len(requests), desc=f"answers of {self.name}")
        key = os.environ.get(self.key_variable) or "none"
        client = openai.AsyncOpenAI(api_key=key, base_url=self.base_url, max_retries=0)
        async with client:
            pace = Pace(self.requests_per_minute)

            async def worker() -> None:
                while queue:
                    key, request = queue.pop()
                    answer = store.get(key)
                    self.counts["cached"] += answer is not None
                    self._count("cached", answer)
                    if answer is None and (answer := await self._ask(client, request, pace)) is not None:
                        store.put(key, answer)
                        self._count("paid", answer)
                    answers[key] = answer
                    bar.update()

            with bar, closing(Answers(Path(self.cache).expanduser())) as store:
                await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        return answers

    async def _ask(self, client: openai.AsyncOpenAI, request: dict[str, Any], pace: "Pace") -> dict[str, Any] | None:
        """One answer; None when all tries failed, or when this request can never pass."""
        for attempt in range(self.retries + 1):
            await pace.wait()
            try:
                answer = await asyncio.wait_for(client.chat.completions.create(**request), self.timeout)
                kept = self._hide(json.dumps(_read(answer)))
                self._failed_in_a_row = 0
                return json.loads(kept)
            except HOPELESS as error:
                raise UserError(f"{self.name} refuses ({self._say(error)}); {self._remedy(error)}.") from None
            except PASSING as error:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise UserError(f"{self.name} refuses ({self._say(error)}); the account has no credit.") from None
                self._last_fault, wait = self._say(error), _asked_to_wait(error)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                self._last_fault = self._say(error)
                break
            except (openai.OpenAIError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                self._last_fault, wait = f"no chat completion ({self._say(error)})", None
            if attempt < self.retries:
                await asyncio.sleep(wait if wait is not None else min(60, 0.5 * 2**attempt) * (0.5 + random.random()))
        self.counts["failed"] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row == GIVE_UP:
            raise UserError(
                f"{self.name}: {GIVE_UP} requests in a row failed, the last with: {self._last_fault}. What was "
                f"answered is kept in {self.cache}; start the same command again when the server is well."
            )
        return None

    def _key(self, request: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.base_url, request], sort_keys=True).encode()).hexdigest()

    def _count(self, kind: str, answer: dict[str, Any] | None) -> None:
        for side in ("prompt", "answer"):
            self.counts[f"{side} {kind}"] += answer[f"{side}_tokens"] if answer else 0

    def _hide(self, text: str) -> str:
        """Without the key, should a server repeat it."""
        key = os.environ.get(self.key_variable)
        return text.replace(key, "***") if key else text

    def _say(self, error: BaseException) -> str:
        """What went wrong, in one line."""
        return self._hide(" ".join(str(error).split())[:200] or type(error).__name__)

    def _remedy(self, error: openai.APIStatusError) -> str:
        if isinstance(error, openai.NotFoundError):
            return "look at endpoint.model and endpoint.base_url"
        known = "holds no valid key" if os.environ.get(self.key_variable) else "is not set"
        return f"the environment variable {self.key_variable} {known}"


class Pace:
    """Lets requests start no faster than so many a minute; None sets no pace."""

    def __init__(self, per_minute: float | None):
        self.gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Until this request may start."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self.gap
        if start > now:
            await asyncio.sleep(start - now)


def _run(task: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(task)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, task).result()


def _read(answer: Any) -> dict[str, Any]:
    """What is kept of a completion: text, the first token's most probable tokens, and the tokens that it cost."""
    choice = answer.choices[0]
    first = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
    usage = answer.usage
    return {
        "text": choice.message.content or "",
        "top": [[token.token, float(token.logprob)] for token in first],
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "answer_tokens": usage.completion_tokens if usage else 0,
    }


def _weigh(top: list[list[Any]], choices: Sequence[str]) -> list[float] | None:
    """Probabilities of the choices among the most probable tokens, blanks around a token left out."""
    mass = [sum(math.exp(logprob) for token, logprob in top if token.strip() == choice) for choice in choices]
    return [m / sum(mass) for m in mass] if sum(mass) > 0 else None


def _asked_to_wait(error: BaseException) -> float | None:
    """Seconds of a Retry-After header, a minute at most."""
    response = getattr(error, "response", None)
    try:
        return min(60.0, float(response.headers["retry-after"])) if response is not None else None
    except (KeyError, ValueError):
        return None
