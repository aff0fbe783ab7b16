"""The node's own paths: what it is and has."""

from quart import Blueprint, Response

from nodeagent.front.seam import Node


def blueprint(node: Node) -> Blueprint:
    """The routes under `/v1/node`."""
    routes = Blueprint("node", __name__)

    @routes.get("/v1/node/inventory")
    async def inventory() -> Response:
        return Response(node.inventory_json(), content_type="application/json")

    return routes
