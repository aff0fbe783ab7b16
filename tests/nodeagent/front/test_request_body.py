"""The fields that decide where a request goes, read without building the rest."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidRequest
from nodeagent.front.request_body import model_at_start, read_body, without_bom

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


def encoded(**fields: Any) -> bytes:
    return json.dumps({"model": "a", "messages": [USER], **fields}).encode()


def refusal(body: bytes, needs: str = "messages") -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        read_body(body, needs=needs)
    return refused.value


def test_model_and_stream_are_read() -> None:
    fields = read_body(encoded(stream=True, temperature=0.5), needs="messages")
    assert (fields.model, fields.stream, fields.completions) == ("a", True, 1)


@pytest.mark.parametrize("given", ["text", ["a", "b"], [1, 2], [[1], "b"], {"prompt_string": "a"}, [" "], "x" * 5000])
def test_an_input_is_a_string_or_a_list(given: Any) -> None:
    assert read_body(encoded(input=given), needs="input").completions == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (True, "'input' must be a string or a list, not true."),
        (7, "'input' must be a string or a list, not the number 7."),
        ([], "'input' must not be an empty list."),
        (None, "'input' is missing."),
    ],
)
def test_an_input_that_the_server_would_fail_on_is_refused(given: Any, message: str) -> None:
    refused = refusal(encoded(input=given), "input")
    assert (refused.message, refused.param) == (message, "input")


def test_a_body_may_have_another_field_instead() -> None:
    body = encoded(content="text")
    assert read_body(body, needs="input", instead="content").model == "a"
    assert refusal(body, "input").message == "'input' is missing."
    with pytest.raises(InvalidRequest, match="'input' is missing"):
        read_body(encoded(), needs="input", instead="content")


def test_a_body_may_name_no_model() -> None:
    assert read_body(b'{"messages": [{"role": "user"}]}', needs="messages").model is None


@pytest.mark.parametrize(
    ("fields", "needs", "completions"),
    [
        ({"n": 3}, "messages", 3),
        ({"n": None}, "messages", 1),
        ({"n": 0}, "messages", 1),
        ({"n": "2"}, "messages", 1),
        ({"n": True}, "messages", 1),
        ({"n": 2.0}, "messages", 2),
        ({"n": -3}, "messages", 1),
        ({"n": 1e300}, "messages", int(1e300)),
        ({"n_cmpl": 2}, "messages", 2),
        ({"n_cmpl": 2, "n": 1}, "messages", 2),
        ({"prompt": [{"prompt_string": "a"}, {"prompt_string": "b"}]}, "prompt", 2),
        ({"prompt": [1, "two"]}, "prompt", 1),
        ({"prompt": ["one", 2, "three"]}, "prompt", 1),
        ({"prompt": ["one", [2, 3]]}, "prompt", 2),
        ({"prompt": "once"}, "prompt", 1),
        ({"prompt": ["a", "b", "c"]}, "prompt", 3),
        ({"prompt": [[1, 2], [3]], "n": 2}, "prompt", 4),
        ({"prompt": [1, 2, 3]}, "prompt", 1),
        ({"prompt": []}, "prompt", 1),
    ],
)
def test_the_completions_that_a_request_asks_for_are_counted(
    fields: dict[str, Any], needs: str, completions: int
) -> None:
    assert read_body(encoded(**fields), needs=needs).completions == completions


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "The body is not valid JSON"),
        (b"[]", None, "The body must be a JSON object, not a list."),
        (b" 7", None, "The body must be a JSON object, not the number 7."),
        (b'{"model": "a", "messages": [}', None, "The body is not valid JSON"),
        (b'{"model": NaN}', None, "The body is not valid JSON"),
        (b'{"x": "\xff"}', None, "The body is not valid JSON"),
        (b'{"x": "\xc3', None, "The body is not valid JSON"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
        (encoded(model=7), "model", "'model' must be the id of a model, not the number 7."),
        (encoded(model=""), "model", "'model' must be the id of a model, not an empty string."),
        (encoded(model=["a"]), "model", "'model' must be the id of a model, not a list."),
        (encoded(model="x" * 5000 + '"')[:-1] + b"}", "model", "not a long string"),
        (encoded(stream="yes"), "stream", "'stream' must be true or false, not the string 'yes'."),
        (encoded(stream=1), "stream", "'stream' must be true or false, not the number 1."),
        (b'{"model": "a"}', "messages", "'messages' is missing."),
        (encoded(messages=None), "messages", "'messages' is missing."),
        (encoded(messages="hi"), "messages", "'messages' must be a list of objects, not the string 'hi'."),
        (encoded(messages=[USER, "hi"]), "messages", "'messages[1]' must be an object, not the string 'hi'."),
        (encoded(messages=[USER, None]), "messages", "'messages[1]' must be an object, not null."),
    ],
)
def test_a_bad_body_is_refused_with_the_field_and_what_would_be_right(
    body: bytes, param: str | None, message: str
) -> None:
    refused = refusal(body)
    assert message in refused.message
    assert refused.param == param
    assert refused.code == ("invalid_json" if param is None else None)


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1" * 400, b"1" * 2000])
def test_a_number_without_bound_is_judged_by_the_server_or_refused(number: bytes) -> None:
    body = b'{"n": %b, "prompt_cache_key": %b, "messages": [{"role": %b}]}' % (number, number, number)
    assert read_body(body, needs="messages").conversation is None
    assert refusal(b'{"model": %b, "messages": []}' % number).param == "model"
    assert refusal(b'{"stream": %b, "messages": []}' % number).param == "stream"


def test_a_byte_order_mark_is_dropped() -> None:
    assert read_body(without_bom(b"\xef\xbb\xbf" + encoded()), needs="messages").model == "a"
    assert without_bom(encoded()) == encoded()


def test_a_conversation_keeps_its_key_from_turn_to_turn() -> None:
    def key(*messages: dict[str, str], **more: Any) -> str | None:
        return read_body(encoded(messages=list(messages), **more), needs="messages").conversation

    answer = {"role": "assistant", "content": "hi"}
    first = key(SYSTEM, USER)
    assert first is not None
    assert key(SYSTEM, USER, answer, USER) == first
    assert key(USER) != first
    assert key(SYSTEM) is None
    assert key(SYSTEM, USER, prompt_cache_key="k") == key(USER, prompt_cache_key="k") == "key k"
    assert key(SYSTEM, USER, prompt_cache_key=7) == first
    assert read_body(encoded(prompt="once"), needs="prompt").conversation is None
    assert read_body(encoded(prompt="once", messages=[1, USER]), needs="prompt").conversation is None
    assert read_body(encoded(messages=[USER]), needs="messages", identify=False).conversation is None


def test_a_huge_body_of_tiny_objects_is_read_in_little_memory() -> None:
    body = b'{"model":"a","messages":[' + b"{}," * 2_000_000 + b"{}]}"
    tracemalloc.start()
    try:
        assert read_body(body, needs="messages").model == "a"
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(document=JSON, ascii_only=st.booleans())
def test_any_document_is_read_or_refused(document: Any, ascii_only: bool) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only).encode()
    try:
        fields = read_body(body, needs="messages")
    except InvalidRequest as refused:
        assert refused.message  # noqa: PT017  (both outcomes are right)
    else:
        assert fields.model == document.get("model")


@given(body=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_body(body, needs="messages")


@pytest.mark.parametrize("body", [b'{"n": 1e999, "messages": []}', b'{"messages": [{"role": 1e999}]}'])
def test_a_number_beyond_all_bounds_is_left_to_the_server(body: bytes) -> None:
    fields = read_body(body, needs="messages")
    assert (fields.completions, fields.conversation) == (1, None)


@pytest.mark.parametrize("field", ["model", "stream"])
def test_a_number_beyond_all_bounds_is_refused_where_something_else_must_be(field: str) -> None:
    assert refusal(b'{"messages": [], "%s": 1e999}' % field.encode()).param == field


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"a","messages":[', "a"),
        (b'\xef\xbb\xbf \n{ "model" :\t"a/b:latest" , ', "a/b:latest"),
        (b'{"model":"\\u0061\\"b"', 'a"b'),
        (b'{"model":"a', None),
        (b'{"model":null,', None),
        (b'{"model":"",', None),
        (b'{"model":"\\x"', None),
        (b'{"model":"\xff"', None),
        (b'{"messages":[{"model":"a"}]', None),
        (b'{"' + b"m" * 10_000, None),
        (b'{"model":"' + b"m" * 10_000 + b'"', None),
        (b"", None),
    ],
)
def test_the_model_is_known_as_soon_as_the_first_field_is_there(body: bytes, model: str | None) -> None:
    assert model_at_start(body) == model
