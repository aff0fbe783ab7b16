"""`/openapi.json`: what the node answers on which path, made from the application's routes and the table of endpoints.

https://spec.openapis.org/oas/v3.1.1.html. Bodies of inference are described as far as the node reads them; the rest is
between the client and the model's server.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from werkzeug.routing import Map, Rule

from nodeagent.front.endpoints import ENDPOINTS, Dialect, Endpoint, Slots
from nodeagent.front.error_shapes import dialect_of
from nodeagent.front.guard import role_for

Schema = dict[str, Any]

# Of routes that need the operator's token: those of this blueprint (`node.py`).
_OPERATORS: Final = "node.admin."
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_PARAMETER: Final = re.compile(r"<(?:(?P<kind>\w+):)?(?P<name>\w+)>")

_TEXT: Final[Schema] = {"type": "string"}
_FLAG: Final[Schema] = {"type": "boolean"}
_TEXTS: Final[Schema] = {"anyOf": [_TEXT, {"type": "array", "minItems": 1}]}
# What `request_body.py` and `ollama_requests.py` check of the field that a path needs.
_NEEDED: Final[Mapping[str, Schema]] = {
    "messages": {"type": "array", "items": {"type": "object", "properties": {"role": _TEXT}, "required": ["role"]}},
    "tokens": {"type": "array", "items": {"type": "integer"}},
    "input": _TEXTS,
    "content": {"anyOf": [_TEXT, {"type": "array"}]},
    "prompt": {"anyOf": [_TEXT, {"type": "array"}]},
    "query": _TEXT,
    "input_prefix": _TEXT,
    "file": {"type": "string", "format": "binary"},
}
_OPENAIS_ERROR: Final[Schema] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": {}, "code": {}},
            "required": ["message", "type"],
        },
        "request_id": _TEXT,
    },
    "required": ["error"],
}
_ERRORS: Final[Mapping[Dialect, tuple[str, Schema]]] = {
    Dialect.OPENAI: ("Error", _OPENAIS_ERROR),
    Dialect.ANTHROPIC: (
        "AnthropicError",
        {
            "type": "object",
            "properties": {
                "type": {"const": "error"},
                "error": {
                    "type": "object",
                    "properties": {"type": _TEXT, "message": _TEXT},
                    "required": ["type", "message"],
                },
                "request_id": _TEXT,
            },
            "required": ["type", "error"],
        },
    ),
    Dialect.OLLAMA: ("OllamaError", {"type": "object", "properties": {"error": _TEXT}, "required": ["error"]}),
}


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a route does, and what the application's routes don't say: its query's parameters, its body's fields, the
    types of its answers (None: those of the model's server) and their statuses."""

    summary: str
    query: Mapping[str, Schema] = msgspec.field(default_factory=dict)
    body: Mapping[str, Schema] | None = None
    required: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = (_JSON,)
    statuses: tuple[int, ...] = (200,)


_MODEL: Final[Mapping[str, Schema]] = {"model": {"type": "string", "description": "the id or an alias of a model"}}
_FORCE: Final[Mapping[str, Schema]] = {
    "force": {**_FLAG, "description": "end its requests instead of waiting for them"}
}
_FOLLOW: Final[Schema] = {"enum": ["true", "false"]}
_UPSTREAM: Final = Note(summary="Any path of a model's server: {model_id}/{path}", answers=None)

NOTES: Final[Mapping[str, Note]] = {
    "GET /v1/models": Note(summary="Lists the configured models"),
    "GET /v1/models/{model}": Note(summary="Shows one model"),
    "GET /props": Note(summary="The properties of a loaded server", query=_MODEL),
    "GET /slots": Note(summary="The slots of a loaded server", query=_MODEL),
    "POST /v1/chat/completions/control": Note(
        summary="Tells the server of a chat completion in progress to end its reasoning",
        body={"id": _TEXT, "action": _TEXT, **_MODEL},
        required=("id", "action"),
    ),
    "GET /api/version": Note(summary="The release of Ollama whose API this is"),
    "GET /api/tags": Note(summary="Lists the models as Ollama does"),
    "GET /api/ps": Note(summary="Lists the loaded models as Ollama does"),
    "POST /api/show": Note(summary="Shows one model as Ollama does", body=_MODEL, required=("model",)),
    "GET /metrics": Note(
        summary="The node in figures, for Prometheus", answers=("text/plain", "application/openmetrics-text")
    ),
    "GET /": Note(summary="The page, for browsers", answers=("text/html",)),
    "GET /page/{name}": Note(summary="A file of the page", answers=("text/html", "text/css", "text/javascript")),
    "GET /openapi.json": Note(summary="This document"),
    "GET /v1/node/inventory": Note(summary="Devices, servers, models and the node's status"),
    "GET /v1/node/queue": Note(summary="The queue of each device"),
    "GET /v1/node/requests": Note(summary="The requests for inference in flight and queued"),
    "DELETE /v1/node/requests/{number}": Note(summary="Ends a request; its client gets an error that says so"),
    "GET /v1/node/activity": Note(
        summary="What the requests for inference that have ended took",
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
            "since": {"type": "integer", "minimum": 0},
            "status": {"type": "integer", "minimum": 100, "maximum": 599},
            "model_id": _TEXT,
            "key": _TEXT,
            "follow": _FOLLOW,
        },
        answers=(_JSON, _EVENTS),
    ),
    "GET /v1/node/activity/{number}": Note(summary="One of them, with the bodies of the request and its answer"),
    "GET /v1/node/keys": Note(summary="The API keys, what each may and has used"),
    "GET /v1/node/events": Note(
        summary="Every state change",
        query={"after": {"type": "integer", "minimum": 0}, "follow": _FOLLOW},
        answers=(_EVENTS,),
    ),
    "GET /v1/node/devices/{device_id}/logs": Note(
        summary="What a device's servers print",
        query={"lines": {"type": "integer", "minimum": 0}, "follow": _FOLLOW},
        answers=("text/plain",),
    ),
    "POST /v1/node/models/{model}/load": Note(
        summary="Loads a model",
        body={"device_id": _TEXT, "wait": {**_FLAG, "description": "whether to answer once it is ready (default)"}},
        statuses=(200, 202),
    ),
    "POST /v1/node/models/{model}/unload": Note(summary="Stops a model's servers", body=_FORCE),
    "POST /v1/node/models/{model}/restart": Note(summary="Stops a model's servers and loads it again", body=_FORCE),
    "POST /v1/node/drain": Note(summary="Takes the node out of service"),
    "POST /v1/node/undrain": Note(summary="Accepts requests again"),
    "POST /v1/node/reload": Note(summary="Applies the configuration file"),
    "POST /v1/node/register": Note(summary="Registers with the dispatcher again"),
    "GET /upstream/{where}": _UPSTREAM,
    "POST /upstream/{where}": _UPSTREAM,
    "PUT /upstream/{where}": _UPSTREAM,
    "PATCH /upstream/{where}": _UPSTREAM,
    "DELETE /upstream/{where}": _UPSTREAM,
    "GET /livez": Note(summary="Liveness: the process responds"),
    "GET /healthz": Note(summary="Liveness: the process responds"),
    "GET /readyz": Note(summary="Readiness: requests are accepted", query={"drain": {"enum": ["404"]}}),
    "GET /health": Note(summary="Health, as llama-server tells it"),
}


def document(routes: Map) -> Schema:
    """The document for an application with these routes."""
    paths: dict[str, Schema] = {}
    for rule in routes.iter_rules():
        path = _PARAMETER.sub(r"{\g<name>}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            paths.setdefault(path, {})[method.lower()] = _operation(rule, method, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RoleMesh Node Agent",
            "version": "1",
            "description": "The models of one host, by the APIs of OpenAI, Anthropic, Ollama and llama.cpp.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(_ERRORS.values()),
            "securitySchemes": {
                "operator": {"type": "http", "scheme": "bearer", "description": "the admin token, or a key for admin"},
                "key": {"type": "http", "scheme": "bearer", "description": "an API key, where the node has any"},
            },
        },
    }


def _operation(rule: Rule, method: str, path: str) -> Schema:
    endpoint = ENDPOINTS.get(rule.rule) if method == "POST" else None
    note = _note_of_inference(endpoint) if endpoint else NOTES.get(f"{method} {path}", Note(summary=f"{method} {path}"))
    operation: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}"),
        "summary": note.summary,
        "tags": [_tag(path)],
        "parameters": [*_in_path(rule), *_in_query(note)],
        "responses": {
            **{str(it): {"description": "what was asked for", **_content(note.answers)} for it in note.statuses},
            "default": {"description": "an error", **_error(dialect_of(path), rule.endpoint)},
        },
    }
    if note.body is not None:
        kind = "multipart/form-data" if endpoint and endpoint.is_form else _JSON
        schema: Schema = {"type": "object", "properties": dict(note.body), "required": list(note.required)}
        if rule.endpoint.startswith(_OPERATORS):
            schema["additionalProperties"] = False
        is_required = bool(note.required)
        if endpoint is not None and endpoint.instead is not None:
            schema["anyOf"] = [{"required": [endpoint.needs]}, {"required": [endpoint.instead]}]
            is_required = True
        operation["requestBody"] = {"required": is_required, "content": {kind: {"schema": schema}}}
    if rule.endpoint.startswith(_OPERATORS):
        operation["security"] = [{"operator": []}]
    elif role_for(method, path) is not None:
        operation["security"] = [{"key": []}, {}]
    return operation


def _note_of_inference(endpoint: Endpoint) -> Note:
    names = [name for name in (endpoint.needs, endpoint.instead) if name is not None]
    body: dict[str, Schema] = {**_MODEL, **{name: _NEEDED[name] for name in names}}
    answers = [_JSON]
    if endpoint.streams:
        body["stream"] = _FLAG
        answers.append("application/x-ndjson" if endpoint.dialect is Dialect.OLLAMA else _EVENTS)
    # Ollama's load a model without a prompt.
    loads = endpoint.dialect is Dialect.OLLAMA and endpoint.streams
    what = "Needs no slot of a server" if endpoint.slots is Slots.NONE else "Inference"
    task = f", by a model for {endpoint.task}" if endpoint.task else ""
    return Note(
        summary=what + task,
        body=body,
        required=() if loads or endpoint.instead else (endpoint.needs,),
        answers=tuple(answers),
    )


def _tag(path: str) -> str:
    if path not in ENDPOINTS and not path.startswith(("/api/", "/v1/models", "/v1/chat/", "/props", "/slots")):
        return "node"
    dialect = dialect_of(path)
    if dialect is not Dialect.OPENAI:
        return dialect.name.capitalize()
    return "OpenAI" if path.startswith("/v1/") else "llama.cpp"


def _in_path(rule: Rule) -> Iterable[Schema]:
    for found in _PARAMETER.finditer(rule.rule):
        schema: Schema = {"type": "integer", "minimum": 0} if found["kind"] == "int" else {**_TEXT, "minLength": 1}
        yield {"name": found["name"], "in": "path", "required": True, "schema": schema}


def _in_query(note: Note) -> Iterable[Schema]:
    for name, schema in note.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _content(types: tuple[str, ...] | None) -> Schema:
    return {"content": {kind: {} for kind in types}} if types else {}


def _error(dialect: Dialect, endpoint: str) -> Schema:
    """Of a health check the answer is no error, and below `/upstream` it is the server's."""
    if endpoint.startswith("health.") or endpoint.endswith(".ask_server"):
        return {}
    name, _schema = _ERRORS[dialect]
    return {"content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
