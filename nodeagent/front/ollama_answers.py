"""llama-server's answers in Ollama's format: lines of JSON instead of events, and durations in nanoseconds.

Pure, but for the wall clock in `created_at`. Other times are in seconds of one clock.
"""

import math
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from nodeagent.front.translation import Untranslatable

JSON_LINES: Final = "application/x-ndjson"
_JSON: Final = "application/json"
# An answer that is not streamed, and the calls of tools in one that is, are complete before the client gets them.
_WHOLE_MAX_BYTES: Final = 64 * 2**20
_CALLS_MAX_BYTES: Final = 4 * 2**20


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    """Of a chat `delta` or `message`, of a plain completion `text`."""

    delta: _Said | None = None
    message: _Said | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


class _Piece(msgspec.Struct):
    """An event of a stream, or a whole answer."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class _Vector(msgspec.Struct):
    embedding: msgspec.Raw
    index: int = 0


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


_PIECE: Final = msgspec.json.Decoder(_Piece)
_VECTORS: Final = msgspec.json.Decoder(_Vectors)
_NUMBERS: Final = msgspec.json.Decoder(list[float])


class TextTranslator:
    """The answer of a chat (`is_chat`) or of generate: a stream of lines, or one object.

    `thinks` is whether the client gets what the model thinks, too. What changes, in `feed`: the calls of tools so far,
    why the answer ended, and the server's figures; of an answer that is not streamed its bytes so far.
    """

    def __init__(self, model: str, began_at: float, *, streams: bool, is_chat: bool, thinks: bool) -> None:
        self.streams = streams
        self.content_type = JSON_LINES if streams else _JSON
        self._model = model
        self._is_chat = is_chat
        self._thinks = thinks
        self._began_at = began_at
        self._whole = _Whole()
        self._calls: dict[int, _Call] = {}
        self._calls_bytes = 0
        self._finish_reason: str | None = None
        self._usage = _Usage()
        self._timings = _Timings()

    def waiting(self) -> bytes:
        """See `Translator.waiting`: a line that says nothing."""
        return self._line("") if self.streams else b""

    def feed(self, data: bytes) -> bytes:
        """See `Translator.feed`."""
        if not self.streams:
            self._whole.add(data)
            return b""
        return b"".join(self._of_line(line) for line in data.splitlines() if line)

    def end(self, load_s: float, now: float) -> bytes:
        """See `Translator.end`."""
        text, thinking = "", None
        if not self.streams:
            piece = _decode(_PIECE, self._whole.content())
            text, thinking = self._take(piece)
        if self._finish_reason is None:
            raise Untranslatable("The server's answer ended without saying why.")
        figures = self._figures(load_s, now - self._began_at)
        calls = self._tool_calls()
        if self.streams and calls:
            return self._line("", calls=calls) + self._line("", figures=figures)
        return self._line(text, thinking, calls, figures)

    def _of_line(self, line: bytes) -> bytes:
        name, _, value = line.partition(b":")
        if not name:  # a comment
            return self.waiting()
        value = value.strip()
        if name not in (b"data", b"error") or value == b"[DONE]":
            return b""
        if name == b"error":
            raise Untranslatable(_message(_decode(_ANY, value)))
        text, thinking = self._take(_decode(_PIECE, value))
        return self._line(text, thinking) if text or thinking else b""

    def _take(self, piece: _Piece) -> tuple[str, str | None]:
        """Note what the piece says besides its text and what the model thinks; return these."""
        if piece.error is not None:
            raise Untranslatable(_message(piece.error))
        self._usage = piece.usage or self._usage
        self._timings = piece.timings or self._timings
        if not piece.choices:
            return "", None
        choice = piece.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        said = choice.delta or choice.message or _Said(content=choice.text)
        for place, call in enumerate(said.tool_calls or []):
            self._add_call(call, place if choice.message else call.index)
        return said.content or "", said.reasoning_content if self._thinks else None

    def _add_call(self, call: _Call, index: int) -> None:
        """A call comes in pieces: its name first, then its arguments bit by bit."""
        known = self._calls.setdefault(index, _Call(index=index, function=_Function(name="", arguments="")))
        new, function = call.function or _Function(), known.function
        assert function is not None
        known.id = known.id or call.id
        function.name = (function.name or "") + (new.name or "")
        function.arguments = (function.arguments or "") + (new.arguments or "")
        self._calls_bytes += len(new.arguments or "") + len(new.name or "") + 1
        if self._calls_bytes > _CALLS_MAX_BYTES:
            raise Untranslatable(f"The model's calls of tools are longer than {_CALLS_MAX_BYTES} bytes.")

    def _tool_calls(self) -> list[dict[str, Any]]:
        """The calls, with arguments as objects. One that was cut off (by `num_predict`, say) is left out."""
        found = []
        for _index, call in sorted(self._calls.items()):
            assert call.function is not None
            arguments = _object(call.function.arguments or "{}")
            if arguments is not None:
                made: dict[str, Any] = {"function": {"name": call.function.name, "arguments": arguments}}
                found.append({"id": call.id, **made} if call.id else made)
        return found

    def _line(
        self,
        text: str,
        thinking: str | None = None,
        calls: list[dict[str, Any]] | None = None,
        figures: dict[str, Any] | None = None,
    ) -> bytes:
        said: dict[str, Any] = {"role": "assistant", "content": text} if self._is_chat else {"response": text}
        if thinking:
            said["thinking"] = thinking
        if calls:
            said["tool_calls"] = calls
        line = {"model": self._model, "created_at": time_now(), **({"message": said} if self._is_chat else said)}
        return msgspec.json.encode(line | (figures or {"done": False})) + b"\n"

    def _figures(self, load_s: float, total_s: float) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": "length" if self._finish_reason == "length" else "stop",
            **_durations(load_s, total_s),
            "prompt_eval_count": self._usage.prompt_tokens,
            "prompt_eval_duration": _ns(self._timings.prompt_ms / 1000),
            "eval_count": self._usage.completion_tokens,
            "eval_duration": _ns(self._timings.predicted_ms / 1000),
        }


class EmbeddingsTranslator:
    """The answer with embeddings; `is_old` is that of the older path, which has one. With `dimensions` each is cut to
    so many numbers, and its length is made 1 again. What changes: the answer's bytes so far, in `feed`."""

    streams = False
    content_type = _JSON

    def __init__(self, model: str, began_at: float, *, is_old: bool, dimensions: int | None) -> None:
        self._model = model
        self._is_old = is_old
        self._dimensions = dimensions
        self._began_at = began_at
        self._whole = _Whole()

    def waiting(self) -> bytes:
        """See `Translator.waiting`."""
        return b""

    def feed(self, data: bytes) -> bytes:
        """See `Translator.feed`."""
        self._whole.add(data)
        return b""

    def end(self, load_s: float, now: float) -> bytes:
        """See `Translator.end`."""
        answer = _decode(_VECTORS, self._whole.content())
        embeddings = [self._cut(vector.embedding) for vector in sorted(answer.data, key=lambda it: it.index)]
        if self._is_old:
            if len(embeddings) != 1:
                raise Untranslatable(f"The server answered with {len(embeddings)} embeddings instead of one.")
            return msgspec.json.encode({"embedding": embeddings[0]})
        content = {"model": self._model, "embeddings": embeddings, **_durations(load_s, now - self._began_at)}
        return msgspec.json.encode(content | {"prompt_eval_count": answer.usage.prompt_tokens})

    def _cut(self, embedding: msgspec.Raw) -> Any:
        if self._dimensions is None:
            return embedding
        numbers = _decode(_NUMBERS, embedding)[: self._dimensions]
        length = math.hypot(*numbers)
        return [number / length for number in numbers] if length else numbers


class LoadTranslator:
    """The answer to a request that only loads its model."""

    streams = False
    content_type = _JSON

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._model = model
        self._is_chat = is_chat

    def waiting(self) -> bytes:
        """See `Translator.waiting`."""
        return b""

    def feed(self, data: bytes) -> bytes:
        """See `Translator.feed`; what the server says does not matter."""
        return b""

    def end(self, load_s: float, now: float) -> bytes:
        """See `Translator.end`."""
        return loaded_line(self._model, is_chat=self._is_chat, done_reason="load")


def loaded_line(model: str, *, is_chat: bool, done_reason: str) -> bytes:
    """The answer to a request without a prompt."""
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return (
        msgspec.json.encode(
            {"model": model, "created_at": time_now(), **said, "done": True, "done_reason": done_reason}
        )
        + b"\n"
    )


def time_now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class _Whole:
    """An answer that is collected before it is translated. What changes: its bytes, in `add`."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _WHOLE_MAX_BYTES:
            raise Untranslatable(f"The server's answer is longer than {_WHOLE_MAX_BYTES} bytes; ask for less at once.")

    def content(self) -> bytes:
        return b"".join(self._pieces)


_ANY: Final = msgspec.json.Decoder()


def _decode(decoder: msgspec.json.Decoder[Any], content: bytes | msgspec.Raw) -> Any:
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Untranslatable(f"The server's answer is not what was asked for: {error}") from error


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _durations(load_s: float, total_s: float) -> dict[str, int]:
    return {"total_duration": _ns(total_s), "load_duration": _ns(load_s)}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
