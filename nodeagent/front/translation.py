"""The seam for APIs that llama-server does not speak: their requests become ones that it does, and its answers theirs.

    Ollama's request ──> Translation: path and body for the server ──> the same road as any request
    Ollama's answer  <── Translator <────────────── the server's answer <──┘

A request is translated before anything else is done with it (`openai.py`). From then on it is one of OpenAI's, which
carries its translator along; only errors and the answer's bytes have another form (`error_shapes.py`, `answer.py`).
"""

from typing import Protocol

import msgspec


class Untranslatable(Exception):
    """The server's answer is an error, or is not what was asked for; the message is for the client."""


class Translator(Protocol):
    """Makes one answer in the client's format of the server's. One that streams is fed whole events."""

    @property
    def streams(self) -> bool:
        """Whether the client gets the answer piece by piece, and so the server is asked for events."""

    @property
    def content_type(self) -> str: ...

    def waiting(self) -> bytes:
        """What a stream says while it has nothing to say, b"" if its format has no such thing."""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the server's answer; return what the client gets for them, maybe nothing. Raises
        Untranslatable."""

    def end(self, load_s: float, now: float) -> bytes:
        """The server's answer is complete; return the rest of the client's. `load_s` is how long the request waited for
        its model to be loaded, `now` is `trio.current_time()`. Raises Untranslatable."""


class Translation(msgspec.Struct, frozen=True):
    """What a request is for the server: POST to `path`, which is a path of `endpoints.ENDPOINTS`, with that body.

    `answer` is set if the client gets this without any server being asked.
    """

    path: str
    body: bytes
    translator: Translator
    answer: bytes | None = None
