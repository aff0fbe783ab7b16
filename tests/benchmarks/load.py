"""The load: clients of one address, each a keep-alive connection that asks again when it has its answer.

Raw asyncio, so that the load is light beside what it measures.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Outcome:
    """Latencies in seconds, one for each answer; `events` of streams; `faults` that were no 200; `wall_s` in all."""

    latencies_s: list[float] = field(default_factory=list)
    first_bytes_s: list[float] = field(default_factory=list)
    events: int = 0
    faults: int = 0
    wall_s: float = 0.0

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


def load(base_url: str, body: Mapping[str, object], *, clients: int, seconds: float) -> Outcome:
    """Ask for as long as that with so many clients at once."""
    return asyncio.run(_load(base_url, body, clients, seconds))


def first_byte_s(base_url: str, body: Mapping[str, object]) -> float:
    """How long one streamed request takes to the first byte of its body; raises ValueError if it is refused."""
    outcome = asyncio.run(_load(base_url, body, 1, 0.0))
    if outcome.faults or not outcome.first_bytes_s:
        raise ValueError(f"{base_url} refused {body}")
    return outcome.first_bytes_s[0]


async def _load(base_url: str, body: Mapping[str, object], clients: int, seconds: float) -> Outcome:
    outcome = Outcome()
    address = urlsplit(base_url)
    request = _request(address.netloc, json.dumps(body).encode())
    began = time.perf_counter()
    await asyncio.gather(
        *(
            _client(address.hostname or "", address.port or 80, request, began + seconds, outcome)
            for _ in range(clients)
        )
    )
    outcome.wall_s = time.perf_counter() - began
    return outcome


def _request(host: str, body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _client(host: str, port: int, request: bytes, until: float, outcome: Outcome) -> None:
    """At least one request; then more until the time is over. A server may close after any answer, if it says so."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        while True:
            began = time.perf_counter()
            writer.write(request)
            kept_alive = await _read_answer(reader, began, outcome)
            outcome.latencies_s.append(time.perf_counter() - began)
            if time.perf_counter() >= until:
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
    first = True
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        data = await reader.readexactly(size + 2)
        if first:
            outcome.first_bytes_s.append(time.perf_counter() - began)
            first = False
        outcome.events += data.count(b"data: ")
    await reader.readuntil(b"\r\n")
