"""Ollama's requests as those that llama-server understands. Pure.

The API is that of https://docs.ollama.com/api. What describes how a model is loaded (`num_ctx`, `num_gpu`,
`keep_alive`) is for this node's configuration to say, and ignored here.

Only what has another form at llama-server is built as Python objects; everything else is copied as it is in the body.
"""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from nodeagent.errors import InvalidRequest
from nodeagent.front.ollama_answers import EmbeddingsTranslator, LoadTranslator, TextTranslator, loaded_line
from nodeagent.front.request_body import kind_of
from nodeagent.front.translation import Translation

# Each object and text that is built takes some hundred bytes of memory, and a body of 64 MiB may have 20 million. A
# prompt with so many braces or quotes is longer than any context.
_MAX_MARKS: Final = {b"{": 2**18, b'"': 2**20}
# Each takes some microseconds, in which nothing else is served.
_MAX_MESSAGES: Final = 10_000
_MAX_IMAGES: Final = 1_000
_NO_DURATION: Final = re.compile(r"0+(?:\.0+)?(?:ns|us|µs|ms|s|m|h)?")
# How images of these types begin in base64.
_IMAGES: Final = {"iVBOR": "png", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp"}
_NULL: Final = msgspec.Raw(b"null")


class _Options(msgspec.Struct):
    """Those options that llama-server has too. Others are ignored, as Ollama does."""

    temperature: msgspec.Raw = _NULL
    top_p: msgspec.Raw = _NULL
    top_k: msgspec.Raw = _NULL
    min_p: msgspec.Raw = _NULL
    typical_p: msgspec.Raw = _NULL
    seed: msgspec.Raw = _NULL
    stop: msgspec.Raw = _NULL
    repeat_last_n: msgspec.Raw = _NULL
    repeat_penalty: msgspec.Raw = _NULL
    presence_penalty: msgspec.Raw = _NULL
    frequency_penalty: msgspec.Raw = _NULL
    mirostat: msgspec.Raw = _NULL
    mirostat_tau: msgspec.Raw = _NULL
    mirostat_eta: msgspec.Raw = _NULL
    num_keep: msgspec.Raw = _NULL
    # Some clients have their numbers as floats.
    num_predict: float | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _ToolCall(msgspec.Struct):
    function: _Function
    id: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: msgspec.Raw = _NULL
    thinking: msgspec.Raw = _NULL
    images: list[str] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Generation(msgspec.Struct):
    """What chat and generate have in common."""

    model: str | None = None
    stream: bool | None = None
    format: msgspec.Raw = _NULL
    options: _Options | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None


class _Chat(_Generation):
    messages: list[_Message] | None = None
    tools: msgspec.Raw = _NULL


class _Generate(_Generation):
    prompt: msgspec.Raw = _NULL
    system: msgspec.Raw = _NULL
    suffix: str | None = None
    template: str | None = None
    images: list[str] | None = None
    raw: bool | None = None


class _Embed(msgspec.Struct):
    model: str | None = None
    input: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL
    dimensions: int | None = None


_CHAT: Final = msgspec.json.Decoder(_Chat)
_GENERATE: Final = msgspec.json.Decoder(_Generate)
_EMBED: Final = msgspec.json.Decoder(_Embed)


def translate(path: str, body: bytes, default_model: str | None, now: float) -> Translation:
    """The request for the server that this body means on one of Ollama's paths. Raises InvalidRequest."""
    return _TRANSLATIONS[path](body, default_model or "", now)


def _chat(body: bytes, default_model: str, now: float) -> Translation:
    _refuse_unbounded(body)
    chat = _decode(_CHAT, body)
    model = chat.model or default_model
    if not chat.messages:
        return _load(chat, model, is_chat=True)
    content = _generation(chat, model)
    content["messages"] = _messages(chat.messages)
    if not _is_null(chat.tools):
        content["tools"] = chat.tools
    _format_as_openai(chat.format, content)
    translator = TextTranslator(
        model, now, streams=chat.stream is not False, is_chat=True, thinks=chat.think is not False
    )
    return Translation("/v1/chat/completions", msgspec.json.encode(content), translator)


def _generate(body: bytes, default_model: str, now: float) -> Translation:
    _refuse_unbounded(body)
    generate = _decode(_GENERATE, body)
    model = generate.model or default_model
    if generate.suffix:
        raise InvalidRequest("'suffix' is not supported here: use llama.cpp's own path, /infill.", param="suffix")
    if generate.template:
        raise InvalidRequest(
            "'template' is not supported here: the model's own is used, or none with \"raw\": true.", param="template"
        )
    _text("prompt", generate.prompt)
    if bytes(generate.prompt) in (b"null", b'""') and not generate.images:
        return _load(generate, model, is_chat=False)
    content = _generation(generate, model)
    thinks = generate.think is not False
    translator = TextTranslator(model, now, streams=generate.stream is not False, is_chat=False, thinks=thinks)
    if generate.raw:
        if generate.images:
            raise InvalidRequest("'images' and \"raw\": true exclude each other.", param="images")
        content["prompt"] = generate.prompt
        content.pop("chat_template_kwargs", None)
        _format_as_llama_cpp(generate.format, content)
        return Translation("/v1/completions", msgspec.json.encode(content), translator)
    asked = _Message(role="user", content=generate.prompt, images=generate.images)
    system = [] if _is_null(_text("system", generate.system)) else [_Message(role="system", content=generate.system)]
    content["messages"] = _messages([*system, asked])
    _format_as_openai(generate.format, content)
    return Translation("/v1/chat/completions", msgspec.json.encode(content), translator)


def _embed(body: bytes, default_model: str, now: float, *, is_old: bool = False) -> Translation:
    embed = _decode(_EMBED, body)
    field = "prompt" if is_old else "input"
    value = _text(field, embed.prompt) if is_old else embed.input
    if _is_null(value):
        raise InvalidRequest(f"'{field}' is missing.", param=field)
    if embed.dimensions is not None and embed.dimensions < 1:
        raise InvalidRequest(f"'dimensions' must be 1 or more, not {embed.dimensions}.", param="dimensions")
    model = embed.model or default_model
    translator = EmbeddingsTranslator(model, now, is_old=is_old, dimensions=embed.dimensions)
    return Translation("/v1/embeddings", msgspec.json.encode({"model": model or None, "input": value}), translator)


def _old_embed(body: bytes, default_model: str, now: float) -> Translation:
    return _embed(body, default_model, now, is_old=True)


_TRANSLATIONS: Final[dict[str, Callable[[bytes, str, float], Translation]]] = {
    "/api/chat": _chat,
    "/api/generate": _generate,
    "/api/embed": _embed,
    "/api/embeddings": _old_embed,
}


def _load(asked: _Generation, model: str, *, is_chat: bool) -> Translation:
    """Without a prompt, the model is to be loaded: tokenizing nothing needs it, and none of its slots. With a
    `keep_alive` of 0 it is to be unloaded; that is for this node to decide, so nothing is done."""
    translator = LoadTranslator(model, is_chat=is_chat)
    keep_alive = asked.keep_alive
    is_zero = keep_alive == 0 or (isinstance(keep_alive, str) and _NO_DURATION.fullmatch(keep_alive) is not None)
    answer = loaded_line(model, is_chat=is_chat, done_reason="unload") if is_zero else None
    return Translation(
        "/tokenize", msgspec.json.encode({"model": model or None, "content": ""}), translator, answer=answer
    )


def _generation(asked: _Generation, model: str) -> dict[str, Any]:
    """The fields that both have."""
    content: dict[str, Any] = {"model": model or None, "stream": asked.stream is not False}
    if content["stream"]:
        content["stream_options"] = {"include_usage": True}
    if asked.options is not None:
        given = {name: getattr(asked.options, name) for name in asked.options.__struct_fields__}
        content |= {name: value for name, value in given.items() if isinstance(value, msgspec.Raw) and _is_set(value)}
        if "num_keep" in content:
            content["n_keep"] = content.pop("num_keep")
        if asked.options.num_predict is not None:  # Ollama's -2 is "until the context is full"
            content["max_tokens"] = max(int(asked.options.num_predict), -1)
    if isinstance(asked.think, bool):
        content["chat_template_kwargs"] = {"enable_thinking": asked.think}
    elif asked.think:
        content["chat_template_kwargs"] = {"enable_thinking": True, "reasoning_effort": asked.think}
    return content


def _messages(messages: list[_Message]) -> list[dict[str, Any]]:
    """As OpenAI has them. Ollama's clients number neither calls of tools nor their results: the results are taken in
    the order of the calls."""
    if len(messages) > _MAX_MESSAGES:
        raise InvalidRequest(f"'messages' has {len(messages)} items, more than {_MAX_MESSAGES}.", param="messages")
    images_count = sum(len(message.images or ()) for message in messages)
    if images_count > _MAX_IMAGES:
        raise InvalidRequest(f"'images' has {images_count} items in all, more than {_MAX_IMAGES}.", param="images")
    open_calls: list[tuple[str, str]] = []
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        content = msgspec.Raw(b'""') if _is_null(_text(f"{where}.content", message.content)) else message.content
        made: dict[str, Any] = {"role": message.role, "content": content}
        if message.images:
            images = [_image(image, f"{where}.images[{place}]") for place, image in enumerate(message.images)]
            made["content"] = [{"type": "text", "text": content}, *images]
        if not _is_null(_text(f"{where}.thinking", message.thinking)):
            made["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [(call.id or f"call_{index}_{place}", call) for place, call in enumerate(message.tool_calls)]
            open_calls = [(call_id, call.function.name) for call_id, call in calls]
            made["tool_calls"] = [_call(call_id, call) for call_id, call in calls]
        if message.role == "tool":
            made["tool_call_id"] = message.tool_call_id or _answered(open_calls, message.tool_name)
            if message.tool_name:
                made["name"] = message.tool_name
        found.append(made)
    return found


def _answered(open_calls: list[tuple[str, str]], name: str | None) -> str:
    """The id of the first call of that tool that has no result yet, else of the first; it is taken out of the list."""
    place = next((place for place, (_id, called) in enumerate(open_calls) if called == name), 0)
    return open_calls.pop(place)[0] if open_calls else "call"


def _call(call_id: str, call: _ToolCall) -> dict[str, Any]:
    """Its arguments are an object at Ollama, and a string with JSON at OpenAI."""
    arguments = bytes(call.function.arguments).decode(errors="replace")
    return {"id": call_id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _image(image: str, where: str) -> dict[str, Any]:
    try:
        base64.b64decode(image[:64], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"'{where}' must be an image in base64, not {image[:40]!r}.", param="images") from None
    kind = next((kind for start, kind in _IMAGES.items() if image.startswith(start)), "jpeg")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}}


def _format_as_openai(given: msgspec.Raw, content: dict[str, Any]) -> None:
    schema = _schema(given)
    if schema is _ANY_JSON:
        content["response_format"] = {"type": "json_object"}
    elif schema is not None:
        content["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _format_as_llama_cpp(given: msgspec.Raw, content: dict[str, Any]) -> None:
    schema = _schema(given)
    if schema is not None:
        content["json_schema"] = schema


_ANY_JSON: Final = msgspec.Raw(b"{}")


def _schema(given: msgspec.Raw) -> msgspec.Raw | None:
    """The JSON schema that `format` names, None if there is none."""
    text = bytes(given)
    if text in (b"null", b'""'):
        return None
    if text == b'"json"':
        return _ANY_JSON
    if text.startswith(b"{"):
        return given
    raise InvalidRequest(f"'format' must be \"json\" or a JSON schema, not {kind_of(given)}.", param="format")


def _refuse_unbounded(body: bytes) -> None:
    for mark, most in _MAX_MARKS.items():
        if body.count(mark) > most:
            raise InvalidRequest(
                f"The body has more than {most} characters {mark.decode()!r}, the most that is translated."
            )


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        name = place.strip("`.")
        raise InvalidRequest(
            f"'{name}' is wrong: {what}." if name else f"The body is wrong: {what}.", param=name or None
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body is valid JSON so far, but nested too deeply.", code="invalid_json") from None


def _text(where: str, value: msgspec.Raw) -> msgspec.Raw:
    """The value, which must be a string or null."""
    if not _is_null(value) and bytes(memoryview(value)[:1]) != b'"':
        raise InvalidRequest(f"'{where}' must be a string, not {kind_of(value)}.", param=where)
    return value


def _is_null(value: msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b"n"


def _is_set(value: msgspec.Raw) -> bool:
    return not _is_null(value)
