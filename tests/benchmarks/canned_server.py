#!/usr/bin/env python3
"""A llama-server with ready-made answers: what is measured against it is the way there and back.

    python tests/benchmarks/canned_server.py [--host 127.0.0.1] [--port 0] [-a canned] [--run-on-cpus 0,1]

Ignores llama-server's other flags, and speaks its protocol as far as supervisors look: the `listening on` line,
`/health`, `/v1/models`, embeddings, and chat completions with and without `stream`. A stream is 200 events at once,
unless the body has `"paced": {"events": 100, "per_s": 50, "phase": 0.5}`: then they come at that pace, at moments
that all streams of one phase (from 0 to 1) share, as the slots of one llama-server get their tokens together.

With the variable CANNED_LOG it prints about each chat completion as many lines as llama-server does at its default
verbosity, in as many writes.

Raw asyncio, since it must be faster than what it measures.
"""

import asyncio
import json
import math
import os
import socket
import sys

EVENTS = 200
EMBEDDING_SIZE = 768
_LAST_CHUNK = b"0\r\n\r\n"
# llama-server b10068 prints seven lines of about this length. It writes the time, the level and the text one by one.
_LOG = (b"0.01.504.614 ", b"I ", b"slot print_timing: id  0 | task 0 | " + b"-" * 60 + b"\n") * 7


def _answer(content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _chat(alias: str) -> bytes:
    message = {"role": "assistant", "content": "word " * 80}
    choices = [{"finish_reason": "stop", "index": 0, "message": message}]
    usage = {"completion_tokens": 80, "prompt_tokens": 20, "total_tokens": 100}
    # What llama-server appends to each answer.
    timings = {
        "cache_n": 0,
        "prompt_n": 20,
        "prompt_ms": 30.958,
        "prompt_per_token_ms": 1.5479,
        "prompt_per_second": 646.036565669617,
        "predicted_n": 80,
        "predicted_ms": 661.064,
        "predicted_per_token_ms": 8.2633,
        "predicted_per_second": 121.0170270957608,
    }
    answer = {"choices": choices, "model": alias, "object": "chat.completion", "usage": usage, "timings": timings}
    return json.dumps(answer, separators=(",", ":")).encode()


def _embeddings(alias: str) -> bytes:
    vector = [math.sin(number) / 32 for number in range(EMBEDDING_SIZE)]
    data = [{"embedding": vector, "index": 0, "object": "embedding"}]
    usage = {"prompt_tokens": 8000, "total_tokens": 8000}
    return json.dumps({"data": data, "model": alias, "object": "list", "usage": usage}).encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Answers:
    """Everything that the server says, ready to be written."""

    stream_head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    done = _chunk(b"data: [DONE]\n\n") + _LAST_CHUNK

    def __init__(self, alias: str, *, logs: bool) -> None:
        self.logs = logs
        models = json.dumps({"object": "list", "data": [{"id": alias, "object": "model"}]}).encode()
        event = {"choices": [{"index": 0, "delta": {"content": " word"}}], "model": alias, "object": "chunk"}
        self.whole = {
            b"/health": _answer("application/json", b'{"status":"ok"}'),
            b"/v1/models": _answer("application/json", models),
            b"/v1/embeddings": _answer("application/json", _embeddings(alias)),
        }
        self.chat = _answer("application/json", _chat(alias))
        self.event = _chunk(f"data: {json.dumps(event)}\n\n".encode())


class Connection(asyncio.Protocol):
    """One connection; requests come one after another, each with a Content-Length."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._received = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            _, found, length = head.partition(b"content-length:")
            whole = end + 4 + (int(length.split(b"\r\n", 1)[0]) if found else 0)
            if len(self._received) < whole:
                return
            body, self._received = self._received[end + 4 : whole], self._received[whole:]
            self._serve(head.split(b" ", 2)[1], body)

    def _serve(self, path: bytes, body: bytes) -> None:
        if path in self._answers.whole:
            self._transport.write(self._answers.whole[path])
            return
        if self._answers.logs:
            for text in _LOG:
                os.write(2, text)
        if b'"paced"' in body:
            pace = json.loads(body)["paced"]
            self._transport.write(self._answers.stream_head)
            self._write_paced(pace["events"], 1 / pace["per_s"], pace["phase"])
        elif b'"stream": true' in body or b'"stream":true' in body:
            self._transport.write(self._answers.stream_head)
            # One write for each event, as a server does that generates them.
            for _event in range(EVENTS):
                self._transport.write(self._answers.event)
            self._transport.write(self._answers.done)
        else:
            self._transport.write(self._answers.chat)

    def _write_paced(self, events: int, interval_s: float, phase: float) -> None:
        loop = asyncio.get_running_loop()
        first = math.ceil(loop.time() / interval_s) + 1 + phase

        def write(number: int) -> None:
            if self._transport.is_closing():
                return
            if number == events:
                self._transport.write(self._answers.done)
                return
            self._transport.write(self._answers.event)
            loop.call_at((first + number + 1) * interval_s, write, number + 1)

        loop.call_at(first * interval_s, write, 0)


def _flag(*names: str, default: str) -> str:
    for name, value in zip(sys.argv, sys.argv[1:], strict=False):
        if name in names:
            return value
    return default


async def main() -> None:
    cpus = _flag("--run-on-cpus", default="")
    if cpus:
        os.sched_setaffinity(0, map(int, cpus.split(",")))
    answers = Answers(_flag("-a", "--alias", default="canned"), logs="CANNED_LOG" in os.environ)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(answers), _flag("--host", default="127.0.0.1"), int(_flag("--port", default="0"))
    )
    for sock in server.sockets:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"canned_server: listening on http://{host}:{port}", file=sys.stderr, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
