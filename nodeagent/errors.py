"""Every error that the agent raises on purpose.

NodeAgentError
├── ConfigError              the configuration can't be used; carries every problem found
├── StartupError             the daemon can't start here (address in use, state folder locked)
├── EndedAtOnce              a second signal ended the daemon
├── GgufError                a model file can't be read (gguf/file.py)
├── DriverError              a GPU driver does not answer as it should (devices/backend.py)
├── CommandFailed            an operator's command failed (cli/operations.py)
├── UpstreamLost             the connection to a server broke before its answer was complete
└── Refusal                  a request is answered with an error; front/refusals.py has the status of each
    ├── InvalidRequest       the request itself is wrong
    ├── UnsupportedEncoding  the body is compressed
    ├── BodyTooLarge
    ├── BodyTooSlow          the client stopped sending its body
    ├── ServerBusy           the node holds as many bytes of request bodies as it may
    ├── ModelNotFound
    ├── ModelNotLoaded       there is no server of the model to look at
    ├── RemoteMediaForbidden the request has an image, sound or file by URL
    ├── WrongTask            the model can't do what the path is for
    ├── QueueFull            every lane that could serve the request is full
    ├── QueueTimeout         the request waited too long for its turn
    ├── ModelLoadTimeout     the model was not ready in time; its start goes on
    ├── BackendUnavailable   no device can serve the model now
    │   └── OutOfDeviceMemory  the load needs more of the device's memory than was free
    ├── BackendCrashed       the server crashed during the request, and after one retry again
    ├── BadAnswer            the server's answer can't be translated for the client
    ├── RequestCancelled     an operator ended the request
    ├── NoSuchRequest        none with that number is queued or in flight
    ├── NoSuchRecord         none with that number is in the activity
    ├── PathForbidden        a path of a server that nobody may reach through the node
    ├── Draining             the node accepts no new requests
    ├── ShuttingDown         an order that makes no sense for a node that is about to stop
    ├── PoisonedRequest      two servers crashed on the same body
    ├── Unauthorized         the admin token is missing or wrong
    ├── InvalidApiKey        the API key is missing or wrong
    ├── RoleForbidden        the API key is not for this path
    ├── ModelForbidden       the API key is not for this model
    ├── KeyLimitReached      the API key has too many requests for the moment
    ├── KeyQuotaUsedUp       the API key has used up its tokens of the day
    ├── OriginForbidden      a web page sent a request that it may not send
    ├── HostForbidden        a browser's request names the node by a name that is not its own
    ├── NoSuchDevice
    └── ReloadRefused        the new configuration is bad; the old one stays

Errors carry fields, not formatted text. `str()` is for logs; the front writes the message that a client reads.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec


class NodeAgentError(Exception):
    """The root of the agent's own errors."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with a configuration.

    `where` is the dotted key (`models[0].ctx_size`), or "" for the file as a whole. `line` counts from 1; None if the
    problem is not in one line.
    """

    message: str
    where: str = ""
    file: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        return f"{place}{self.where}: {self.message}" if self.where else f"{place}{self.message}"


class ConfigError(NodeAgentError):
    """The configuration can't be used. `problems` is never empty; each prints as one line."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class StartupError(NodeAgentError):
    """The daemon can't start on this host as configured; the message is one line for a person."""


class EndedAtOnce(NodeAgentError):
    """A second signal ended the daemon before it had stopped in good order."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"ended by signal {signum}")


class UpstreamLost(NodeAgentError):
    """The connection to a server could not be made, or broke before its answer was complete."""

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        self.reason = reason
        super().__init__(f"{address}: {reason}")


class Refusal(NodeAgentError):
    """A request that is answered with an error instead of being served. `is_counted` is whether that was counted."""

    is_counted = False


class InvalidRequest(Refusal):
    """The request is wrong. `param` names the field at fault, None if it is the body as a whole."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.message = message
        self.param = param
        self.code = code
        super().__init__(message)


class UnsupportedEncoding(Refusal):
    """The body has a Content-Encoding. Bodies are forwarded unchanged, so none is supported."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        super().__init__(encoding)


class BodyTooLarge(Refusal):
    """The body is longer than `max_request_bytes`, the model's own if one is named."""

    def __init__(self, limit_bytes: int, model_id: str | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.model_id = model_id
        super().__init__(f"over {limit_bytes} bytes")


class BodyTooSlow(Refusal):
    """Only `received_bytes` of the body arrived in `waited_s`: too few for a client that is still sending."""

    def __init__(self, received_bytes: int, waited_s: float) -> None:
        self.received_bytes = received_bytes
        self.waited_s = waited_s
        super().__init__(f"{received_bytes} bytes of the body in {waited_s:.1f} s")


class ServerBusy(Refusal):
    """With this request the node would hold more than `budget_bytes` of request bodies.

    `gave_way` is whether its body was arriving, more slowly than the others, and made room for them.
    """

    def __init__(self, budget_bytes: int, *, gave_way: bool = False) -> None:
        self.budget_bytes = budget_bytes
        self.gave_way = gave_way
        super().__init__(f"request bodies would exceed {budget_bytes} bytes")


class ModelNotFound(Refusal):
    """No model of that id or alias is configured here."""

    def __init__(self, model: str, known: list[str]) -> None:
        self.model = model
        self.known = known
        super().__init__(f"{model!r} is not one of {known}")


class ModelNotLoaded(Refusal):
    """No server of the model is ready, and what was asked does not load it."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        super().__init__(f"{model_id} is not loaded")


class WrongTask(Refusal):
    """The model is for another task (`task`) than the path needs; `able` are the models for that one
    that the request's API key may use."""

    def __init__(self, model_id: str, task: str, needed: str, able: list[str]) -> None:
        self.model_id = model_id
        self.task = task
        self.needed = needed
        self.able = able
        super().__init__(f"{model_id} is a model for {task}, not for {needed}")


class RemoteMediaForbidden(Refusal):
    """The request has an image, sound or file by URL, which a server would fetch. `param` is where."""

    def __init__(self, param: str) -> None:
        self.param = param
        super().__init__(f"{param} is a URL")


class QueueFull(Refusal):
    """Every lane that could serve the model has as many requests as it may have."""

    def __init__(self, model_id: str, limit: int, retry_after_s: float) -> None:
        self.model_id = model_id
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(f"{model_id}: {limit} requests per device are in flight or queued")


class QueueTimeout(Refusal):
    """The request waited `waited_s` for its turn, in vain."""

    def __init__(self, model_id: str, device_id: str, waited_s: float) -> None:
        self.model_id = model_id
        self.device_id = device_id
        self.waited_s = waited_s
        super().__init__(f"{model_id} on {device_id}: waited {waited_s:.1f} s for a turn")


class ModelLoadTimeout(Refusal):
    """The model was not ready `timeout_s` after its server was spawned. The start goes on."""

    def __init__(self, model_id: str, device_id: str, timeout_s: float, retry_after_s: float) -> None:
        self.model_id = model_id
        self.device_id = device_id
        self.timeout_s = timeout_s
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{model_id} on {device_id}: not ready after {timeout_s:g} s (llama_server_startup_timeout_s); "
            "its start goes on"
        )


class BackendUnavailable(Refusal):
    """No device can serve the model now, for this reason.

    `retry_after_s` is when a retry may help, None if unknown. `last_lines` is what the server printed before it ended,
    if one did: it may hold paths and parts of prompts, so the log and operators get it, and clients don't.
    """

    def __init__(
        self, model_id: str, reason: str, retry_after_s: float | None = None, last_lines: Sequence[str] = ()
    ) -> None:
        self.model_id = model_id
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.last_lines = last_lines
        super().__init__(f"{model_id}: {with_last_lines(reason, last_lines)}")

    def for_operators(self) -> "BackendUnavailable":
        """The same with the last lines in its reason."""
        return BackendUnavailable(self.model_id, with_last_lines(self.reason, self.last_lines), self.retry_after_s)


class OutOfDeviceMemory(BackendUnavailable):
    """A load needs more of the device's memory than was free: `least_bytes` at least, None if unknown."""

    def __init__(
        self,
        model_id: str,
        reason: str,
        least_bytes: int | None,
        retry_after_s: float | None,
        last_lines: Sequence[str],
    ) -> None:
        self.least_bytes = least_bytes
        super().__init__(model_id, reason, retry_after_s, last_lines)


class BackendCrashed(Refusal):
    """The server crashed before the first byte of the answer and again on the retry, or in mid-answer."""

    def __init__(self, model_id: str, device_id: str, reason: str) -> None:
        self.model_id = model_id
        self.device_id = device_id
        self.reason = reason
        super().__init__(f"{model_id} on {device_id}: {reason}")


class BadAnswer(Refusal):
    """The server's answer is an error in mid-stream, or nothing that can be translated for the client; `reason` is for
    the client."""

    def __init__(self, model_id: str, reason: str) -> None:
        self.model_id = model_id
        self.reason = reason
        super().__init__(f"{model_id}: {reason}")


class RequestCancelled(Refusal):
    """An operator ended the request while it was queued or in flight."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        super().__init__(f"{model_id}: ended by an operator")


class NoSuchRequest(Refusal):
    """No request with that number is queued or in flight: it has ended, or there never was one."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(str(number))


class NoSuchRecord(Refusal):
    """No record with that number is in the activity: it was displaced by newer ones, or there never was one."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(str(number))


class PathForbidden(Refusal):
    """A path of a server that nobody may reach through the node, for this reason."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class Draining(Refusal):
    """The node accepts no new requests: an operator drained it (`by_operator`), or it is about to stop."""

    def __init__(self, retry_after_s: float, *, by_operator: bool = False) -> None:
        self.retry_after_s = retry_after_s
        self.by_operator = by_operator
        super().__init__("drained by an operator" if by_operator else "the node is shutting down")


class ShuttingDown(Refusal):
    """An operator's order came when the agent had been asked to end. `order` completes "it can't ..."."""

    def __init__(self, order: str) -> None:
        self.order = order
        super().__init__(f"the node is shutting down, so it can't {order}")


class PoisonedRequest(Refusal):
    """Two servers crashed on this body less than a minute ago, so it is not sent to another one."""

    def __init__(self, model_id: str, blocked_s: float) -> None:
        self.model_id = model_id
        self.blocked_s = blocked_s
        super().__init__(f"{model_id}: a body that crashed two servers is rejected for {blocked_s:.0f} s more")


class Unauthorized(Refusal):
    """The path needs the admin token, and the request has none or a wrong one."""


class InvalidApiKey(Refusal):
    """The node has API keys, and the request has none (`is_missing`) or one that is not valid."""

    def __init__(self, *, is_missing: bool) -> None:
        self.is_missing = is_missing
        super().__init__("no API key" if is_missing else "an API key that is not valid")


class RoleForbidden(Refusal):
    """The request's API key, of that name, lacks the role that the path needs."""

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        self.role = role
        super().__init__(f"API key {name!r} lacks the role {role}")


class ModelForbidden(Refusal):
    """The request's API key, of that name, is not for the model. `allowed` are those that it is for."""

    def __init__(self, name: str, model_id: str, allowed: list[str]) -> None:
        self.name = name
        self.model_id = model_id
        self.allowed = allowed
        super().__init__(f"API key {name!r} may not use {model_id!r}, only {', '.join(allowed) or 'none'}")


class KeyLimitReached(Refusal):
    """The API key has as many requests as it may for the moment; `what` names the limit as the configuration does."""

    def __init__(self, name: str, what: str, limit: int, retry_after_s: float | None) -> None:
        self.name = name
        self.what = what
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(f"API key {name!r} is at its limit of {limit} {what}")


class KeyQuotaUsedUp(Refusal):
    """The API key has used up its tokens of the day."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        super().__init__(f"API key {name!r} has used up its {limit} tokens of the day")


class OriginForbidden(Refusal):
    """The request comes from a web page that may not use this path."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        super().__init__(origin)


class HostForbidden(Refusal):
    """A browser's request came under a name that is none of this node's."""

    def __init__(self, host: str) -> None:
        self.host = host
        super().__init__(host)


class NoSuchDevice(Refusal):
    """The node has no device of that id."""

    def __init__(self, device_id: str, known: list[str]) -> None:
        self.device_id = device_id
        self.known = known
        super().__init__(f"{device_id!r} is not one of {known}")


class ReloadRefused(Refusal):
    """The configuration file is bad, so the old configuration stays. `problems` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def with_last_lines(reason: str, lines: Sequence[str]) -> str:
    """The reason with what a server printed last, if anything: for the log and for operators."""
    return f"{reason}; it last printed: {' | '.join(lines)}" if lines else reason
