"""Which web pages may use the API: those in `cors_origins`, and no others.

A browser sends a page's POST with a plain content type to any address without asking first, so without this any page
that a user of this network opens could make the node work. Browsers put the page's origin on such requests, and pages
can't change it (https://fetch.spec.whatwg.org/#origin-header). Programs other than browsers send no Origin.

Reading is safe without a check: a page sees no response that lacks `Access-Control-Allow-Origin`. Operators' paths
refuse every Origin by themselves (`node.py`), and no header here lets a page in there.
"""

from quart import Response, request
from quart_trio import QuartTrio

from nodeagent.errors import OriginForbidden
from nodeagent.front.seam import Node

_OPERATORS = "/v1/node/"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_PREFLIGHT_MAX_AGE_S = 600


def guard(app: QuartTrio, node: Node) -> None:
    """Refuse requests of pages that are not listed, and put the CORS headers on responses to those that are."""

    @app.before_request
    async def refuse_others() -> None:
        origin = request.headers.get("Origin")
        if origin is None or request.method in _SAFE_METHODS:
            return
        if request.path.startswith(_OPERATORS) or origin not in node.cors_origins:
            raise OriginForbidden(origin)

    @app.after_request
    async def let_in(response: Response) -> Response:
        origin = request.headers.get("Origin")
        if request.path.startswith(_OPERATORS) or not node.cors_origins:
            return response
        response.headers.add("Vary", "Origin")  # caches must not give one page's response to another
        if origin in node.cors_origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "x-request-id, Retry-After"
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                response.headers["Access-Control-Allow-Methods"] = "GET, POST"
                wanted = request.headers.get("Access-Control-Request-Headers", "")
                response.headers["Access-Control-Allow-Headers"] = wanted
                response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_MAX_AGE_S)
        return response
