"""What of a request would make a server fetch something. The meaning of JSON is the oracle."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import RemoteMediaForbidden
from nodeagent.front.remote_media import refuse_remote_media

URL = "https://internal.example/x.png"


def place(body: Any) -> str | None:
    """Where the refusal says that a URL is, None if the body passes."""
    try:
        refuse_remote_media(body if isinstance(body, bytes) else json.dumps(body).encode())
    except RemoteMediaForbidden as refused:
        return refused.param
    return None


def chat(*parts: Any, role: str = "user") -> Any:
    return {"model": "a", "messages": [{"role": role, "content": list(parts)}]}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (chat({"type": "image_url", "image_url": {"url": URL}}), "messages[0].content[0].image_url.url"),
        (chat({"type": "image_url", "image_url": URL}), "messages[0].content[0].image_url"),
        (chat({"text": "x"}, {"video_url": {"url": "HTTP://x"}}), "messages[0].content[1].video_url.url"),
        (chat({"input_audio": {"data": URL}}), "messages[0].content[0].input_audio.data"),
        (chat({"image_url": {"url": "file:///etc/passwd"}}), "messages[0].content[0].image_url.url"),
        (chat({"image_url": {"url": "\t " + URL}}), "messages[0].content[0].image_url.url"),
        (chat({"type": "image", "source": {"type": "url", "url": URL}}), "messages[0].content[0].source.url"),
        (
            chat({"type": "tool_result", "content": [{"type": "image", "source": {"url": URL}}]}),
            "messages[0].content[0].content[0].source.url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"content": [{"type": "input_file", "file_url": URL}]}]}, "input[0].content[0].file_url"),
        ({"input": [{"output": [{"image_url": URL}]}]}, "input[0].output[0].image_url"),
        ({"name": "x", "input": [{"content": [{"image_url": URL}]}]}, "input[0].content[0].image_url"),
        (chat({"image_url": {"url": "http-internal.example/x"}}), "messages[0].content[0].image_url.url"),
    ],
)
def test_a_url_that_a_server_would_fetch_is_named(body: Any, where: str) -> None:
    assert place(body) == where


@pytest.mark.parametrize(
    "body",
    [
        chat({"type": "text", "text": URL}),
        chat({"type": "text", "text": f'{{"url": "{URL}"}}'}),
        chat({"image_url": {"url": "data:image/png;base64,AAAA"}}),
        chat({"input_audio": {"data": "UklGR", "format": "wav"}}),
        {"messages": [{"role": "user", "content": URL}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": f'{{"url": "{URL}"}}'}}]}]},
        chat({"type": "tool_use", "name": "fetch", "input": {"url": URL}}, role="assistant"),
        chat({"type": "tool_use", "name": "fetch", "input": {"image_url": URL}}, role="assistant"),
        {"messages": [], "tools": [{"function": {"parameters": {"default": {"url": URL}}}}], "metadata": {"url": URL}},
        {"messages": [], "response_format": {"json_schema": {"schema": {"$id": URL}}}},
        b"[]",
    ],
)
def test_what_is_text_or_comes_with_the_request_passes(body: Any) -> None:
    assert place(body) is None


def escaped(text: str, which: list[bool]) -> str:
    """The text in JSON, with some of its characters escaped."""
    pairs = zip(text, which + [False] * len(text), strict=False)
    return "".join(
        f"\\u{ord(one):04X}" if flag else "\\/" if one == "/" and len(which) % 2 else one for one, flag in pairs
    )


FLAGS = st.lists(st.booleans(), max_size=12)


@given(FLAGS, FLAGS, FLAGS, st.text(" \t\r\n", max_size=3), st.sampled_from(["http", "HTTPS", "File"]))
def test_no_escape_hides_a_url(key: list[bool], inner: list[bool], value: list[bool], gap: str, scheme: str) -> None:
    body = (
        f'{{"messages":[{{"content":[{{"{escaped("image_url", key)}"{gap}:{gap}{{"{escaped("url", inner)}"{gap}:{gap}"'
        f'{escaped(f"{scheme}://x/y", value)}"}}}}]}}]}}'
    ).encode()
    assert json.loads(body)["messages"][0]["content"][0]["image_url"]["url"] == f"{scheme}://x/y"
    assert place(body) == "messages[0].content[0].image_url.url"


NAMES = st.sampled_from(["content", "image_url", "url", "source", "text", "input", "type"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([URL, "data:x", "tool_use", f'"url": "{URL}"', "\\", None, 1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "image_url", "url", "source", "text", "input", "name"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def urls(value: Any) -> bool:
    """Whether a URL is where a server fetches it, straight from the meaning of the fields."""
    if isinstance(value, list):
        return any(urls(item) for item in value)
    if not isinstance(value, dict):
        return False
    for name, inner in value.items():
        if name in ("image_url", "source"):
            direct = [inner, inner.get("url") if isinstance(inner, dict) else None]
            if any(isinstance(one, str) and one.startswith("http") for one in direct):
                return True
        elif (name == "content" or (name == "input" and value.get("type") != "tool_use")) and urls(inner):
            return True
    return False


@given(JSON)
def test_any_body_is_judged_by_what_its_fields_mean(messages: Any) -> None:
    assert (place({"messages": messages}) is not None) == urls(messages)


def test_more_values_than_are_looked_into_are_refused_with_little_memory() -> None:
    body = json.dumps(chat({"image_url": {"url": URL}}))[:-1] + ', "x": [' + ",".join(["{}"] * 600_000) + "]}"
    assert place(body.encode()) == "messages"


@pytest.mark.parametrize("number", ["1e999", "9" * 5000])
def test_a_number_beyond_all_bounds_beside_a_url_is_refused(number: str) -> None:
    body = json.dumps(chat({"image_url": {"url": URL}}))[:-1] + f', "x": {number}}}'
    assert place(body.encode()) == "messages"


def test_a_url_below_more_messages_than_there_are_is_refused() -> None:
    part: Any = {"image_url": {"url": URL}}
    for _ in range(30):
        part = {"content": [part]}
    found = place(chat(part))
    assert found is not None
    assert found.startswith("messages[0].content[0].content[0]")


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    assert place(b'{"x":' * 100_000 + b'{"url":"http://x"}' + b"}" * 100_000) == "messages"
