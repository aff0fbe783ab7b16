"""The page at `/`, by which people look at the node and operate it. Its files are in `page/`.

The page knows no more than other clients do: it uses `/v1/models`, `/v1/node/...` and `/v1/chat/completions`. It loads
nothing from elsewhere, and its policy lets the browser run no script but the files here, whatever a model's name or a
log line contains.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from quart import Blueprint, Response, request
from werkzeug.exceptions import NotFound

from nodeagent.front.hosts import refuse_foreign_host
from nodeagent.front.seam import Node

FOLDER: Final = Path(__file__).parent / "page"
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
_INDEX: Final = "index.html"
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, but asked for each time: after an update of the agent no browser mixes old files with new ones.
    "Cache-Control": "no-cache",
}


class _File(msgspec.Struct, frozen=True):
    content: bytes
    content_type: str
    etag: str


@cache
def _files() -> Mapping[str, _File]:
    """The files by name, read with the first request for one."""
    return {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in _TYPES}


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:32])


def blueprint(node: Node) -> Blueprint:
    """The routes of the page."""
    routes = Blueprint("page", __name__)

    @routes.get("/")
    async def page() -> Response:
        if "text/html" not in request.headers.get("Accept", ""):
            raise NotFound  # other clients learn where the paths are
        response = answer(_INDEX)
        response.headers["Vary"] = "Accept"
        return response

    @routes.get("/page/<name>")
    async def file(name: str) -> Response:
        return answer(name)

    def answer(name: str) -> Response:
        if not node.has_page:
            raise NotFound
        # What asks for a page is a browser, also where it does not say so (`hosts.py`).
        refuse_foreign_host(node, request.headers.get("Host"), origin=None, fetch_site="none")
        return _response(name)

    return routes


def _response(name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise NotFound
    unchanged = request.if_none_match.contains_weak(file.etag)  # a proxy that compresses makes it weak
    response = Response(b"" if unchanged else file.content, status=304 if unchanged else 200, headers=_HEADERS)
    response.set_etag(file.etag)
    if unchanged:
        response.headers.remove("Content-Length")
        response.headers.remove("Content-Type")
    else:
        response.content_type = file.content_type
    return response
