"""Which web pages may use the API: the node's own, those in `cors_origins`, and no others.

A browser sends a page's POST with a plain content type to any address without asking first, so without this any page
that a user of this network opens could make the node work. Browsers put the page's origin on such requests, and pages
can't change it (https://fetch.spec.whatwg.org/#origin-header). Programs other than browsers send no Origin.

Reading is safe without a check: a page sees no response that lacks `Access-Control-Allow-Origin`. Operators' paths
refuse the Origin of every other page by themselves (`node.py`), and no header here lets one in there.

The node's own page (`web_page.py`) may use everything. What protects operators' paths from other pages is the token:
it goes in a header, which no page can have a browser send by itself, as it sends cookies.
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


def is_own_page(origin: str, *, host: str | None, fetch_site: str | None) -> bool:
    """Whether a request with this Origin comes from the node's own page; its Host has been checked (`hosts.py`).

    Newer browsers say so themselves in Sec-Fetch-Site, which no page can set; they say nothing over plain HTTP, but to
    loopback. Behind a proxy the page's scheme may be https, which the node does not see.
    """
    if fetch_site is not None:
        return fetch_site == "same-origin"
    return host is not None and origin in (f"http://{host}", f"https://{host}")


def refuse_foreign(
    node: Node, method: str, path: str, origin: str | None, *, host: str | None, fetch_site: str | None
) -> None:
    """Raise OriginForbidden for a request of a page that is neither the node's own nor listed."""
    if origin is None or method in _SAFE_METHODS or is_own_page(origin, host=host, fetch_site=fetch_site):
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
        origin, host, site = headers.get("Origin"), headers.get("Host"), headers.get("Sec-Fetch-Site")
        refuse_foreign_host(node, host, origin=origin, fetch_site=site)
        refuse_foreign(node, request.method, request.path, origin, host=host, fetch_site=site)

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
