"""The table of refusals: every error that we raise has a row, and says what its status promises."""

import json
from typing import Any

import pytest

from nodeagent.errors import (
    BackendCrashed,
    BackendUnavailable,
    BadAnswer,
    BodyTooLarge,
    BodyTooSlow,
    Draining,
    HostForbidden,
    InvalidApiKey,
    InvalidRequest,
    KeyLimitReached,
    KeyQuotaUsedUp,
    ModelForbidden,
    ModelLoadTimeout,
    ModelNotFound,
    ModelNotLoaded,
    NoSuchDevice,
    NoSuchRecord,
    NoSuchRequest,
    OriginForbidden,
    OutOfDeviceMemory,
    PathForbidden,
    PoisonedRequest,
    QueueFull,
    QueueTimeout,
    Refusal,
    ReloadRefused,
    RemoteMediaForbidden,
    RequestCancelled,
    RoleForbidden,
    ServerBusy,
    ShuttingDown,
    Unauthorized,
    UnsupportedEncoding,
    WrongTask,
)
from nodeagent.front.refusals import (
    REFUSALS,
    error_event,
    error_response,
    internal_error_response,
    refusal_response,
)

# One of each, with its status, type and code, and what its message must say.
CASES: list[tuple[Refusal, int, str, str | None, list[str]]] = [
    (InvalidRequest("'n' must be 1, not 2.", param="n"), 400, "invalid_request_error", None, ["'n' must be 1"]),
    (
        UnsupportedEncoding("gzip"),
        415,
        "invalid_request_error",
        "unsupported_encoding",
        ["Content-Encoding", "'gzip'", "send the body as it is"],
    ),
    (BodyTooLarge(1000), 413, "invalid_request_error", "request_too_large", ["1000 bytes", "max_request_bytes"]),
    (
        BodyTooSlow(12, 60.0),
        408,
        "invalid_request_error",
        "request_timeout",
        ["reading the request body (12 bytes in 60 s)"],
    ),
    (ServerBusy(4000), 503, "server_error", "server_busy", ["4000 bytes"]),
    (ModelNotFound("a", ["b", "c"]), 404, "invalid_request_error", "model_not_found", ["'a'", "b, c"]),
    (ModelNotFound("a", []), 404, "invalid_request_error", "model_not_found", ["No model is configured"]),
    (
        WrongTask("m", "chat", "embedding", ["e"]),
        400,
        "invalid_request_error",
        "wrong_task",
        ["'m' is for chat", "one for embedding", "These are: e."],
    ),
    (WrongTask("m", "chat", "rerank", []), 400, "invalid_request_error", "wrong_task", ["This node has none."]),
    (ModelNotLoaded("m"), 404, "invalid_request_error", "model_not_loaded", ["'m' is not loaded"]),
    (
        RemoteMediaForbidden("messages[0].content[1].image_url.url"),
        403,
        "invalid_request_error",
        "remote_media_forbidden",
        ["messages[0].content[1].image_url.url", "allow_remote_media", "data: URL"],
    ),
    (BodyTooLarge(9, "m"), 413, "invalid_request_error", "request_too_large", ["9 bytes of the model 'm'"]),
    (QueueFull("m", 2, 3.2), 429, "rate_limit_error", "queue_full", ["'m'", "2 requests"]),
    (QueueTimeout("m", "gpu:0", 300.0), 504, "server_error", "queue_timeout", ["300 s", "queue_timeout_s", "gpu:0"]),
    (ModelLoadTimeout("m", "gpu:0", 30.0, 5.0), 503, "server_error", "model_loading", ["'m'", "loading", "gpu:0"]),
    (BackendUnavailable("m", "it is too large", 7.0), 503, "server_error", "backend_unavailable", ["it is too large"]),
    (BackendCrashed("m", "gpu:0", "signal 9"), 502, "server_error", "backend_crashed", ["gpu:0", "signal 9"]),
    (PoisonedRequest("m", 42.0), 502, "server_error", "backend_crashed", ["'m'", "42 s"]),
    (InvalidApiKey(is_missing=True), 401, "invalid_request_error", "invalid_api_key", ["needs an API key", "keys add"]),
    (InvalidApiKey(is_missing=False), 401, "invalid_request_error", "invalid_api_key", ["is not valid", "x-api-key"]),
    (RoleForbidden("al", "admin"), 403, "invalid_request_error", "role_forbidden", ["'al' lacks the role 'admin'"]),
    (ModelForbidden("al", "m", ["n"]), 403, "invalid_request_error", "model_forbidden", ["'al'", "'m'", "only: n"]),
    (
        KeyLimitReached("al", "requests_per_minute", 60, 0.5),
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
        ["'al'", "60 (requests_per_minute)"],
    ),
    (KeyQuotaUsedUp("al", 9), 429, "rate_limit_error", "insufficient_quota", ["'al'", "9 tokens", "midnight UTC"]),
    (BadAnswer("m", "The server's answer ended."), 502, "server_error", "bad_answer", ["The server's answer ended."]),
    (RequestCancelled("m"), 503, "server_error", "request_cancelled", ["An operator", "ended this request for 'm'"]),
    (NoSuchRequest(3), 404, "invalid_request_error", "request_not_found", ["No request 3", "/v1/node/requests"]),
    (NoSuchRecord(3), 404, "invalid_request_error", "record_not_found", ["no record 3", "/v1/node/activity"]),
    (PathForbidden("/tools", "it is bad"), 403, "invalid_request_error", "path_forbidden", ["'/tools'", "it is bad"]),
    (Unauthorized(), 401, "invalid_request_error", "invalid_admin_token", ["admin.token", "Bearer"]),
    (OriginForbidden("http://evil"), 403, "invalid_request_error", "origin_forbidden", ["http://evil"]),
    (HostForbidden("evil"), 403, "invalid_request_error", "host_forbidden", ["'evil'", "allowed_hosts"]),
    (NoSuchDevice("gpu:9", ["gpu:0"]), 404, "invalid_request_error", "device_not_found", ["'gpu:9'", "gpu:0"]),
    (ReloadRefused(["a: b"]), 422, "invalid_request_error", "bad_configuration", ["a: b", "the old one stays"]),
    (Draining(30.0), 503, "server_error", "draining", ["This node is shutting down", "Use another node"]),
    (
        Draining(30.0, by_operator=True),
        503,
        "server_error",
        "draining",
        ["An operator has drained this node", "Use another node"],
    ),
    (
        ShuttingDown("accept requests again"),
        409,
        "invalid_request_error",
        "shutting_down",
        ["This node is shutting down, so it can't accept requests again."],
    ),
]
IDS = [type(case[0]).__name__ for case in CASES]


def headers_of(error: Refusal) -> dict[str, str]:
    _, headers, _ = refusal_response(error, "r1")
    assert len(dict(headers)) == len(headers)
    return dict(headers)


def subclasses(of: type[Refusal]) -> set[type[Refusal]]:
    return {kind for direct in of.__subclasses__() for kind in {direct, *subclasses(direct)}}


def test_every_refusal_has_a_row_of_its_own_and_a_case_here() -> None:
    ours = {kind for kind in subclasses(Refusal) if kind.__module__ == "nodeagent.errors"}
    ours -= {OutOfDeviceMemory}  # clients get it as what it is too, BackendUnavailable
    assert ours == set(REFUSALS) == {type(error) for error, *_ in CASES}


@pytest.mark.parametrize(("error", "status", "kind", "code", "words"), CASES, ids=IDS)
def test_a_refusal_is_answered_in_openais_shape(
    error: Refusal, status: int, kind: str, code: str | None, words: list[str]
) -> None:
    got_status, headers, body = refusal_response(error, "r1")
    content: dict[str, Any] = json.loads(body)
    assert got_status == status
    assert dict(headers)["content-type"] == "application/json"
    assert dict(headers)["x-request-id"] == content["request_id"] == "r1"
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert (content["error"]["type"], content["error"]["code"]) == (kind, code)
    for word in words:
        assert word in content["error"]["message"]


def test_the_field_at_fault_is_named() -> None:
    def param(error: Refusal) -> object:
        return json.loads(refusal_response(error, "r1")[2])["error"]["param"]

    assert param(InvalidRequest("no", param="messages")) == "messages"
    assert param(InvalidRequest("no")) is None
    assert param(ModelNotFound("a", [])) == "model"
    assert param(Draining(1.0)) is None


def test_the_code_of_a_wrong_request_is_its_own() -> None:
    error = InvalidRequest("The body is not valid JSON.", code="invalid_json")
    assert json.loads(refusal_response(error, "r1")[2])["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("wait_s", "seconds", "milliseconds"),
    [
        (-5.0, "1", "1"),
        (0.0, "1", "1"),
        (0.4, "1", "400"),
        (1.0, "1", "1000"),
        (1.1, "2", "1100"),
        (119.5, "120", "119500"),
        (3600.0, "120", "120000"),
        (float("inf"), "120", "120000"),
    ],
)
def test_the_wait_is_rounded_up_to_seconds_within_what_clients_accept(
    wait_s: float, seconds: str, milliseconds: str
) -> None:
    headers = headers_of(QueueFull("m", 2, wait_s))
    assert (headers["retry-after"], headers["retry-after-ms"]) == (seconds, milliseconds)


def test_retry_after_is_sent_exactly_where_a_retry_may_help() -> None:
    waits = {type(error).__name__ for error, *_ in CASES if "retry-after" in headers_of(error)}
    assert waits == {"ServerBusy", "QueueFull", "KeyLimitReached", "ModelLoadTimeout", "BackendUnavailable", "Draining"}
    assert headers_of(BackendUnavailable("m", "no such file", None))["retry-after"] == "30"


def test_clients_are_told_not_to_retry_what_would_end_the_same_way() -> None:
    final = {type(error).__name__ for error, *_ in CASES if headers_of(error).get("x-should-retry") == "false"}
    assert final == {"BackendCrashed", "BadAnswer", "KeyQuotaUsedUp", "PoisonedRequest", "RequestCancelled"}


def test_what_a_client_sent_is_echoed_short_and_safe() -> None:
    error = ModelNotFound("\ud800\r\n" + "x" * 10_000, ["m"])
    body = refusal_response(error, "r1")[2]
    assert len(body) < 1000
    assert b"\r" not in error_event(error, "r1")


def test_an_error_in_mid_stream_is_one_event() -> None:
    event = error_event(BackendCrashed("m", "gpu:0", "signal 9\n\nlast words"), "r1")
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[len(b"data: ") :])["error"]["code"] == "backend_crashed"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, "invalid_request_error", "not_found"),
        (405, "invalid_request_error", "method_not_allowed"),
        (500, "server_error", "internal_error"),
        (599, "server_error", None),
    ],
)
def test_errors_of_http_itself_have_the_same_shape(status: int, kind: str, code: str | None) -> None:
    got_status, headers, body = error_response(status, "a sentence", "r1")
    assert (got_status, dict(headers)["x-request-id"]) == (status, "r1")
    assert json.loads(body)["error"] == {"message": "a sentence", "type": kind, "param": None, "code": code}


def test_an_internal_error_names_the_request_and_nothing_else() -> None:
    status, _, body = internal_error_response("r1")
    content = json.loads(body)
    assert (status, content["error"]["code"]) == (500, "internal_error")
    assert "r1" in content["error"]["message"]
