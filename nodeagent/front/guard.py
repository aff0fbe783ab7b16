"""Which requests come in: each needs an API key with the role of its path, where the node has keys.

    none        health checks, OPTIONS, the page and what describes the API
    metrics     /metrics, the inventory, the queue
    admin       everything else under /v1/node, and /upstream
    inference   all other paths

Both roads ask `enter` before they read the body. The account is then known to whatever serves the request.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from nodeagent.access.gate import Role
from nodeagent.front.accounts import account_var
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.health import PATHS
from nodeagent.front.seam import Node
from nodeagent.releases import Releases

if TYPE_CHECKING:
    from quart_trio import QuartTrio

_OPERATORS: Final = ("/v1/node/", "/upstream/")
# Ollama's clients ask for the version before they have a key.
_OPEN: Final = frozenset({"/", "/openapi.json", "/api/version", *PATHS})
_METRICS: Final = frozenset({"/metrics", "/v1/node/inventory", "/v1/node/queue", "/v1/node/requests"})
_BEARER: Final = b"bearer "


def role_for(method: str, path: str) -> Role | None:
    """The role that a request needs, None if it needs no key. `path` is as `paths.canonical` makes it."""
    if path in _OPEN or path.startswith("/page/") or method == "OPTIONS":
        return None
    if path in _METRICS:
        return "metrics"
    return "admin" if path.startswith(_OPERATORS) else "inference"


def given_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key of a request by its headers (names in lower case), `Authorization` or Anthropic's `x-api-key`; None
    without one."""
    authorization = headers.get(b"authorization")
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return headers.get(b"x-api-key")


def enter(node: Node, method: str, path: str, key: bytes | None, held: Releases) -> None:
    """Let the request in that this task serves, or refuse it. One for inference counts until `held` closes.

    Raises Unauthorized, InvalidApiKey, RoleForbidden, KeyLimitReached and KeyQuotaUsedUp.
    """
    role = role_for(method, path)
    account = None if role is None else node.gate.enter(role, key)
    account_var.set(account)
    if account is not None and path in ENDPOINTS:
        node.gate.begin(account, held)


def guard(app: "QuartTrio", node: Node) -> None:
    """Let requests in on the ordinary road."""
    from quart import request

    from nodeagent.front.asgi import releases

    @app.before_request
    async def let_in() -> None:
        enter(node, request.method, request.path, given_key(dict(request.scope["headers"])), releases())
