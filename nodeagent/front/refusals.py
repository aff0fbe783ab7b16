"""The one table from our errors to what a client gets: status, OpenAI's type and code, retry hints, a sentence.

The body has OpenAI's shape, `{"error": {"message", "type", "param", "code"}, "request_id"}`. `Retry-After` is in whole
seconds; `retry-after-ms`, which OpenAI's clients read first, is exact; neither is there where nobody knows when another
try may help. `x-should-retry: false` tells those clients to leave it.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.client import responses
from typing import Any

from nodeagent.errors import (
    BackendCrashed,
    BackendUnavailable,
    BodyTooLarge,
    BodyTooSlow,
    Draining,
    InvalidRequest,
    ModelLoadTimeout,
    ModelNotFound,
    NoSuchDevice,
    OriginForbidden,
    PoisonedRequest,
    QueueFull,
    QueueTimeout,
    Refusal,
    ReloadRefused,
    ServerBusy,
    Unauthorized,
    UnsupportedEncoding,
)

# OpenAI's clients give up at once where they are told to wait longer than this.
_RETRY_AFTER_MAX_S = 120.0
# Bodies held are let go of within one request's time; nothing better is known.
_BUSY_RETRY_S = 1.0
# A model's file that can't be used may be mounted or mended; nobody knows when.
_UNKNOWN_RETRY_S = 30.0
# A field's value that is echoed, however long it came.
_ECHO_CHARS = 100

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: str
    code: str | None
    message: Callable[[Any], str]
    param: str | None = None
    retry_after_s: float | None = None
    final: bool = False
    """Another try would meet the same end."""


_TABLE: dict[type[Refusal], _Row] = {
    InvalidRequest: _Row(400, "invalid_request_error", None, lambda it: it.message),
    UnsupportedEncoding: _Row(
        415,
        "invalid_request_error",
        "unsupported_encoding",
        lambda it: f"Content-Encoding {_echo(it.encoding)} is not taken: send the body as it is, without that header.",
    ),
    BodyTooLarge: _Row(
        413,
        "invalid_request_error",
        "request_too_large",
        lambda it: f"The body is longer than the {it.limit_bytes} bytes that this node takes (max_request_bytes).",
    ),
    BodyTooSlow: _Row(
        408,
        "invalid_request_error",
        "request_timeout",
        lambda it: (
            f"The body did not arrive: {it.received_bytes} bytes of it came in {it.waited_s:.0f} s. Send it at once."
        ),
    ),
    ServerBusy: _Row(
        503,
        "server_error",
        "server_busy",
        lambda it: f"This node already holds request bodies up to its limit of {it.budget_bytes} bytes. Try again.",
        retry_after_s=_BUSY_RETRY_S,
    ),
    ModelNotFound: _Row(
        404,
        "invalid_request_error",
        "model_not_found",
        lambda it: f"The model {_echo(it.model)} is not served here. {_known(it.known)}",
        param="model",
    ),
    QueueFull: _Row(
        429,
        "rate_limit_error",
        "queue_full",
        lambda it: (
            f"Every device that can serve {it.model_id!r} already has {it.limit} requests in flight or waiting "
            "(max_pending_requests_per_device). Try again."
        ),
    ),
    QueueTimeout: _Row(
        504,
        "server_error",
        "queue_timeout",
        lambda it: (
            f"The request waited {it.waited_s:.0f} s for its turn on {it.device_id} with {it.model_id!r}, which is as "
            "long as requests may wait (queue_timeout_s)."
        ),
    ),
    ModelLoadTimeout: _Row(
        503,
        "server_error",
        "model_loading",
        lambda it: f"The model {it.model_id!r} is still loading on {it.device_id}. Try again.",
    ),
    BackendUnavailable: _Row(
        503,
        "server_error",
        "backend_unavailable",
        lambda it: f"No device can serve {it.model_id!r} now: {it.reason}",
        retry_after_s=_UNKNOWN_RETRY_S,
    ),
    BackendCrashed: _Row(
        502,
        "server_error",
        "backend_crashed",
        lambda it: f"The server of {it.model_id!r} on {it.device_id} died under this request: {it.reason}",
        final=True,
    ),
    PoisonedRequest: _Row(
        502,
        "server_error",
        "backend_crashed",
        lambda it: (
            f"Two servers of {it.model_id!r} died under this very request. It is refused for {it.blocked_s:.0f} s more."
        ),
        final=True,
    ),
    Unauthorized: _Row(
        401,
        "invalid_request_error",
        "invalid_admin_token",
        lambda _it: (
            "This needs the admin token, as 'Authorization: Bearer ...'; it is in admin.token in the state_dir."
        ),
    ),
    OriginForbidden: _Row(
        403,
        "invalid_request_error",
        "origin_forbidden",
        lambda it: f"Web pages may not do this: the request carries Origin {_echo(it.origin)}.",
    ),
    NoSuchDevice: _Row(
        404,
        "invalid_request_error",
        "device_not_found",
        lambda it: f"There is no device {_echo(it.device_id)} here, only: {', '.join(it.known)}.",
        param="device_id",
    ),
    ReloadRefused: _Row(
        422,
        "invalid_request_error",
        "bad_configuration",
        lambda it: "The configuration is bad, and the old one stays: " + "; ".join(it.problems),
    ),
    Draining: _Row(
        503,
        "server_error",
        "draining",
        lambda it: (
            "An operator has drained this node, so it accepts no new requests. Use another node, or retry later."
            if it.by_operator
            else "This node is shutting down and accepts no new requests. Use another node, or retry later."
        ),
    ),
}


def refusal_response(error: Refusal, request_id: str) -> tuple[int, Headers, bytes]:
    """Answer a refusal: status, headers and JSON body."""
    row = _row(error)
    return row.status, _headers(row, error, request_id), _json(_payload(row, error, request_id))


def error_response(status: int, message: str, request_id: str) -> tuple[int, Headers, bytes]:
    """Answer an error that is no Refusal: what HTTP itself refuses (404, 405, ...), and faults of ours (500)."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    phrase = "internal_error" if status == 500 else responses.get(status, "").lower()
    row = _Row(status, kind, re.sub("[^a-z]+", "_", phrase) or None, lambda _error: message)
    return status, _headers(row, None, request_id), _json(_payload(row, None, request_id))


def internal_error_response(request_id: str) -> tuple[int, Headers, bytes]:
    """Answer a fault of ours; what it was is in the log, under the request's id, and nowhere else."""
    return error_response(500, f"The node failed to answer; its log has the reason under {request_id}.", request_id)


def error_event(error: Refusal, request_id: str) -> bytes:
    """Say in mid-stream, as a server-sent event, what a status line can say no more."""
    return b"data: " + _json(_payload(_row(error), error, request_id)) + b"\n\n"


def _row(error: Refusal) -> _Row:
    return next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)


def _headers(row: _Row, error: Refusal | None, request_id: str) -> Headers:
    headers = [("content-type", "application/json"), ("x-request-id", request_id)]
    known_s = getattr(error, "retry_after_s", None)
    retry_after_s = known_s if known_s is not None else row.retry_after_s
    if retry_after_s is not None:
        # Below a second only the milliseconds can say it.
        retry_after_s = min(max(retry_after_s, 0.001), _RETRY_AFTER_MAX_S)
        headers.append(("retry-after", str(math.ceil(retry_after_s))))
        headers.append(("retry-after-ms", str(round(retry_after_s * 1000))))
    if row.final:
        headers.append(("x-should-retry", "false"))
    return headers


def _payload(row: _Row, error: Refusal | None, request_id: str) -> dict[str, Any]:
    return {
        "error": {
            "message": row.message(error),
            "type": row.type,
            "param": getattr(error, "param", row.param),
            "code": getattr(error, "code", None) or row.code,
        },
        "request_id": request_id,
    }


def _json(payload: dict[str, Any]) -> bytes:
    # ASCII, since what a client sent and is echoed may hold lone surrogates, which UTF-8 can't carry.
    return json.dumps(payload).encode("ascii")


def _echo(value: str) -> str:
    return repr(value if len(value) <= _ECHO_CHARS else value[:_ECHO_CHARS] + "...")


def _known(models: list[str]) -> str:
    return f"It serves: {', '.join(models)}." if models else "No model is configured here."
