"""Which web pages may use the API: those in `cors_origins`, and no others.

A browser sends a page's POST with a plain content type to any address without asking first, so without this any page
that a user of this network opens could make the node work. Browsers put the page's origin on such requests, and pages
can't change it (https://fetch.spec.whatwg.org/#origin-header). Programs other than browsers send no Origin.

Reading is safe without a check: a page sees no response that lacks `Access-Control-Allow-Origin`. Operators' paths
refuse every Origin by themselves (`node.py`), and no header here lets a page in there.
"""

from typing import TYPE_CHECKING

from nodeagent.errors import OriginForbidden
from nodeagent.front.hosts import refuse_foreign_host
from nodeagent.front.seam import Node

if TYPE_CHECKING:
    from quart import Response
    from quart_trio import QuartTrio

_OPERATORS = ("/v1/node/", "/upstream/")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_PREFLIGHT_MAX_AGE_S = 600


def refuse_foreign(node: Node, method: str, path: str, origin: str | None) -> None:
    """Raise OriginForbidden for a request of a page that is not listed."""
    if origin is None or method in _SAFE_METHODS:
        return
    if path.startswith(_OPERATORS) or origin not in node.cors_origins:
        raise OriginForbidden(origin)


def headers_for(node: Node, origin: str | None) -> list[tuple[str, str]]:
    """What lets a listed page read a response, on any path but an operator's."""
    if not node.cors_origins:
        return []
    headers = [("Vary", "Origin")]  # caches must not give one page's response to another
    if origin is not None and origin in node.cors_origins:
        headers.append(("Access-Control-Allow-Origin", origin))
        headers.append(("Access-Control-Expose-Headers", "x-request-id, Retry-After"))
    return headers


def guard(app: "QuartTrio", node: Node) -> None:
    """Refuse requests of pages that are not listed, put the CORS headers on responses to those that are, and refuse
    browsers' requests under a foreign name (`hosts.py`)."""
    from quart import request

    @app.before_request
    async def refuse_others() -> None:
        headers = request.headers
        origin = headers.get("Origin")
        refuse_foreign_host(node, headers.get("Host"), origin=origin, fetch_site=headers.get("Sec-Fetch-Site"))
        refuse_foreign(node, request.method, request.path, origin)

    @app.after_request
    async def let_in(response: "Response") -> "Response":
        origin = request.headers.get("Origin")
        if request.path.startswith(_OPERATORS):
            return response
        response.headers.extend(headers_for(node, origin))
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if asks and origin in node.cors_origins:
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_MAX_AGE_S)
        return response
