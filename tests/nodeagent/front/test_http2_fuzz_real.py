"""Mutated HTTP/2: whatever a client sends, nothing goes wrong in the server, and nothing is left of it.

`FUZZ_CONNECTIONS=5000 pytest tests/nodeagent/front/test_http2_fuzz_real.py` opens more connections. The same seed sends
the same frames.
"""

import logging
import os
import random
from contextlib import suppress
from typing import Any

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection

from fakes.asgi import Held, Receive, Send, Torrent
from fakes.http2_client import GET, POST, client_context, server_context
from fakes.serving import quart_app, start_serving
from nodeagent.front.asgi import Front
from nodeagent.front.exchange import Exchange, Handler

CONNECTIONS = int(os.environ.get("FUZZ_CONNECTIONS", "60"))
AT_ONCE = 6
PREFACE_BYTES = 24
PATHS = ["/", "/fast", "/held", "/torrent"]


def valid(rng: random.Random) -> bytearray:
    """What a client may send on a connection."""
    h2 = H2Connection(H2Configuration(validate_outbound_headers=False))
    h2.initiate_connection()
    for _ in range(rng.randint(1, 6)):
        number = h2.get_next_available_stream_id()
        has_body = rng.random() < 0.6
        fields = [*(POST if has_body else GET)[:3], (":path", rng.choice(PATHS)), ("x", "y" * rng.randint(0, 50))]
        h2.send_headers(number, fields, end_stream=not has_body)
        if has_body:
            for _ in range(rng.randint(0, 3)):
                h2.send_data(number, b"z" * rng.randint(0, 200), pad_length=rng.choice([None, 3]))
            end = rng.random()
            if end < 0.5:
                h2.end_stream(number)
            elif end < 0.7:
                h2.send_headers(number, [("t", "1")], end_stream=True)
            elif end < 0.9:
                h2.reset_stream(number)
        _besides(rng, h2)
    return bytearray(h2.data_to_send())


def _besides(rng: random.Random, h2: H2Connection) -> None:
    match rng.randrange(8):
        case 0:
            h2.ping(b"12345678")
        case 1:
            h2.increment_flow_control_window(rng.randint(1, 2**20))
        case 2:
            h2.update_settings({4: rng.randint(0, 2**20)})


def mutated(rng: random.Random) -> bytes:
    data = valid(rng)
    if rng.random() < 0.5:
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(PREFACE_BYTES, len(data))] = rng.randrange(256)
        return bytes(data)
    frames = cut(bytes(data[PREFACE_BYTES:]))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(frames))
        match rng.randrange(4):
            case 0:
                frames.insert(place, rng.choice(frames))
            case 1 if len(frames) > 1:
                frames.pop(place)
            case 2:
                rng.shuffle(frames)
            case _:
                frame = bytearray(frames[place])
                frame[rng.choice([3, 4, 8])] = rng.choice([rng.randrange(256), rng.randrange(12)])
                frames[place] = bytes(frame)
    return bytes(data[:PREFACE_BYTES]) + b"".join(frames)


def cut(data: bytes) -> list[bytes]:
    frames = []
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        frames.append(data[:end])
        data = data[end:]
    return frames


async def fast(exchange: Exchange) -> None:
    while (await exchange.receive())["more_body"]:
        continue
    await exchange.start(200, [], b"some", more=True)
    await exchange.write(b"x" * 100_000, more=False)


def find_handler(_method: str, path: bytes) -> Handler | None:
    return fast if path == b"/fast" else None


async def send_mutated(port: int, rng: random.Random) -> None:
    data = mutated(rng)
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    with suppress(trio.BrokenResourceError):
        stream = trio.SSLStream(plain, client_context(), server_hostname="127.0.0.1")
        size = rng.choice([len(data), 50, 1000])
        with trio.move_on_after(2):
            for start in range(0, len(data), size):
                await stream.send_all(data[start : start + size])
            with trio.move_on_after(rng.choice([0.01, 0.05, 0.3])):
                while await stream.receive_some():
                    continue
    await trio.aclose_forcefully(plain)


@pytest.mark.parametrize("seed", [1, 2])
async def test_mutated_frames_harm_nothing(seed: int, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    held, torrent, index = Held(), Torrent(), Front(quart_app(), max_request_bytes=10_000)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        here: dict[str, Any] = {"/held": held, "/torrent": torrent}
        await here.get(scope["path"], index)(scope, receive, send)

    async def send_some(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(CONNECTIONS // AT_ONCE):
            await send_mutated(served.port, rng)

    with trio.fail_after(60 + CONNECTIONS):
        context = server_context()
        served = await start_serving(
            nursery, app, find_tls=lambda: context, find_handler=find_handler, graceful_timeout_s=600
        )
        async with trio.open_nursery() as clients:
            for number in range(AT_ONCE):
                clients.start_soon(send_some, number)
        # All clients have left, so nothing is in flight.
        served.shutdown.set()
        with trio.fail_after(20):
            await served.ended.wait()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
