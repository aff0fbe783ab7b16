"""Which headers pass, in each direction."""

from collections.abc import Iterable

# Of a request: what says how to read the body and what may come back. The rest is between the client and this node;
# its Authorization most of all, the child has a key of its own.
_FORWARDED = frozenset({b"content-type", b"accept", b"user-agent", b"x-request-id"})

# Of an answer: all but what speaks of one connection (RFC 9110, 7.6.1), and what the child says of
# itself or what the front says for every child.
_OF_CONNECTION = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_OF_CHILD = frozenset({b"server", b"date", b"set-cookie", b"cache-control", b"x-accel-buffering"})
_CORS = b"access-control-"


def forwardable(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Of a client's request headers, those that the child is sent."""
    named = ((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers)
    return [(name, value) for name, value in named if name in _FORWARDED]


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Of a child's answer headers, those that the client is sent; names are lower case."""
    return [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name not in _OF_CONNECTION and name not in _OF_CHILD and not name.startswith(_CORS)
    ]
