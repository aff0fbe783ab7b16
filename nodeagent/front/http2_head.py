"""What is accepted as a request's head in HTTP/2 (RFC 9113, 8.2 and 8.3), turned into what HTTP/1.1 would have: `Host`
for `:authority`, and a `Transfer-Encoding` for a body without a length. No I/O.
"""

import re
from typing import Final

from nodeagent.front.protocol import HEADERS_MAX_BYTES, HEADERS_MAX_COUNT, BadRequest, RequestHead

Fields = list[tuple[bytes, bytes]]

_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
# Of the connection, for which HTTP/2 has other means (RFC 9113, 8.2.2); a gateway that passes them on may be made to
# smuggle.
OF_CONNECTION: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
_BAD_REQUEST, _TOO_LARGE = 400, 431


class MalformedRequest(Exception):
    """The stream is to be reset with PROTOCOL_ERROR (RFC 9113, 8.1.1)."""


def request_head(fields: Fields, *, ended: bool) -> RequestHead | BadRequest:
    """The head of these fields; `ended` is whether no body follows. Raises MalformedRequest."""
    pseudo, headers = _split(fields)
    method, target = pseudo.get(b":method"), pseudo.get(b":path")
    if method is None or not _TOKEN.fullmatch(method):
        raise MalformedRequest(":method is missing or no method")
    if method == b"CONNECT":
        return _bad(_BAD_REQUEST, "CONNECT is not supported", method)
    if not target or b":scheme" not in pseudo:
        raise MalformedRequest(":path or :scheme is missing")
    if _size(headers) + len(target) > HEADERS_MAX_BYTES or len(headers) > HEADERS_MAX_COUNT:
        limits = f"at most {HEADERS_MAX_COUNT} headers and {HEADERS_MAX_BYTES} bytes of headers are allowed"
        return _bad(_TOO_LARGE, limits, method)
    length = content_length(headers)
    if ended and length:
        raise MalformedRequest("the body that Content-Length announces is missing")
    if not target.isascii():
        return _bad(_BAD_REQUEST, "the target must be ASCII, with other characters percent-encoded", method)
    if target == b"*" and method == b"OPTIONS":
        target = b"/"
    elif not target.startswith(b"/"):
        raise MalformedRequest(":path must be a path")
    headers.insert(0, (b"host", _host(pseudo, headers)))
    if not ended and length is None:
        headers.append((b"transfer-encoding", b"chunked"))
    expects = [value.lower() for name, value in headers if name == b"expect"]
    return RequestHead(
        method=method.decode("ascii"),
        target=target,
        http_version="2",
        headers=headers,
        values=dict(headers),
        has_body=not ended,
        keep_alive=True,
        expects_continue=not ended and b"100-continue" in expects,
    )


def check_trailers(fields: Fields) -> None:
    """Raises MalformedRequest. Nobody reads them."""
    pseudo, _ = _split(fields)
    if pseudo:
        raise MalformedRequest("pseudo-headers in trailers")


def content_length(headers: Fields) -> int | None:
    """The length of the body that the headers announce. Raises MalformedRequest if there are two."""
    lengths = [value for name, value in headers if name == b"content-length"]
    if not lengths:
        return None
    if len(lengths) > 1 or not lengths[0].isdigit():
        raise MalformedRequest("Content-Length is no number, or there are two")
    return int(lengths[0])


def _split(fields: Fields) -> tuple[dict[bytes, bytes], Fields]:
    """The pseudo-headers and the others. Raises MalformedRequest for what may be in no head."""
    pseudo: dict[bytes, bytes] = {}
    headers: Fields = []
    for name, value in fields:
        if not _VALUE.fullmatch(value):
            raise MalformedRequest("a value has a control character, or white space around it")
        if name.startswith(b":"):
            if name not in _PSEUDO or name in pseudo or headers:
                raise MalformedRequest("a pseudo-header is unknown, twice there, or behind another header")
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name):
            raise MalformedRequest("a name is none, or has upper case")
        if name in OF_CONNECTION or (name == b"te" and value.lower() != b"trailers"):
            raise MalformedRequest("a header is of the connection")
        headers.append((name, value))
    return pseudo, headers


def _host(pseudo: dict[bytes, bytes], headers: Fields) -> bytes:
    """The one host; it is taken out of the headers."""
    hosts = [value for name, value in headers if name == b"host"]
    headers[:] = [field for field in headers if field[0] != b"host"]
    if b":authority" in pseudo:
        hosts.append(pseudo[b":authority"])
    if not hosts or len(set(hosts)) > 1 or len(hosts) > 2 or b"@" in hosts[0]:
        raise MalformedRequest(":authority or Host is missing, or there are several, or a user is in it")
    return hosts[0]


def _size(headers: Fields) -> int:
    return sum([len(name) + len(value) for name, value in headers])


def _bad(status: int, complaint: str, method: bytes) -> BadRequest:
    sentence = f"The request is malformed: {complaint}."
    return BadRequest(status=status, complaint=sentence, answers_head=method == b"HEAD")
