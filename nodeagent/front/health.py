"""Health checks for load balancers and orchestrators.

`/livez` (and `/healthz`) is liveness: the process responds. It depends on nothing else. `/readyz` is readiness: send
requests here. `/health` answers as llama-server's own, for clients written for it.
"""

from typing import Any

from quart import Blueprint, request

from nodeagent.front.seam import Node
from nodeagent.status import NodeStatus

_ACCEPTS_REQUESTS = (NodeStatus.READY, NodeStatus.DEGRADED)


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
        if state.status in _ACCEPTS_REQUESTS and state.can_serve:
            return answer, 200
        # With `http-check disable-on-404`, HAProxy lets the sessions here end and sends no new ones.
        draining = state.status in (NodeStatus.DRAINING, NodeStatus.STOPPING)
        return answer, 404 if draining and request.args.get("drain") == "404" else 503

    @routes.get("/health")
    async def health() -> tuple[dict[str, Any], int]:
        if node.state().status is NodeStatus.STARTING:
            return {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, 503
        return {"status": "ok"}, 200

    return routes
