"""Ollama's requests, and what is made of them for llama-server."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidRequest
from nodeagent.front.endpoints import ENDPOINTS, Dialect
from nodeagent.front.ollama_requests import translate
from nodeagent.front.request_body import read_body
from nodeagent.front.translation import Translation

HELLO = [{"role": "user", "content": "hello"}]
PNG = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def translated(path: str, **fields: Any) -> Translation:
    return translate(path, json.dumps(fields).encode(), "default", 0.0)


def sent(path: str, **fields: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(translated(path, **fields).body)
    return content


def test_a_chat_is_streamed_with_its_usage_unless_it_says_otherwise() -> None:
    said = translated("/api/chat", model="m", messages=HELLO)
    assert (said.path, said.translator.streams) == ("/v1/chat/completions", True)
    assert said.translator.content_type == "application/x-ndjson"
    assert json.loads(said.body) == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": HELLO,
    }
    whole = translated("/api/chat", model="m", messages=HELLO, stream=False)
    assert (whole.translator.streams, whole.translator.content_type) == (False, "application/json")
    assert json.loads(whole.body) == {"model": "m", "stream": False, "messages": HELLO}


def test_options_that_llama_server_has_are_passed_on_and_those_of_loading_are_not() -> None:
    options = {
        "temperature": 0.5,
        "top_k": 3,
        "seed": 7,
        "stop": ["a", "b"],
        "num_keep": 4,
        "num_predict": 9,
        "num_ctx": 8192,
        "num_gpu": 1,
        "top_p": None,
    }
    content = sent("/api/chat", messages=HELLO, options=options)
    assert {name: content[name] for name in ("temperature", "top_k", "seed", "stop", "n_keep", "max_tokens")} == {
        "temperature": 0.5,
        "top_k": 3,
        "seed": 7,
        "stop": ["a", "b"],
        "n_keep": 4,
        "max_tokens": 9,
    }
    assert not {"num_ctx", "num_gpu", "top_p", "num_predict", "num_keep", "options"} & set(content)


@pytest.mark.parametrize(("num_predict", "max_tokens"), [(-1, -1), (-2, -1), (0, 0), (5, 5), (5.0, 5)])
def test_without_a_limit_the_answer_may_be_as_long_as_the_context(num_predict: float, max_tokens: int) -> None:
    assert sent("/api/generate", prompt="x", options={"num_predict": num_predict})["max_tokens"] == max_tokens


@pytest.mark.parametrize(
    ("think", "arguments"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
        (None, None),
    ],
)
def test_thinking_is_an_argument_of_the_template(think: Any, arguments: dict[str, Any] | None) -> None:
    assert sent("/api/chat", messages=HELLO, think=think).get("chat_template_kwargs") == arguments


def test_a_format_is_json_or_a_schema() -> None:
    for path, field in (("/api/chat", {"messages": HELLO}), ("/api/generate", {"prompt": "x"})):
        assert sent(path, **field, format="json")["response_format"] == {"type": "json_object"}
        assert sent(path, **field, format=SCHEMA)["response_format"]["json_schema"]["schema"] == SCHEMA
        for none in ("", None):
            assert "response_format" not in sent(path, **field, format=none)
    raw = sent("/api/generate", prompt="x", raw=True, format=SCHEMA)
    assert (raw["json_schema"], raw["prompt"]) == (SCHEMA, "x")
    assert sent("/api/generate", prompt="x", raw=True, format="json")["json_schema"] == {}


def test_calls_of_tools_get_ids_and_their_results_are_matched_by_name_and_order() -> None:
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call("a", x=1), call("b"), call("a")]},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of a"},
        {"role": "tool", "content": "of a again", "tool_name": "a"},
        {"role": "tool", "content": "of nobody"},
    ]
    tools = [{"type": "function", "function": {"name": "a", "parameters": {}}}]
    content = sent("/api/chat", messages=messages, tools=tools)
    assert content["tools"] == tools
    asked, said, *results = content["messages"]
    assert asked == HELLO[0]
    assert said["reasoning_content"] == "hm"
    assert [(it["id"], it["type"], it["function"]) for it in said["tool_calls"]] == [
        ("call_1_0", "function", {"name": "a", "arguments": '{"x": 1}'}),
        ("call_1_1", "function", {"name": "b", "arguments": "{}"}),
        ("call_1_2", "function", {"name": "a", "arguments": "{}"}),
    ]
    assert [it["tool_call_id"] for it in results] == ["call_1_1", "call_1_0", "call_1_2", "call"]
    assert results[0]["name"] == "b"


def test_images_become_parts_of_the_content_with_their_type() -> None:
    for image, kind in ((PNG, "png"), ("/9j/4AAQ", "jpeg"), ("R0lGODlh", "gif"), ("UklGRg==", "webp")):
        [message] = sent("/api/chat", messages=[{"role": "user", "content": "what?", "images": [image]}])["messages"]
        assert message["content"] == [
            {"type": "text", "text": "what?"},
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}},
        ]
    [generated] = sent("/api/generate", prompt="", images=[PNG])["messages"]
    assert len(generated["content"]) == 2


def test_generate_is_a_chat_with_one_message_or_without_a_template_a_completion() -> None:
    said = translated("/api/generate", model="m", prompt="hello", system="be brief")
    assert said.path == "/v1/chat/completions"
    assert json.loads(said.body)["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]
    raw = translated("/api/generate", model="m", prompt="hello", raw=True, think=True, stream=False)
    assert raw.path == "/v1/completions"
    assert json.loads(raw.body) == {"model": "m", "stream": False, "prompt": "hello"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/chat", {}),
        ("/api/chat", {"messages": [], "keep_alive": "5m"}),
        ("/api/generate", {"prompt": ""}),
        ("/api/generate", {"keep_alive": -1}),
    ],
)
def test_a_request_without_a_prompt_only_loads_the_model(path: str, fields: dict[str, Any]) -> None:
    said = translated(path, **fields)
    assert (said.path, json.loads(said.body)) == ("/tokenize", {"model": "default", "content": ""})
    assert said.answer is None
    answer = json.loads(said.translator.end(0.0, 1.0))
    assert (answer["model"], answer["done"], answer["done_reason"]) == ("default", True, "load")
    assert ("message" in answer, "response" in answer) == (path == "/api/chat", path == "/api/generate")


@pytest.mark.parametrize("keep_alive", [0, 0.0, "0", "0s", "0m", "0.0h"])
def test_a_request_to_unload_is_answered_and_nothing_is_done(keep_alive: Any) -> None:
    for path in ("/api/chat", "/api/generate"):
        answer = translated(path, keep_alive=keep_alive).answer
        assert answer is not None
        assert json.loads(answer)["done_reason"] == "unload"
        assert translated(path, keep_alive="10s").answer is None


def test_a_keep_alive_of_zero_beside_a_prompt_is_ignored() -> None:
    assert translated("/api/chat", messages=HELLO, keep_alive=0).answer is None


def test_texts_to_embed_are_passed_on() -> None:
    for value in ("one", ["one", "two"]):
        said = translated("/api/embed", model="e", input=value, truncate=True)
        assert (said.path, json.loads(said.body)) == ("/v1/embeddings", {"model": "e", "input": value})
    assert json.loads(translated("/api/embeddings", model="e", prompt="one").body)["input"] == "one"


def test_each_translation_is_a_valid_request_to_one_of_the_servers_paths() -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/api/chat": {"messages": HELLO},
        "/api/generate": {"prompt": "x"},
        "/api/embed": {"input": "x"},
        "/api/embeddings": {"prompt": "x"},
    }
    assert set(bodies) == {path for path, endpoint in ENDPOINTS.items() if endpoint.dialect is Dialect.OLLAMA}
    for path, fields in bodies.items():
        said = translated(path, **fields)
        endpoint = ENDPOINTS[said.path]
        assert read_body(said.body, needs=endpoint.needs, instead=endpoint.instead).model == "default"
        assert (endpoint.task, endpoint.slots) == (ENDPOINTS[path].task, ENDPOINTS[path].slots)


@pytest.mark.parametrize(
    ("path", "fields", "message", "param"),
    [
        ("/api/chat", {"messages": [{"content": "x"}]}, "'messages[0]' is wrong: Object missing", "messages[0]"),
        ("/api/chat", {"messages": [{"role": 1}]}, "'messages[0].role' is wrong: Expected `str`", "messages[0].role"),
        ("/api/chat", {"messages": {}}, "'messages' is wrong: Expected `array", "messages"),
        (
            "/api/chat",
            {"messages": [{"role": "user", "content": ["x"]}]},
            "'messages[0].content' must be a string, not a list.",
            "messages[0].content",
        ),
        (
            "/api/chat",
            {"messages": [{"role": "user", "images": [PNG, "http://x"]}]},
            "'messages[0].images[1]' must be an image in base64, not 'http://x'.",
            "images",
        ),
        ("/api/chat", {"messages": HELLO, "format": "xml"}, "'format' must be \"json\" or a JSON schema", "format"),
        ("/api/chat", {"messages": HELLO, "format": 3}, "not the number 3", "format"),
        ("/api/chat", {"messages": HELLO, "stream": "no"}, "'stream' is wrong: Expected `bool | null`", "stream"),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": "x"}}, "'options.num_predict'", None),
        ("/api/generate", {"prompt": 3}, "'prompt' must be a string, not the number 3.", "prompt"),
        ("/api/generate", {"prompt": "x", "system": 3}, "'system' must be a string", "system"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, "'suffix' is not supported here", "suffix"),
        ("/api/generate", {"prompt": "x", "template": "y"}, "'template' is not supported here", "template"),
        ("/api/generate", {"prompt": "x", "raw": True, "images": [PNG]}, "exclude each other", "images"),
        ("/api/embed", {}, "'input' is missing.", "input"),
        ("/api/embeddings", {"input": "x"}, "'prompt' is missing.", "prompt"),
        ("/api/embeddings", {"prompt": ["x"]}, "'prompt' must be a string, not a list.", "prompt"),
        ("/api/embed", {"input": "x", "dimensions": 0}, "'dimensions' must be 1 or more, not 0.", "dimensions"),
    ],
)
def test_what_is_wrong_is_named(path: str, fields: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        translated(path, **fields)
    assert message in refused.value.message
    assert param in (None, refused.value.param)


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 5000])
def test_a_number_beyond_all_bounds_is_refused(number: bytes) -> None:
    body = b'{"messages": [{"role": "user"}], "options": {"num_predict": %s}}' % number
    with pytest.raises(InvalidRequest):
        translate("/api/chat", body, None, 0.0)


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": }', b'{"model": "\xff"}', b'{"tools": ' + b"[" * 10_000])
def test_a_body_that_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        translate("/api/chat", body, None, 0.0)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="The body is wrong: Expected `object`"):
        translate("/api/chat", body, None, 0.0)


@pytest.mark.parametrize(
    ("start", "item", "count", "message"),
    [
        (b"", b'{"role":""}', 2**18, "more than 262144 characters"),
        (b'{"role":"","images":[', b'""', 2**19, "more than 1048576 characters"),
        (b"", b'{"role":""}', 10_001, "'messages' has 10001 items, more than 10000"),
        (b'{"role":"","images":[', b'""', 1001, "'images' has 1001 items in all, more than 1000"),
    ],
)
def test_a_body_with_more_items_than_any_conversation_is_refused_at_once(
    start: bytes, item: bytes, count: int, message: str
) -> None:
    body = b'{"messages": [' + start + b",".join([item] * count) + (b"]}" if start else b"") + b"]}"
    with pytest.raises(InvalidRequest, match=message):
        translate("/api/chat", body, None, 0.0)


def test_texts_to_embed_are_not_limited_by_that() -> None:
    texts = ["a"] * 2**20
    assert json.loads(translated("/api/embed", input=texts).body)["input"] == texts


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "images", "function"]), inner),
)
_FIELDS = ["model", "messages", "prompt", "input", "system", "images", "stream", "format", "options", "think", "tools"]


@given(
    path=st.sampled_from(["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"]),
    fields=st.dictionaries(st.sampled_from([*_FIELDS, "raw", "keep_alive", "dimensions"]), _JSON),
)
def test_any_body_is_translated_into_valid_json_or_refused(path: str, fields: dict[str, Any]) -> None:
    try:
        said = translate(path, json.dumps(fields).encode(), None, 0.0)
    except InvalidRequest:
        return
    assert isinstance(json.loads(said.body), dict)
