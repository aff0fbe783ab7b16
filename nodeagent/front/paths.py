"""One spelling for each path: clients are configured with all sorts of base URLs.

llama-server has its paths with and without `/v1`, and a base URL that ends with a slash brings double ones. Nothing is
redirected: many clients turn a POST that is redirected into a GET, or don't follow at all.
"""

import re
from typing import Final

_SLASHES: Final = re.compile("/{2,}")
# llama-server's `/embeddings` is missing: its format is another than that of `/v1/embeddings`.
_WITHOUT_V1: Final = {
    "/audio/transcriptions",
    "/models",
    "/chat/completions",
    "/chat/completions/control",
    "/chat/completions/input_tokens",
    "/completions",
    "/responses",
    "/responses/input_tokens",
    "/rerank",
    "/reranking",
}


def canonical(path: str) -> str:
    """The path as the routes have it: single slashes, none at its end, OpenAI's paths with their `/v1`."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    if path.endswith("/") and path != "/":
        path = path[:-1]
    if path in _WITHOUT_V1 or path.startswith("/models/"):
        return "/v1" + path
    return "/health" if path == "/v1/health" else path
