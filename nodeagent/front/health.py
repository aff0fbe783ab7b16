"""Health checks for load balancers and orchestrators.

`/livez` (and `/healthz`) is liveness: the process responds. It depends on nothing else. `/readyz` is readiness: send
requests here. `/health` answers as llama-server's own, for clients written for it.
"""

import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from nodeagent.front.seam import Node
from nodeagent.status import NodeStatus

if TYPE_CHECKING:
    from quart import Blueprint, Response

_ACCEPTS_REQUESTS = (NodeStatus.READY, NodeStatus.DEGRADED)


def check(node: Node, path: str, query: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """The status, headers and body of the answer to a health check at one of `PATHS`."""
    status, answer = PATHS[path](node, query)
    return status, [("content-type", "application/json")], json.dumps(answer).encode() + b"\n"


def blueprint(node: Node) -> "Blueprint":
    """The health routes of the application. Where there is a fast road, it serves them."""
    from quart import Blueprint, Response, request

    routes = Blueprint("health", __name__)

    async def answer() -> "Response":
        status, headers, body = check(node, request.path, request.query_string)
        return Response(body, status=status, headers=dict(headers))

    for path in PATHS:
        routes.get(path, endpoint=path.strip("/"))(answer)
    return routes


def _live(_node: Node, _query: bytes) -> tuple[int, dict[str, Any]]:
    return 200, {"status": "ok"}


def _ready(node: Node, query: bytes) -> tuple[int, dict[str, Any]]:
    state = node.state()
    answer = {"status": state.status.value, "reasons": list(state.reasons)}
    if state.status in _ACCEPTS_REQUESTS and state.can_serve:
        return 200, answer
    # With `http-check disable-on-404`, HAProxy lets the sessions here end and sends no new ones.
    draining = state.status in (NodeStatus.DRAINING, NodeStatus.STOPPING)
    return 404 if draining and parse_qs(query).get(b"drain", [])[:1] == [b"404"] else 503, answer


def _health(node: Node, _query: bytes) -> tuple[int, dict[str, Any]]:
    if node.state().status is NodeStatus.STARTING:
        return 503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    return 200, {"status": "ok"}


PATHS: Final = {"/livez": _live, "/healthz": _live, "/readyz": _ready, "/health": _health}
