"""The one table of the paths that go to a model's server. Both roads read it.

A path is here as the server has it, and as `paths.canonical` makes it of what a client wrote. Never here: what runs
commands, fetches for others, or writes files (`/tools`, `/cors-proxy`, saved slots, POST `/props`).
"""

from enum import Enum, auto
from typing import Final

import msgspec


class Dialect(Enum):
    """Whose API a path belongs to; errors have its shape. llama.cpp's own are those of OpenAI."""

    OPENAI = auto()
    ANTHROPIC = auto()
    OLLAMA = auto()


class Slots(Enum):
    """How many of the server's slots a request needs."""

    BY_COMPLETION = auto()
    # Its items (the texts to embed, the documents to rank) are queued by the server.
    ONE = auto()
    NONE = auto()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One path of inference.

    The body must have the field `needs`, or the field `instead` if there is one. `streams` is whether `"stream": true`
    brings server-sent events. `task` is what a model must be for to serve it, None for any. `is_form` is whether the
    body is a multipart form instead of JSON, `may_have_media` whether it may refer to images, sounds and files.

    What is posted to a path of Ollama's is translated into a request for one of the others (`ollama_requests.py`), and
    from then on treated as such.
    """

    path: str
    needs: str
    instead: str | None = None
    task: str | None = "chat"
    dialect: Dialect = Dialect.OPENAI
    slots: Slots = Slots.BY_COMPLETION
    streams: bool = False
    is_form: bool = False
    may_have_media: bool = False


_ENDPOINTS: Final = (
    Endpoint(path="/v1/chat/completions", needs="messages", streams=True, may_have_media=True),
    Endpoint(
        path="/v1/chat/completions/input_tokens", needs="messages", task=None, slots=Slots.NONE, may_have_media=True
    ),
    Endpoint(path="/v1/completions", needs="prompt", streams=True),
    Endpoint(path="/v1/responses", needs="input", streams=True, may_have_media=True),
    Endpoint(path="/v1/responses/input_tokens", needs="input", task=None, slots=Slots.NONE, may_have_media=True),
    Endpoint(path="/v1/embeddings", needs="input", instead="content", task="embedding", slots=Slots.ONE),
    Endpoint(path="/v1/rerank", needs="query", task="rerank", slots=Slots.ONE),
    Endpoint(path="/v1/reranking", needs="query", task="rerank", slots=Slots.ONE),
    Endpoint(path="/v1/audio/transcriptions", needs="file", is_form=True),
    # Anthropic's.
    Endpoint(path="/v1/messages", needs="messages", dialect=Dialect.ANTHROPIC, streams=True, may_have_media=True),
    Endpoint(
        path="/v1/messages/count_tokens",
        needs="messages",
        dialect=Dialect.ANTHROPIC,
        task=None,
        slots=Slots.NONE,
        may_have_media=True,
    ),
    # llama.cpp's own.
    Endpoint(path="/completion", needs="prompt", streams=True),
    Endpoint(path="/infill", needs="input_prefix", streams=True),
    Endpoint(path="/embedding", needs="content", instead="input", task="embedding", slots=Slots.ONE),
    Endpoint(path="/embeddings", needs="content", instead="input", task="embedding", slots=Slots.ONE),
    Endpoint(path="/tokenize", needs="content", task=None, slots=Slots.NONE),
    Endpoint(path="/detokenize", needs="tokens", task=None, slots=Slots.NONE),
    Endpoint(path="/apply-template", needs="messages", task=None, slots=Slots.NONE, may_have_media=True),
    # Ollama's.
    Endpoint(path="/api/chat", needs="messages", dialect=Dialect.OLLAMA, streams=True),
    Endpoint(path="/api/generate", needs="prompt", dialect=Dialect.OLLAMA, streams=True),
    Endpoint(path="/api/embed", needs="input", task="embedding", dialect=Dialect.OLLAMA, slots=Slots.ONE),
    Endpoint(path="/api/embeddings", needs="prompt", task="embedding", dialect=Dialect.OLLAMA, slots=Slots.ONE),
)

ENDPOINTS: Final = {endpoint.path: endpoint for endpoint in _ENDPOINTS}
