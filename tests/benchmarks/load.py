"""The load: clients of one address, each a keep-alive connection that sends a request when it has its last answer.

Raw asyncio, so that the load is light beside what it measures.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import urlsplit

CHAT_PATH = "/v1/chat/completions"


@dataclass
class Outcome:
    """Latencies in seconds, one for each answer; `wall_s` in all.

    `events` are those of streams. `faults` counts answers other than 200.
    `gaps_s` are the times between one event and the next of its stream, if they are wanted (they cost the load time).
    """

    latencies_s: list[float] = field(default_factory=list)
    first_bytes_s: list[float] = field(default_factory=list)
    gaps_s: list[float] | None = None
    events: int = 0
    faults: int = 0
    wall_s: float = 0.0


class Refused(Exception):
    """An answer other than 200, in a load that is about answers of 200."""


def load(
    base_url: str,
    body: Mapping[str, object],
    *,
    clients: int,
    seconds: float,
    path: str = CHAT_PATH,
    headers: Mapping[str, str] | None = None,
) -> Outcome:
    """Send requests for that long with so many clients at once; each sends at least one. Raises Refused."""
    until = time.perf_counter() + seconds
    loading = _load(base_url, path, [body] * clients, lambda: time.perf_counter() < until, headers=headers or {})
    return _succeeded(base_url, asyncio.run(loading))


def load_requests(base_url: str, body: Mapping[str, object], requests: int) -> Outcome:
    """Send that many requests one after another. Raises Refused."""
    sent = itertools.count(1)
    return _succeeded(base_url, asyncio.run(_load(base_url, CHAT_PATH, [body], lambda: next(sent) < requests)))


def load_beside(
    base_url: str, bodies: Sequence[Mapping[str, object]], beside: Callable[[Outcome], Awaitable[None]]
) -> Outcome:
    """Send each body once, all at the same time, and run `beside` meanwhile with what comes of them. Raises Refused."""

    async def both() -> Outcome:
        outcome = Outcome(gaps_s=[])
        await asyncio.gather(_load(base_url, CHAT_PATH, bodies, lambda: False, outcome), beside(outcome))
        return outcome

    return _succeeded(base_url, asyncio.run(both()))


def first_byte_s(base_url: str, body: Mapping[str, object]) -> float:
    """How long one streamed request takes to the first byte of its body. Raises Refused."""
    outcome = _succeeded(base_url, asyncio.run(_load(base_url, CHAT_PATH, [body], lambda: False)))
    return outcome.first_bytes_s[0]


def _succeeded(base_url: str, outcome: Outcome) -> Outcome:
    if outcome.faults:
        raise Refused(f"{base_url}: {outcome.faults} of {len(outcome.latencies_s)} requests failed")
    return outcome


async def _load(
    base_url: str,
    path: str,
    bodies: Sequence[Mapping[str, object]],
    more: Callable[[], bool],
    outcome: Outcome | None = None,
    *,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """A client for each body, which sends it again while `more()`."""
    outcome = outcome or Outcome()
    address = urlsplit(base_url)
    began = time.perf_counter()
    requests = [_request(address.netloc, path, json.dumps(body).encode(), headers) for body in bodies]
    await asyncio.gather(
        *(_client(address.hostname or "", address.port or 80, request, more, outcome) for request in requests)
    )
    outcome.wall_s = time.perf_counter() - began
    return outcome


def _request(host: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _client(host: str, port: int, request: bytes, more: Callable[[], bool], outcome: Outcome) -> None:
    """A server may close after any answer, if the answer says so."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        while True:
            began = time.perf_counter()
            writer.write(request)
            kept_alive = await _read_answer(reader, began, outcome)
            outcome.latencies_s.append(time.perf_counter() - began)
            if not more():
                return
            if not kept_alive:
                writer.close()
                reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader, began: float, outcome: Outcome) -> bool:
    """Read one answer to its end; return whether the connection may be used again."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    outcome.faults += head.split(b" ", 2)[1] != b"200"
    if b"transfer-encoding: chunked" in head:
        await _read_chunks(reader, began, outcome)
    else:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
    return b"connection: close" not in head


async def _read_chunks(reader: asyncio.StreamReader, began: float, outcome: Outcome) -> None:
    last: float | None = None
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        data = await reader.readexactly(size + 2)
        if last is None:
            last = time.perf_counter()
            outcome.first_bytes_s.append(last - began)
        elif outcome.gaps_s is not None:
            last, before = time.perf_counter(), last
            outcome.gaps_s.append(last - before)
        outcome.events += data.count(b"data: ")
    await reader.readuntil(b"\r\n")
