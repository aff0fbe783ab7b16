"""The one table from our errors to what a client gets: status, OpenAI's type and code, a message, when to retry.

The body has the shape of the path's API (`error_shapes.py`); the types here are OpenAI's. `Retry-After` is in whole
seconds and `retry-after-ms`, which OpenAI's clients read first, is exact. Both are missing if nobody knows when a retry
may help. `x-should-retry: false` tells OpenAI's clients not to retry. `error_table.py` prints the table for people.
"""

import math
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec

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
from nodeagent.front.endpoints import Dialect
from nodeagent.front.error_shapes import as_event, error_json

# OpenAI's clients don't retry at all if they are to wait longer than this.
_RETRY_AFTER_MAX_S = 120.0
# A request that frees its body may end at any moment; nothing better is known.
_BUSY_RETRY_S = 1.0
# A model file that can't be used may be mounted or repaired, at an unknown time.
_UNKNOWN_RETRY_S = 30.0
# How much of a client's value an error repeats.
_ECHO_CHARS = 100

_PHRASES = {status.value: status.phrase for status in HTTPStatus}

Headers = list[tuple[str, str]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """How one error is answered. `message` makes the sentence from the error.

    An error's own `retry_after_s` comes before the row's. `final` says that a retry would end the same way. `when` and
    `client` are for the documentation: when it happens, and what the client should do.
    """

    status: int
    type: str
    code: str | None
    message: Callable[[Any], str]
    when: str
    client: str
    param: str | None = None
    retry_after_s: float | None = None
    final: bool = False


REFUSALS: dict[type[Refusal], Row] = {
    InvalidRequest: Row(
        status=400,
        type="invalid_request_error",
        code=None,
        message=lambda it: it.message,
        when="a field or header is missing or wrong (`param` names it); code `invalid_json` if the body is not JSON",
        client="correct the request",
    ),
    UnsupportedEncoding: Row(
        status=415,
        type="invalid_request_error",
        code="unsupported_encoding",
        message=lambda it: (
            f"Content-Encoding {echo(it.encoding)} is not supported: send the body as it is, without that header."
        ),
        when="the body is compressed",
        client="send it uncompressed",
    ),
    BodyTooLarge: Row(
        status=413,
        type="invalid_request_error",
        code="request_too_large",
        message=lambda it: (
            f"The body is longer than the limit of {it.limit_bytes} bytes of "
            + ("this node" if it.model_id is None else f"the model {it.model_id!r}")
            + " (max_request_bytes)."
        ),
        when="the body is longer than `max_request_bytes`",
        client="send less",
    ),
    BodyTooSlow: Row(
        status=408,
        type="invalid_request_error",
        code="request_timeout",
        message=lambda it: f"Timed out reading the request body ({it.received_bytes} bytes in {it.waited_s:.0f} s).",
        when="the body took longer than 60 s and 1 s more per 16 KiB received",
        client="retry",
    ),
    ServerBusy: Row(
        status=503,
        type="server_error",
        code="server_busy",
        message=lambda it: (
            f"This node already holds request bodies up to its limit of {it.budget_bytes} bytes"
            + (", and this one was arriving the slowest. Retry." if it.gave_way else ". Retry.")
        ),
        retry_after_s=_BUSY_RETRY_S,
        when="the bodies of all requests in progress would exceed four times `max_request_bytes`; the one that arrives "
        "the slowest makes room first",
        client="retry after the wait, or use another node",
    ),
    ModelNotFound: Row(
        status=404,
        type="invalid_request_error",
        code="model_not_found",
        message=lambda it: f"The model {echo(it.model)} is not served here. {_known_models(it.known)}",
        param="model",
        when="no model has that id or alias; the message lists those there are",
        client="use another model or node",
    ),
    ModelNotLoaded: Row(
        status=404,
        type="invalid_request_error",
        code="model_not_loaded",
        message=lambda it: f"The model {it.model_id!r} is not loaded, and this path does not load it.",
        param="model",
        when="`/props` or `/slots` of a model that is not loaded",
        client="ask again once it is",
    ),
    WrongTask: Row(
        status=400,
        type="invalid_request_error",
        code="wrong_task",
        message=lambda it: (
            f"The model {it.model_id!r} is for {it.task}, and this path needs one for {it.needed}. "
            + (f"These are: {', '.join(it.able)}." if it.able else "This node has none.")
        ),
        param="model",
        when="the model is for another task (chat, embedding, rerank) than the path; the message "
        "lists those for it that the API key may use",
        client="use another model or path",
    ),
    RemoteMediaForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="remote_media_forbidden",
        message=lambda it: (
            f"{echo(it.param)} is a URL, and this node fetches nothing for requests (allow_remote_media). Send the "
            "content itself, as base64 or as a data: URL."
        ),
        when="an image, sound or file is given by URL (`param` names the field), and `allow_remote_media` is false",
        client="send the content itself",
    ),
    QueueFull: Row(
        status=429,
        type="rate_limit_error",
        code="queue_full",
        message=lambda it: (
            f"Every device that can serve {it.model_id!r} already has {it.limit} requests in flight or queued "
            "(max_pending_requests_per_device). Retry later."
        ),
        when="every device that can serve the model has `max_pending_requests_per_device` requests",
        client="retry after the wait, or use another node",
    ),
    QueueTimeout: Row(
        status=504,
        type="server_error",
        code="queue_timeout",
        message=lambda it: (
            f"The request for {it.model_id!r} was queued on {it.device_id} for {it.waited_s:.0f} s, the longest that "
            "this node allows (queue_timeout_s)."
        ),
        when="the request was queued for `queue_timeout_s`",
        client="use another node, or retry with less load",
    ),
    ModelLoadTimeout: Row(
        status=503,
        type="server_error",
        code="model_loading",
        message=lambda it: f"The model {it.model_id!r} is still loading on {it.device_id}. Retry later.",
        when="the model was not ready after `llama_server_startup_timeout_s`; its start goes on",
        client="retry after the wait",
    ),
    BackendUnavailable: Row(
        status=503,
        type="server_error",
        code="backend_unavailable",
        message=lambda it: f"No device can serve {it.model_id!r} now: {it.reason}",
        retry_after_s=_UNKNOWN_RETRY_S,
        when="no device can serve the model now (file missing, does not fit, keeps failing), or its "
        "server was stopped during the request; the message says why",
        client="retry after the wait, or use another node",
    ),
    BackendCrashed: Row(
        status=502,
        type="server_error",
        code="backend_crashed",
        message=lambda it: f"The server of {it.model_id!r} on {it.device_id} crashed during this request: {it.reason}",
        final=True,
        when="the server crashed during the request, and after one retry again; or in mid-stream (then as an event)",
        client="don't retry at once",
    ),
    PoisonedRequest: Row(
        status=502,
        type="server_error",
        code="backend_crashed",
        message=lambda it: (
            f"Two servers of {it.model_id!r} crashed on this body, so it is rejected for {it.blocked_s:.0f} s more."
        ),
        final=True,
        when="two servers crashed on the same body within 60 s; it is rejected for 60 s after the last crash",
        client="change the request",
    ),
    BadAnswer: Row(
        status=502,
        type="server_error",
        code="bad_answer",
        message=lambda it: it.reason,
        final=True,
        when="on Ollama's paths: the server's answer is an error in mid-stream, or can't be translated",
        client="see the message",
    ),
    RequestCancelled: Row(
        status=503,
        type="server_error",
        code="request_cancelled",
        message=lambda it: f"An operator of this node ended this request for {it.model_id!r}.",
        final=True,
        when="an operator ended the request (`DELETE /v1/node/requests/{id}`); in mid-stream it is an event",
        client="ask the operator before you retry",
    ),
    NoSuchRequest: Row(
        status=404,
        type="invalid_request_error",
        code="request_not_found",
        message=lambda it: (
            f"No request {it.number} is queued or in flight; GET /v1/node/requests lists those that are."
        ),
        param="id",
        when="an operator named a request that has ended, or that there never was",
        client="list the requests again",
    ),
    NoSuchRecord: Row(
        status=404,
        type="invalid_request_error",
        code="record_not_found",
        message=lambda it: f"There is no record {it.number}; GET /v1/node/activity lists those that are kept.",
        param="id",
        when="an operator named a record of the activity that is not kept any more, or that there never was",
        client="list the activity again",
    ),
    PathForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="path_forbidden",
        message=lambda it: f"The server's path {echo(it.path)} can't be reached through this node: {it.reason}.",
        when="a path below `/upstream` that runs commands, fetches for others, writes files, or takes the server out "
        "of the node's hands",
        client="use the node's own paths",
    ),
    Unauthorized: Row(
        status=401,
        type="invalid_request_error",
        code="invalid_admin_token",
        message=lambda _it: (
            "This path needs the admin token, as 'Authorization: Bearer ...'. It is in the file admin.token in the "
            "state_dir."
        ),
        when="an operator's path, without the admin token",
        client="send the token",
    ),
    InvalidApiKey: Row(
        status=401,
        type="invalid_request_error",
        code="invalid_api_key",
        message=lambda it: (
            ("This node needs an API key" if it.is_missing else "The API key is not valid on this node")
            + ", as 'Authorization: Bearer ...' or 'x-api-key: ...'. Its operator makes keys by "
            "'rolemesh-node-agent keys add'."
        ),
        when="the node has API keys, and the request has none or a wrong one",
        client="send a valid key",
    ),
    RoleForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="role_forbidden",
        message=lambda it: f"The API key {it.name!r} lacks the role {it.role!r}, which this path needs.",
        when="the API key lacks the role that the path needs",
        client="use another key",
    ),
    ModelForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="model_forbidden",
        message=lambda it: (
            f"The API key {it.name!r} may not use the model {it.model_id!r}, only: {', '.join(it.allowed) or 'none'}."
        ),
        param="model",
        when="the API key is not for the model; the message lists those that it is for",
        client="use one of them, or another key",
    ),
    KeyLimitReached: Row(
        status=429,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        message=lambda it: f"The API key {it.name!r} is at its limit of {it.limit} ({it.what}). Retry later.",
        retry_after_s=_BUSY_RETRY_S,
        when="the API key is at its `requests_per_minute` or `concurrent_requests`",
        client="retry after the wait",
    ),
    KeyQuotaUsedUp: Row(
        status=429,
        type="rate_limit_error",
        code="insufficient_quota",
        message=lambda it: (
            f"The API key {it.name!r} has used up its {it.limit} tokens of today (tokens_per_day). The day ends at "
            "midnight UTC."
        ),
        final=True,
        when="the API key has used up its `tokens_per_day`",
        client="wait for the next day of UTC, or use another key",
    ),
    OriginForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="origin_forbidden",
        message=lambda it: (
            f"Web pages may not use this path: the request has the Origin {echo(it.origin)} "
            "(cors_origins lists the pages that may use the API; only the node's own may use an operator's path)."
        ),
        when="a web page whose origin is not in `cors_origins`, or on an operator's path any but the node's own",
        client="add the page's origin to `cors_origins`, or use another program",
    ),
    HostForbidden: Row(
        status=403,
        type="invalid_request_error",
        code="host_forbidden",
        message=lambda it: (
            f"A browser's request came for the host {echo(it.host)}, which is no name of this node. If it is one, add "
            "it to allowed_hosts in the node's configuration, or use the node's IP address."
        ),
        when="a browser's request whose `Host` is neither an IP address, nor localhost, nor a name of this node (DNS "
        "rebinding)",
        client="add the name to `allowed_hosts`, or use the IP address",
    ),
    NoSuchDevice: Row(
        status=404,
        type="invalid_request_error",
        code="device_not_found",
        message=lambda it: f"There is no device {echo(it.device_id)} here, only: {', '.join(it.known)}.",
        param="device_id",
        when="an operator named a device that this node does not have; the message lists those it has",
        client="use another device",
    ),
    ReloadRefused: Row(
        status=422,
        type="invalid_request_error",
        code="bad_configuration",
        message=lambda it: "The configuration is bad, and the old one stays: " + "; ".join(it.problems),
        when="a reload found problems in the configuration; the old one stays",
        client="correct the file",
    ),
    Draining: Row(
        status=503,
        type="server_error",
        code="draining",
        message=lambda it: (
            "An operator has drained this node, so it accepts no new requests. Use another node, or retry later."
            if it.by_operator
            else "This node is shutting down and accepts no new requests. Use another node, or retry later."
        ),
        when="an operator drained the node, or it is shutting down, and `drain_grace_s` is over",
        client="use another node, or retry after the wait",
    ),
    ShuttingDown: Row(
        status=409,
        type="invalid_request_error",
        code="shutting_down",
        message=lambda it: f"This node is shutting down, so it can't {it.order}.",
        when="an operator's `undrain` or `load` after the agent was asked to end",
        client="start the agent again",
    ),
}


def code_of(error: Refusal) -> tuple[int, str]:
    """The status of a refused request, and the code in its error; the type where there is no code."""
    row = _row(error)
    return row.status, getattr(error, "code", None) or row.code or row.type


def refusal_response(error: Refusal, request_id: str, dialect: Dialect = Dialect.OPENAI) -> tuple[int, Headers, bytes]:
    """The response to a refused request: status, headers and JSON body."""
    row = _row(error)
    headers = _headers(request_id)
    known_s: float | None = getattr(error, "retry_after_s", None)
    retry_after_s = known_s if known_s is not None else row.retry_after_s
    if retry_after_s is not None:
        # Below a second only the milliseconds can say it.
        retry_after_s = min(max(retry_after_s, 0.001), _RETRY_AFTER_MAX_S)
        headers.append(("retry-after", str(math.ceil(retry_after_s))))
        headers.append(("retry-after-ms", str(round(retry_after_s * 1000))))
    if row.final:
        headers.append(("x-should-retry", "false"))
    if row.status == HTTPStatus.UNAUTHORIZED:
        headers.append(("www-authenticate", "Bearer"))  # required by RFC 9110, 15.5.2
    return row.status, headers, _refusal_json(row, error, request_id, dialect)


def error_response(
    status: int, message: str, request_id: str, dialect: Dialect = Dialect.OPENAI
) -> tuple[int, Headers, bytes]:
    """The response to an error that is no Refusal: of HTTP itself (404, 405, ...), or a bug of ours (500)."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    phrase = "internal_error" if status == 500 else _PHRASES.get(status, "").lower()
    code = re.sub("[^a-z]+", "_", phrase) or None
    error = {"message": message, "type": kind, "param": None, "code": code}
    return status, _headers(request_id), error_json(dialect, status, error, request_id)


def internal_error_response(request_id: str, dialect: Dialect = Dialect.OPENAI) -> tuple[int, Headers, bytes]:
    """The response after a bug of ours. What happened is in the log only, under the request's id."""
    message = f"Internal error. The node's log has the reason, under request {request_id}."
    return error_response(500, message, request_id, dialect)


def error_event(error: Refusal, request_id: str, dialect: Dialect = Dialect.OPENAI) -> bytes:
    """The error as a server-sent event, for a stream whose status line has already been sent."""
    return as_event(dialect, _refusal_json(_row(error), error, request_id, dialect))


def echo(value: str) -> str:
    """A value that a client sent, quoted and shortened for an error message."""
    return repr(value if len(value) <= _ECHO_CHARS else value[:_ECHO_CHARS] + "...")


def _row(error: Refusal) -> Row:
    return next(REFUSALS[kind] for kind in type(error).__mro__ if kind in REFUSALS)


def _headers(request_id: str) -> Headers:
    return [("content-type", "application/json"), ("x-request-id", request_id)]


def _refusal_json(row: Row, error: Refusal, request_id: str, dialect: Dialect) -> bytes:
    param, code = getattr(error, "param", row.param), getattr(error, "code", None) or row.code
    content = {"message": row.message(error), "type": row.type, "param": param, "code": code}
    return error_json(dialect, row.status, content, request_id)


def _known_models(models: list[str]) -> str:
    return f"It serves: {', '.join(models)}." if models else "No model is configured here."
