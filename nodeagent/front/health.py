"""Health, for balancers and orchestrators.

`/livez` (and `/healthz`) say that the event loop turns, and depend on nothing. `/readyz` gates traffic. `/health`
answers as llama-server's own does, for clients that were written for it.
"""

from typing import Any

from quart import Blueprint, request

from nodeagent.front.seam import Node
from nodeagent.status import NodeStatus

_TAKES_TRAFFIC = (NodeStatus.READY, NodeStatus.DEGRADED)


def blueprint(node: Node) -> Blueprint:
    """The health routes."""
    routes = Blueprint("health", __name__)

    @routes.get("/livez")
    @routes.get("/healthz")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz")
    async def ready() -> tuple[dict[str, Any], int]:
        state = node.state()
        answer = {"status": state.status.value, "reasons": list(state.reasons)}
        if state.status in _TAKES_TRAFFIC and state.can_serve:
            return answer, 200
        # HAProxy's `disable-on-404` takes a 404 for "let the sessions here end, send no new ones".
        drains = state.status in (NodeStatus.DRAINING, NodeStatus.STOPPING)
        return answer, 404 if drains and request.args.get("drain") == "404" else 503

    @routes.get("/health")
    async def health() -> tuple[dict[str, Any], int]:
        if node.state().status is NodeStatus.STARTING:
            return {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, 503
        return {"status": "ok"}, 200

    return routes
