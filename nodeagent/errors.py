"""Every error that the agent raises on purpose.

NodeAgentError
├── ConfigError              the configuration can't be used; carries every problem found
├── StartupError             the daemon can't start here (address taken, state folder locked)
├── UpstreamLost             a child's connection broke before its answer was whole
└── Refusal                  a request that is answered with an error; front/refusals.py maps each to its status
    ├── InvalidRequest       the request itself is wrong
    ├── UnsupportedEncoding  the body is compressed
    ├── BodyTooLarge
    ├── BodyTooSlow          the client does not go on sending its body
    ├── ServerBusy           too many bytes of request bodies are held at once
    ├── ModelNotFound
    ├── QueueFull            every lane that could serve it is full
    ├── QueueTimeout         its turn did not come in time
    ├── ModelLoadTimeout     the model was not ready in time; its start goes on
    ├── BackendUnavailable   no device can serve the model now
    ├── BackendCrashed       the server died under the request, and so did the one that it was tried on again
    ├── PoisonedRequest      a body under which two servers died is sent again
    ├── Unauthorized         the admin token is missing or wrong
    ├── OriginForbidden      a web page asks for what only operators may
    ├── NoSuchDevice
    ├── ReloadRefused        the new configuration is bad; the old one stays
    └── Draining             the node is on its way out

Fields, not formatted text: `str()` is for logs; what a client reads is written by the front.
"""

from dataclasses import dataclass
from pathlib import Path


class NodeAgentError(Exception):
    """The root of the agent's own errors."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration.

    `where` is the dotted key (`models[0].ctx_size`), or "" for the file as a whole; `line` counts from 1,
    None where no single line is to blame.
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


class UpstreamLost(NodeAgentError):
    """The connection to a child could not be made, or broke before its answer was whole."""

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        self.reason = reason
        super().__init__(f"{address}: {reason}")


class Refusal(NodeAgentError):
    """A request that is answered with an error instead of being served."""


class InvalidRequest(Refusal):
    """The request is wrong. `param` names the field of the body to blame, None where it is the whole."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.message = message
        self.param = param
        self.code = code
        super().__init__(message)


class UnsupportedEncoding(Refusal):
    """The body came with a Content-Encoding; bodies are forwarded verbatim, so none is taken."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        super().__init__(encoding)


class BodyTooLarge(Refusal):
    """The body is longer than `max_request_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"over {limit_bytes} bytes")


class BodyTooSlow(Refusal):
    """Of the body came `received_bytes` in `waited_s`, less than is expected of a client that still is there."""

    def __init__(self, received_bytes: int, waited_s: float) -> None:
        self.received_bytes = received_bytes
        self.waited_s = waited_s
        super().__init__(f"{received_bytes} bytes of the body in {waited_s:.1f} s")


class ServerBusy(Refusal):
    """The bodies of requests now held would pass the node's budget with this one."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        super().__init__(f"request bodies held would pass {budget_bytes} bytes")


class ModelNotFound(Refusal):
    """No model of that id or alias is configured here."""

    def __init__(self, model: str, known: list[str]) -> None:
        self.model = model
        self.known = known
        super().__init__(f"{model!r} is not one of {known}")


class QueueFull(Refusal):
    """Every lane that could serve the model holds as many requests as it may."""

    def __init__(self, model_id: str, limit: int, retry_after_s: float) -> None:
        self.model_id = model_id
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(f"{model_id}: {limit} requests per device are in flight or queued")


class QueueTimeout(Refusal):
    """The request waited `waited_s` without its turn coming."""

    def __init__(self, model_id: str, device_id: str, waited_s: float) -> None:
        self.model_id = model_id
        self.device_id = device_id
        self.waited_s = waited_s
        super().__init__(f"{model_id} on {device_id}: waited {waited_s:.1f} s for a turn")


class ModelLoadTimeout(Refusal):
    """The model was not ready `timeout_s` after its server was spawned. The start itself goes on."""

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
    """No device can serve the model now. `reason` says why, with the server's last words where it has some.

    `retry_after_s` is when another try may help, None where nothing is known to change.
    """

    def __init__(self, model_id: str, reason: str, retry_after_s: float | None = None) -> None:
        self.model_id = model_id
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(f"{model_id}: {reason}")


class BackendCrashed(Refusal):
    """The server died before the first byte of the answer, and so did the one that was tried next."""

    def __init__(self, model_id: str, device_id: str, reason: str) -> None:
        self.model_id = model_id
        self.device_id = device_id
        self.reason = reason
        super().__init__(f"{model_id} on {device_id}: {reason}")


class Draining(Refusal):
    """The node accepts no new requests: an operator drained it (`by_operator`), or it is about to stop."""

    def __init__(self, retry_after_s: float, *, by_operator: bool = False) -> None:
        self.retry_after_s = retry_after_s
        self.by_operator = by_operator
        super().__init__("drained by an operator" if by_operator else "the node is shutting down")


class PoisonedRequest(Refusal):
    """Two servers died under this very body, less than a minute ago. It is not sent to a third."""

    def __init__(self, model_id: str, blocked_s: float) -> None:
        self.model_id = model_id
        self.blocked_s = blocked_s
        super().__init__(f"{model_id}: a body that felled two servers is refused for {blocked_s:.0f} s more")


class Unauthorized(Refusal):
    """The path needs the admin token, and the request has none, or another."""


class OriginForbidden(Refusal):
    """The path is for operators, and the request comes from a web page."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        super().__init__(origin)


class NoSuchDevice(Refusal):
    """The node has no device of that id."""

    def __init__(self, device_id: str, known: list[str]) -> None:
        self.device_id = device_id
        self.known = known
        super().__init__(f"{device_id!r} is not one of {known}")


class ReloadRefused(Refusal):
    """The configuration file is bad, so the old configuration stays. `problems` are its faults, a line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))
