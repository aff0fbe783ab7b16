"""What is made of a request's headers and of the fields of its body."""

from typing import cast

import pytest

from nodeagent.errors import InvalidRequest
from nodeagent.front.openai import conversation_of, headers_of_json, model_of_name
from nodeagent.front.request_body import BodyFields
from nodeagent.front.seam import ModelCard, Node


class TwoModels:
    """A node with two models, whose default is the given one."""

    def __init__(self, default_model_id: str | None) -> None:
        self.default_model_id = default_model_id
        self.cors_origins = ()

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", (), 0), ModelCard("b", (), 0)]


def fields(*, model: str | None = None, conversation: str | None = None) -> BodyFields:
    return BodyFields(model=model, stream=False, completions=1, conversation=conversation)


def test_a_request_without_a_model_gets_the_nodes_default() -> None:
    node = cast(Node, TwoModels("b"))
    assert model_of_name(node, None) == "b"
    assert model_of_name(node, "a") == "a"


def test_a_request_without_a_model_is_refused_with_the_models_if_there_is_no_default() -> None:
    with pytest.raises(InvalidRequest) as refused:
        model_of_name(cast(Node, TwoModels(None)), None)
    assert refused.value.param == "model"
    assert refused.value.message == "'model' is missing, and this node has no default. It serves: a, b."


def test_the_clients_session_comes_before_what_the_body_says() -> None:
    said = fields(conversation="key k")
    assert conversation_of("s", said) == conversation_of("s", fields()) == "session s"
    assert conversation_of(None, said) == conversation_of("", said) == "key k"
    assert conversation_of(None, fields()) is None


def test_a_session_and_a_key_of_the_body_are_never_the_same_conversation() -> None:
    assert conversation_of("key k", fields()) != conversation_of(None, fields(conversation="key k"))


@pytest.mark.parametrize("given", [b"multipart/form-data; boundary=x", b"text/plain", None])
def test_the_server_gets_the_type_that_the_body_has(given: bytes | None) -> None:
    headers = [(b"accept", b"*/*")] + ([(b"content-type", given)] if given else [])
    assert headers_of_json(headers) == [(b"content-type", b"application/json"), (b"accept", b"*/*")]
