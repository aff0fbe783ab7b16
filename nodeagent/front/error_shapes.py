"""An error as JSON and as an event of a stream, in the shape that the clients of its path read.

OpenAI's, which is llama.cpp's too: `{"error": {"message", "type", "param", "code"}, "request_id"}`.
Anthropic's: `{"type": "error", "error": {"type", "message"}, "request_id"}`, with types of their own by status
(https://docs.anthropic.com/en/api/errors).
Ollama's: `{"error": message}`, in a stream as a line.
"""

import json
from typing import Any, Final

from nodeagent.front.endpoints import Dialect
from nodeagent.front.paths import canonical

_ANTHROPICS_PATHS: Final = "/v1/messages"
_OLLAMAS_PATHS: Final = "/api/"

_ANTHROPICS_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def dialect_of(path: str) -> Dialect:
    """Whose API the path belongs to, however it is spelt, also if it does not exist."""
    path = canonical(path)
    if path.startswith(_OLLAMAS_PATHS):
        return Dialect.OLLAMA
    is_anthropics = path == _ANTHROPICS_PATHS or path.startswith(_ANTHROPICS_PATHS + "/")
    return Dialect.ANTHROPIC if is_anthropics else Dialect.OPENAI


def error_json(dialect: Dialect, status: int, error: dict[str, Any], request_id: str) -> bytes:
    """The body of an error; `error` is OpenAI's object."""
    content: dict[str, Any] = {"error": error, "request_id": request_id}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPICS_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        content = {"type": "error", "error": {"type": kind, "message": error.get("message", "")}}
        content["request_id"] = request_id
    if dialect is Dialect.OLLAMA:
        content = {"error": error.get("message", "")}
    # As ASCII: a repeated value of the client may have lone surrogates, which UTF-8 can't encode.
    return json.dumps(content).encode("ascii")


def as_event(dialect: Dialect, content: bytes) -> bytes:
    """The body of an error as a server-sent event (of Ollama's a line), for a stream that has begun."""
    if dialect is Dialect.OLLAMA:
        return content + b"\n"
    name = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return name + b"data: " + content + b"\n\n"
