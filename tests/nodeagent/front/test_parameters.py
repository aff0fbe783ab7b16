"""A model's own parameters in the body of a request, by what JSON's readers make of the result."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.front.parameters import Parameters

NAMES = st.sampled_from(["temperature", "top_p", "seed", "stop", "ä", 'a"b'])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.dictionaries(NAMES, VALUES, max_size=4)


def test_without_parameters_there_is_nothing_to_put() -> None:
    assert Parameters.of({}, {}) is None


@given(FIELDS, FIELDS, FIELDS, st.sampled_from([None, 1, "\t"]))
def test_a_default_gives_way_to_the_request_and_an_override_does_not(
    defaults: dict[str, Any], asked: dict[str, Any], overrides: dict[str, Any], indent: Any
) -> None:
    parameters = Parameters.of(defaults, overrides)
    body = f" {json.dumps({'model': 'a', **asked}, indent=indent)}\n".encode()
    changed = body if parameters is None else parameters.put_into(body)
    assert json.loads(changed) == {**defaults, "model": "a", **asked, **overrides}


@pytest.mark.parametrize("body", [b'{"a":"}"}', b'{"a":{"b":{}}}', b'\n{ "a" : "{" } \r\n'])
def test_braces_in_values_do_not_matter(body: bytes) -> None:
    parameters = Parameters.of({"x": 1}, {"y": [2]})
    assert parameters is not None
    assert json.loads(parameters.put_into(body)) == {"x": 1, **json.loads(body), "y": [2]}
