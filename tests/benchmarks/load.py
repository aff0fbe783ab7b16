"""The load: clients of one address, each a keep-alive connection that asks again when it has its answer.

Raw asyncio with httptools, so that the load is light beside what it measures.
"""

import asyncio
import gc
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

# A client whose answer does not come ends the whole run; even a switch of models is far quicker.
_PATIENCE_S = 60
_EVENT = b"data: "
_FIRST_TOKEN = re.compile(rb'"content":\s*"[^"]')


@dataclass(slots=True)
class Outcome:
    """What clients saw, in seconds: `latencies_s` to the last byte, one for each answer; `first_token_s` the last one.

    `events` are those of streams, `[DONE]` among them; `faults` answers that were no 200 or broke off; `wall_s` is the
    whole time of the load.
    """

    latencies_s: list[float] = field(default_factory=list)
    first_token_s: float | None = None
    events: int = 0
    faults: int = 0
    wall_s: float = 0.0

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


def load(base_url: str, body: Mapping[str, object], *, clients: int, seconds: float) -> Outcome:
    """Ask for as long as that with so many clients at once; at least once each."""
    gc.collect()
    gc.disable()  # its pauses would be taken for the peer's p99
    try:
        return asyncio.run(_load(base_url, body, clients, seconds))
    finally:
        gc.enable()


def first_token_s(base_url: str, body: Mapping[str, object]) -> float:
    """Seconds from one streamed request to its first token; raises RuntimeError if none came."""
    outcome = load(base_url, body, clients=1, seconds=0.0)
    if outcome.faults or outcome.first_token_s is None:
        raise RuntimeError(f"{base_url} gave no token for {body}")
    return outcome.first_token_s


async def _load(base_url: str, body: Mapping[str, object], clients: int, seconds: float) -> Outcome:
    outcome = Outcome()
    address = urlsplit(base_url)
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(payload) + payload
    began = time.perf_counter()
    async with asyncio.timeout(seconds + _PATIENCE_S), asyncio.TaskGroup() as group:
        for _client in range(clients):
            group.create_task(_ask(str(address.hostname), address.port or 80, request, began + seconds, outcome))
    outcome.wall_s = time.perf_counter() - began
    return outcome


async def _ask(host: str, port: int, request: bytes, until: float, outcome: Outcome) -> None:
    """One client. Where a server closes its connection after an answer, the client makes a new one."""
    loop = asyncio.get_running_loop()
    goes_on = True
    while goes_on:
        _, client = await loop.create_connection(lambda: _Client(request, until, outcome), host, port)
        goes_on = await client.closed


class _Client(asyncio.Protocol):
    """One connection; asks in the very call that brings the end of the last answer. Holds httptools' callbacks."""

    def __init__(self, request: bytes, until: float, outcome: Outcome) -> None:
        self.closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # is there time for more?
        self._request = request
        self._until = until
        self._outcome = outcome
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser
        self._pieces: list[bytes] = []
        self._awaited = False
        self._token_seen = False
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces = []
        self._awaited = True
        self._token_seen = False
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        if not self._token_seen and _FIRST_TOKEN.search(data):
            self._token_seen = True
            self._outcome.first_token_s = time.perf_counter() - self._began

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._awaited = False
        self._outcome.latencies_s.append(now - self._began)
        self._outcome.events += b"".join(self._pieces).count(_EVENT)
        self._outcome.faults += self._parser.get_status_code() != 200
        if now >= self._until or not self._parser.should_keep_alive():
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._outcome.faults += self._awaited
        if not self.closed.done():
            self.closed.set_result(not self._awaited and time.perf_counter() < self._until)
