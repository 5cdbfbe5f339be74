"""Calling a reward function: what it may ask for, several rows at once if it is slow, and whose fault a failure is.

A reward function takes prompts and responses, two lists of texts, and gives one score a response:

    def brief(prompts, responses): ...
    def right(prompts, responses, answer): ...                     a column of the data, by its name
    def terse(prompts, responses, token_counts, answer=None): ...  tokens in each response; a column that may lack
    async def judged(prompts, responses, **columns): ...           all columns; awaited row by row

Every argument is a list with one entry a response, also where the function is called row by row.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from lrlhf.config import check_ranges
from lrlhf.errors import UserError

RewardFunction = Callable[..., Any]
"""Maps prompts, responses and what else it names to scores [B]: a tensor, a list of numbers, or an awaitable of one."""

POOL = 16
"""Rows of an async function that are under way together where nobody says how many."""


@dataclass(frozen=True)
class Reward:
    """One of several reward functions, and how it is called."""

    function: RewardFunction
    """By import path."""
    weight: float = 1.0
    """Of its scores in the sum."""
    workers: PositiveInt | None = None
    """Call it row by row, so many at once, each in a thread: for a function that waits for a service. null calls it
    once for the whole batch; an async one row by row always, 16 at once."""
    timeout: PositiveFloat | None = None
    """Seconds that a call may take; null waits for ever."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not math.isfinite(self.weight):
            raise UserError(f"the weight of the reward function {self.name} must be finite, got {self.weight}.")
        names = [p.name for p in self._parameters() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(names) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in self._parameters()):
            told = f"it takes {', '.join(names)}" if names else "it takes neither"
            raise UserError(f"the reward function {self.name} must take prompts and responses; {told}.")

    @property
    def name(self) -> str:
        """Under which its scores are logged."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _parameters(self) -> list[inspect.Parameter]:
        try:
            return list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):
            raise UserError(
                f"the reward function {self.name} is {type(self.function).__name__}, no function."
            ) from None

    def columns(self, rows: Sequence[dict[str, Any]], token_counts: Sequence[int]) -> dict[str, list[Any]]:
        """What the function asks for beside prompts and responses, by parameter name.

        Args:
            rows: columns of each row.
            token_counts: tokens in each response.

        Raises:
            UserError: the data lacks a column that it needs.
        """
        given: dict[str, list[Any]] = {"token_counts": list(token_counts)}
        shared = set(rows[0]).intersection(*rows) if rows else set()
        given |= {name: [row[name] for row in rows] for name in shared}
        wanted: dict[str, list[Any]] = {}
        for parameter in self._parameters()[2:]:
            if parameter.kind == parameter.VAR_KEYWORD:
                wanted |= given
            elif parameter.kind == parameter.VAR_POSITIONAL:
                continue
            elif parameter.name in given:
                wanted[parameter.name] = given[parameter.name]
            elif parameter.default is parameter.empty and rows:
                some = " in every row" if any(parameter.name in row for row in rows) else ""
                told = ", ".join(sorted(shared)) or "none"
                raise UserError(
                    f"the reward function {self.name} asks for the column {parameter.name!r}, which the data does not "
                    f"have{some}; beside the prompt it has {told}."
                )
        return wanted

    def scores(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[dict[str, Any]],
        token_counts: Sequence[int],
        places: Sequence[str] = (),
    ) -> Tensor:
        """Scores [B] fp32, without the weight.

        Args:
            prompts: as texts.
            responses: as texts.
            rows: columns of each row.
            token_counts: tokens in each response.
            places: file and row of each, for messages.

        Raises:
            UserError: the function failed, took too long, or gave something else than a number a response.
        """
        if not len(responses):
            return torch.zeros(0)
        more = self.columns(rows, token_counts)
        columns = [list(prompts), list(responses)]
        places = places or [f"row {number} of the batch" for number in range(1, len(responses) + 1)]
        waits = inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004, an object with an async __call__
        )
        if not waits and self.workers is None and self.timeout is None:
            try:
                return self._as_scores(self.function(*columns, **more), len(responses))
            except UserError:
                raise
            except Exception as error:
                self._blame_row(columns, more, places, error)
        one_by_one = waits or self.workers is not None
        size = 1 if one_by_one else len(responses)
        calls = [
            ([c[i : i + size] for c in columns], {k: v[i : i + size] for k, v in more.items()})
            for i in range(0, len(responses), size)
        ]
        return torch.cat(_in_thread(lambda: asyncio.run(self._all(calls, places, waits))))

    async def _all(self, calls: list[Any], places: Sequence[str], waits: bool) -> list[Tensor]:
        slots = asyncio.Semaphore(self.workers or POOL)

        async def one(call: Any, place: str) -> Tensor:
            columns, more = call
            async with slots:
                start = self.function(*columns, **more) if waits else _daemon(lambda: self.function(*columns, **more))
                try:
                    found = await asyncio.wait_for(start, self.timeout)
                except asyncio.TimeoutError:
                    raise UserError(
                        f"the reward function {self.name} took more than {self.timeout:g} seconds at {place}."
                    ) from None
                except UserError:
                    raise
                except Exception as error:
                    raise self._failed(place, error) from error
                return self._as_scores(found, len(columns[1]))

        whole = f"a batch of {len(calls[0][0][1])} rows that begins with {places[0]}"
        names = places if len(calls) > 1 else [places[0] if len(calls[0][0][1]) == 1 else whole]
        return list(await asyncio.gather(*(one(call, name) for call, name in zip(calls, names, strict=True))))

    def _blame_row(self, columns: list[Any], more: dict[str, Any], places: Sequence[str], error: Exception) -> None:
        """Raise for the first row at which the function fails alone; else for all of them."""
        for i, place in enumerate(places):
            try:
                self.function(*([c[i]] for c in columns), **{name: [values[i]] for name, values in more.items()})
            except Exception as again:
                raise self._failed(place, again) from again
        raise self._failed(f"a batch of {len(places)} rows that begins with {places[0]}", error) from error

    def _failed(self, place: str, error: Exception) -> UserError:
        return UserError(f"the reward function {self.name} failed at {place}: {type(error).__name__}: {error}.")

    def _as_scores(self, found: Any, count: int) -> Tensor:
        try:
            scores = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"the reward function {self.name} returned {type(found).__name__}; it must return a number a response."
            ) from None
        if scores.shape != (count,):
            raise UserError(
                f"the reward function {self.name} returned shape {tuple(scores.shape)} for {count} responses."
            )
        return scores


def _in_thread(work: Callable[[], Any]) -> Any:
    """Run in a thread of its own: the caller may be inside an event loop, as in a notebook."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _daemon(work: Callable[[], Any]) -> Awaitable[Any]:
    """The result of work in a thread that does not keep the process alive when nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def run() -> None:
        outcome: tuple[Any, Exception | None]
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True).start()
    return future
