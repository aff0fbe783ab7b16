"""The OpenAPI document is that of the routes."""

import json
from typing import Any, cast

from trio.testing import MockClock

from fakes.asgi import Exchange
from nodeagent.front.app import create_app
from nodeagent.front.endpoints import ENDPOINTS, Dialect
from nodeagent.front.openapi import NOTES, document
from nodeagent.front.seam import Node


class NoNode:
    """What `create_app` needs to make the routes."""

    max_request_bytes = 1
    scheduler: Any = None
    cors_origins = ()


APP = create_app(cast(Node, NoNode()))
DOCUMENT = document(APP.url_map)
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}


def test_each_route_has_an_operation_of_its_own() -> None:
    rules = {
        f"{method} {rule.rule}"
        for rule in APP.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert len(OPERATIONS) == len(rules)
    assert len({operation["operationId"] for operation in OPERATIONS.values()}) == len(rules)


def test_each_route_that_is_not_inference_has_a_note_and_each_note_a_route() -> None:
    assert set(OPERATIONS) - {f"POST {path}" for path in ENDPOINTS} == set(NOTES)


def test_what_needs_the_operators_token_says_so() -> None:
    protected = {name for name, operation in OPERATIONS.items() if operation.get("security") == [{"operator": []}]}
    assert {"POST /v1/node/drain", "GET /v1/node/events", "PUT /upstream/{where}"} <= protected
    assert "DELETE /v1/node/requests/{number}" in protected
    assert not {"GET /v1/node/queue", "GET /v1/node/requests", "POST /v1/embeddings", "GET /metrics"} & protected


def test_a_body_has_what_its_path_needs() -> None:
    for path, endpoint in ENDPOINTS.items():
        body = OPERATIONS[f"POST {path}"]["requestBody"]
        [(kind, content)] = body["content"].items()
        schema = content["schema"]
        assert kind == ("multipart/form-data" if endpoint.is_form else "application/json")
        assert endpoint.needs in schema["properties"]
        loads = endpoint.dialect is Dialect.OLLAMA and endpoint.streams
        assert body["required"] is not loads
        assert schema["required"] == ([] if endpoint.instead or loads else [endpoint.needs])
        assert ("anyOf" in schema) == (endpoint.instead is not None)
        assert ("stream" in schema["properties"]) == endpoint.streams


def test_errors_have_the_shape_of_the_paths_api() -> None:
    def error_of(path: str) -> str:
        schema = OPERATIONS[f"POST {path}"]["responses"]["default"]["content"]["application/json"]["schema"]
        return str(schema["$ref"]).rpartition("/")[2]

    assert [error_of(path) for path in ("/v1/completions", "/v1/messages", "/api/show")] == [
        "Error",
        "AnthropicError",
        "OllamaError",
    ]


def test_paths_and_queries_have_their_parameters() -> None:
    logs = OPERATIONS["GET /v1/node/devices/{device_id}/logs"]["parameters"]
    assert [(it["name"], it["in"]) for it in logs] == [("device_id", "path"), ("lines", "query"), ("follow", "query")]
    [number] = OPERATIONS["DELETE /v1/node/requests/{number}"]["parameters"]
    assert number["schema"]["type"] == "integer"


async def test_the_application_shows_it(autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path="/openapi.json")
    await exchange.through(APP)
    assert exchange.content == json.loads(json.dumps(DOCUMENT))
