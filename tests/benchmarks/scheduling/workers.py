"""Workers that ask streamed chats over HTTP: each takes the next one of a shared list when it has its answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import trio

# Before a request is asked again, where no Retry-After says when.
_PAUSE_S = 1.0
# Longer than any wait that is worth measuring: what takes longer counts as failed.
_READ_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request that was answered in full; times in seconds since the start of the load."""

    number: int
    model_id: str
    asked_s: float
    first_byte_s: float
    last_byte_s: float

    @property
    def wait_s(self) -> float:
        return self.first_byte_s - self.asked_s


@dataclass
class Outcome:
    """What came of a load. A request that is refused (429) or fails is asked again until it is answered.

    `refusals` counts answers of 429. `failures` has, by its number, what each failed request got instead of an answer.
    """

    answers: list[Answer] = field(default_factory=list)
    failures: dict[int, list[str]] = field(default_factory=dict)
    refusals: int = 0
    makespan_s: float = 0.0


class Failed(Exception):
    """A request that got no whole answer, and why."""


def ask_all(base_url: str, bodies: Sequence[Mapping[str, Any]], *, workers: int, limit_s: float) -> Outcome:
    """Ask all of them, and return when each was answered, or when `limit_s` is over."""
    return trio.run(_ask_all, base_url, bodies, workers, limit_s)


async def _ask_all(base_url: str, bodies: Sequence[Mapping[str, Any]], workers: int, limit_s: float) -> Outcome:
    outcome = Outcome()
    began = trio.current_time()
    feed = iter(enumerate(bodies))
    async with httpx.AsyncClient(base_url=base_url, timeout=_READ_TIMEOUT_S, trust_env=False) as http:
        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                for _worker in range(workers):
                    nursery.start_soon(_work, http, feed, began, outcome)
        outcome.makespan_s = trio.current_time() - began
    return outcome


async def _work(
    http: httpx.AsyncClient, feed: Iterator[tuple[int, Mapping[str, Any]]], began: float, outcome: Outcome
) -> None:
    for number, body in feed:
        asked = trio.current_time()
        while (first_byte := await _ask(http, number, body, outcome)) is None:
            pass
        times = (moment - began for moment in (asked, first_byte, trio.current_time()))
        outcome.answers.append(Answer(number, body["model"], *times))


async def _ask(http: httpx.AsyncClient, number: int, body: Mapping[str, Any], outcome: Outcome) -> float | None:
    """Read one answer to its end; when its first event came, or None where it may be asked again now."""
    try:
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code == 200:
                return await _read_events(response)
            text = (await response.aread()).decode(errors="replace")
    except (Failed, httpx.HTTPError) as error:
        outcome.failures.setdefault(number, []).append(repr(error))
        await trio.sleep(_PAUSE_S)
        return None
    if response.status_code == 429:
        outcome.refusals += 1
    else:
        outcome.failures.setdefault(number, []).append(f"{response.status_code}: {text[:200]}")
    await trio.sleep(float(response.headers.get("Retry-After", _PAUSE_S)))
    return None


async def _read_events(response: httpx.Response) -> float:
    """When the first event came; pings (comments) are none. Raises Failed if the stream does not end as it should."""
    first: float | None = None
    last = ""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            first, last = first or trio.current_time(), line
    if first is None or last != "data: [DONE]":
        raise Failed(f"the stream ended with {last[:200]!r}")
    return first
