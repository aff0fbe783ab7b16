"""Reads the few fields of a request's body that decide where it goes, without building the rest. Pure.

A body of 64 MiB of `{},{},...` would take gigabytes as Python objects. msgspec checks the whole document, but builds
only the fields named here, as slices of the body: 0.2 s for those 64 MiB.
"""

import codecs
import hashlib
import re
from typing import Any, TypeVar

import msgspec

from nodeagent.errors import InvalidRequest

T = TypeVar("T")

# Fields up to this size are looked into (is each message an object? how many prompts?); larger ones only at their
# start. 256 KiB of "{}," take 20 ms.
_LOOK_INTO_BYTES = 2**18
# A scalar that is shown in an error.
_SHOWN_BYTES = 1024
_NUMBER_STARTS = frozenset(b"%c" % byte for byte in b"-0123456789")
_KINDS = {b"{": "an object", b"[": "a list", b'"': "a long string"}


class BodyFields(msgspec.Struct, frozen=True, kw_only=True):
    """What the node needs to know of a body.

    `model` is None if the body names none. `completions` is how many completions it asks for: `n` (`n_cmpl` is
    llama-server's own name for it) for each of its prompts. `conversation` identifies the conversation, None if nothing
    does.
    """

    model: str | None
    stream: bool
    completions: int
    conversation: str | None


_MISSING = msgspec.Raw(b"null")


class _Raw(msgspec.Struct):
    """The fields as they are in the body."""

    model: msgspec.Raw = _MISSING
    stream: msgspec.Raw = _MISSING
    n: msgspec.Raw = _MISSING
    n_cmpl: msgspec.Raw = _MISSING
    messages: msgspec.Raw = _MISSING
    prompt: msgspec.Raw = _MISSING
    prompt_cache_key: msgspec.Raw = _MISSING
    input: msgspec.Raw = _MISSING
    content: msgspec.Raw = _MISSING
    query: msgspec.Raw = _MISSING
    input_prefix: msgspec.Raw = _MISSING
    tokens: msgspec.Raw = _MISSING


class _Message(msgspec.Struct):
    role: msgspec.Raw = _MISSING


_MODEL_FIRST = re.compile(rb'[\s\xef\xbb\xbf]{0,64}\{\s{0,64}"model"\s{0,64}:\s{0,64}("(?:[^"\\]|\\.){1,512}")')
_BODY = msgspec.json.Decoder(_Raw)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_MESSAGE = msgspec.json.Decoder(_Message)
_MESSAGES = msgspec.json.Decoder(list[_Message])


def without_bom(body: bytes) -> bytes:
    """The body without a UTF-8 byte order mark, which JSON must not have and some Windows programs write."""
    return body.removeprefix(codecs.BOM_UTF8)


def model_at_start(body: bytes) -> str | None:
    """The model that a body names in its first field, as most clients do, None if that is another one or is cut off."""
    found = _MODEL_FIRST.match(body)
    try:
        return None if found is None else msgspec.json.decode(found[1], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_body(body: bytes, *, needs: str, instead: str | None = None, identify: bool = True) -> BodyFields:
    """Check and read a body; `needs` (`messages`, say) is the field that it must have, or else `instead`. Without
    `identify` the conversation is not looked for.

    Raises InvalidRequest, which names the field, the value and what would be right. Everything else in the body is
    checked by the server.
    """
    raw = parse_object(body, _BODY)
    model, stream = _value(raw.model), _value(raw.stream)
    if model is not None and not (isinstance(model, str) and model):
        raise InvalidRequest(f"'model' must be the id of a model, not {kind_of(raw.model)}.", param="model")
    if not isinstance(stream, bool | None):
        raise InvalidRequest(f"'stream' must be true or false, not {kind_of(raw.stream)}.", param="stream")
    has = needs if instead is None or not _is_null(getattr(raw, needs)) else instead
    if _is_null(getattr(raw, has)):
        raise InvalidRequest(f"'{needs}' is missing.", param=needs)
    if has == "input":
        _check_input(raw.input)
    if needs == "messages":
        _check_messages(raw.messages)
    return BodyFields(
        model=model,
        stream=bool(stream),
        completions=max(_count(raw.n), _count(raw.n_cmpl)) * (_prompts(raw.prompt) if needs == "prompt" else 1),
        conversation=_conversation(raw, needs) if identify else None,
    )


def parse_object(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The JSON object that the body is. Raises InvalidRequest."""
    try:
        _check_utf8(body)
        return decoder.decode(body)
    except msgspec.ValidationError:  # of the first value; what follows it was not read
        kind = kind_of(body.strip())
        raise InvalidRequest(f"The body must be a JSON object, not {kind}.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body is valid JSON so far, but nested too deeply.", code="invalid_json") from None


def _check_utf8(body: bytes) -> None:
    """msgspec does not look into the strings that it steps over."""
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _LOOK_INTO_BYTES):
        decoder.decode(body[start : start + _LOOK_INTO_BYTES])
    decoder.decode(b"", final=True)


def _value(raw: msgspec.Raw) -> Any:
    """A scalar, or Ellipsis for what is too long to be one, or a number beyond all bounds."""
    if raw is _MISSING:
        return None
    try:
        return msgspec.json.decode(raw) if memoryview(raw).nbytes <= _SHOWN_BYTES else ...
    except msgspec.DecodeError:
        return ...


def _starts_with(raw: msgspec.Raw, start: bytes) -> bool:
    return bytes(memoryview(raw)[:1]) == start


def _is_null(raw: msgspec.Raw) -> bool:
    return _starts_with(raw, b"n")


def _check_input(raw: msgspec.Raw) -> None:
    """llama-server answers 500 to these."""
    kind = bytes(memoryview(raw)[:1])
    if kind not in _KINDS:
        raise InvalidRequest(f"'input' must be a string or a list, not {kind_of(raw)}.", param="input")
    if _value(raw) == []:
        raise InvalidRequest("'input' must not be an empty list.", param="input")


def _count(raw: msgspec.Raw) -> int:
    """The server judges a bad `n`, and reads 2.0 as 2; until then a bad one counts as one."""
    count = _value(raw)
    return max(1, int(count)) if type(count) in (int, float) else 1


def _prompts(raw: msgspec.Raw) -> int:
    """As llama-server counts them: a list with a number in it is one prompt of tokens and strings, any other list has
    one prompt in each item."""
    if not _starts_with(raw, b"[") or memoryview(raw).nbytes > _LOOK_INTO_BYTES:
        return 1
    items = _LIST.decode(raw)
    if any(bytes(memoryview(item)[:1]) in _NUMBER_STARTS for item in items):
        return 1
    return max(1, len(items))


def _check_messages(raw: msgspec.Raw) -> None:
    """Refuse messages that are no objects, unless they are too long to look into."""
    if not _starts_with(raw, b"["):
        raise InvalidRequest(f"'messages' must be a list of objects, not {kind_of(raw)}.", param="messages")
    if memoryview(raw).nbytes > _LOOK_INTO_BYTES:
        return
    try:
        _MESSAGES.decode(raw)
    except msgspec.ValidationError:
        wrong = [(index, one) for index, one in enumerate(_LIST.decode(raw)) if not _starts_with(one, b"{")]
        index, message = wrong[0]
        kind = kind_of(message)
        raise InvalidRequest(f"'messages[{index}]' must be an object, not {kind}.", param="messages") from None


def _conversation(raw: _Raw, needs: str) -> str | None:
    """By `prompt_cache_key`, OpenAI's field for this; else by the messages up to the user's first one, which every
    later turn repeats, unless they are too long to look into."""
    named = _value(raw.prompt_cache_key)
    if isinstance(named, str) and named:
        return f"key {named[:256]}"
    if needs != "messages" or memoryview(raw.messages).nbytes > _LOOK_INTO_BYTES:
        return None
    messages = [bytes(item) for item in _LIST.decode(raw.messages)]
    for index, message in enumerate(messages):
        if bytes(_MESSAGE.decode(message).role) == b'"user"':
            return "head " + hashlib.blake2b(b"\n".join(messages[: index + 1]), digest_size=16).hexdigest()
    return None


def kind_of(raw: msgspec.Raw | bytes) -> str:
    """A JSON value in words, short enough for an error message."""
    text = bytes(memoryview(raw)[: _SHOWN_BYTES + 1])
    if text[:1] in _KINDS and (text[:1] != b'"' or len(text) > _SHOWN_BYTES):
        return _KINDS[text[:1]]
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return "something else"
    match value:
        case None:
            return "null"
        case "":
            return "an empty string"
        case str():
            return f"the string {value[:40]!r}"
        case bool():
            return "true" if value else "false"
        case _:
            return f"the number {value}"
