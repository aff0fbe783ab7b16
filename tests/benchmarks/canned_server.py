#!/usr/bin/env python3
"""A llama-server that has its answers ready: what is measured against it is the way there and back.

Takes llama-server's flags (`--host`, `--port`, `-a`; the others are passed over) and speaks its protocol as far as
supervisors look: the `listening on` line, `/health`, `/v1/models`, chat completions, streamed (200 events at once for
each request) and not. Raw asyncio, since it must be faster than what it measures.
"""

import asyncio
import json
import socket
import sys

CHUNKS = 200


def _answer(content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _chat(alias: str) -> bytes:
    message = {"role": "assistant", "content": "word " * 80}
    choices = [{"finish_reason": "stop", "index": 0, "message": message}]
    usage = {"completion_tokens": 80, "prompt_tokens": 20, "total_tokens": 100}
    return json.dumps({"choices": choices, "model": alias, "object": "chat.completion", "usage": usage}).encode()


def _stream(alias: str) -> list[bytes]:
    """The head, then one HTTP chunk for each event."""
    event = json.dumps({"choices": [{"index": 0, "delta": {"content": " word"}}], "model": alias, "object": "chunk"})
    events = [f"data: {event}\n\n".encode()] * CHUNKS + [b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(event), event) for event in events), b"0\r\n\r\n"]


class Connection(asyncio.Protocol):
    """One connection; requests come one after another, each with a Content-Length."""

    def __init__(self, alias: str) -> None:
        models = json.dumps({"object": "list", "data": [{"id": alias, "object": "model"}]}).encode()
        self._whole = {
            b"/health": _answer("application/json", b'{"status":"ok"}'),
            b"/v1/models": _answer("application/json", models),
        }
        self._chat = _answer("application/json", _chat(alias))
        self._stream = _stream(alias)
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
        if path in self._whole:
            self._transport.write(self._whole[path])
        elif b'"stream": true' in body or b'"stream":true' in body:
            # One write for each event, as a server does that generates them.
            for piece in self._stream:
                self._transport.write(piece)
        else:
            self._transport.write(self._chat)


def _flag(*names: str, default: str) -> str:
    for name, value in zip(sys.argv, sys.argv[1:], strict=False):
        if name in names:
            return value
    return default


async def main() -> None:
    alias = _flag("-a", "--alias", default="canned")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(alias), _flag("--host", default="127.0.0.1"), int(_flag("--port", default="0"))
    )
    for sock in server.sockets:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"canned_server: listening on http://{host}:{port}", file=sys.stderr, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
