"""Which headers are forwarded, in each direction."""

from collections.abc import Iterable

# Of a request: what says how to read the body and what the response may be. Everything else is between the client and
# this node, above all Authorization: the child has a key of its own.
_FORWARDED = frozenset({b"content-type", b"accept", b"user-agent", b"x-request-id", b"traceparent", b"tracestate"})

# Of a response: all but those of the connection (RFC 9110, 7.6.1), those about the child itself, and those that the
# front sets for every child.
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


def forwardable(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Of a client's request headers (with names in lower case), those that are sent to the child."""
    return [(name, value) for name, value in headers if name in _FORWARDED]


def returnable(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Of a child's response headers (with names in lower case), those that are sent to the client."""
    return [
        header
        for header in headers
        if header[0] not in _OF_CONNECTION and header[0] not in _OF_CHILD and not header[0].startswith(_CORS)
    ]
