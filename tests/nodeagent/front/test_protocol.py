"""The parser of requests: what bytes mean, however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.front.protocol import END_OF_BODY, BadRequest, EndOfBody, RequestEvent, RequestHead, RequestParser

GET = b"GET /a?b=c HTTP/1.1\r\nHost: n\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: n\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"POST /p HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nLate: x\r\n\r\n"
# As Java's client sends them.
UPGRADE = (
    b"POST /p HTTP/1.1\r\nHost: n\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n"
    b"Content-Length: 3\r\n\r\nabc"
)
UPGRADE_CHUNKED = UPGRADE.replace(
    b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
)


def shown(events: list[RequestEvent]) -> list[str]:
    """One word for each request and its body, with the pieces of the body joined."""
    words: list[str] = []
    for event in events:
        match event:
            case RequestHead():
                words.append(f"{event.method} {event.target.decode()} ")
            case bytes():
                words[-1] += event.decode()
            case EndOfBody():
                words[-1] += "."
            case BadRequest():
                words.append(str(event.status))
    return words


def parse(data: bytes) -> list[str]:
    return shown(RequestParser().feed(data))


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (GET, "GET /a?b=c ."),
        (POST, "POST /p abc."),
        (CHUNKED, "POST /p abc."),
        (UPGRADE, "POST /p abc."),
        (UPGRADE_CHUNKED, "POST /p abc."),
        (GET.replace(b"GET", b"OPTIONS").replace(b"/a?b=c", b"*"), "OPTIONS / ."),
        (GET.replace(b"/a", b"http://n/a"), "GET /a?b=c ."),
        (GET.replace(b"/a", b"HTTP://n"), "GET /?b=c ."),
    ],
)
@given(st.data())
def test_a_request_is_the_same_however_it_is_cut_and_whatever_follows(
    request_: bytes, word: str, data: st.DataObject
) -> None:
    stream = request_ + POST + request_ + GET
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser, events = RequestParser(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += parser.feed(stream[start:end])
    assert shown(events) == [word, "POST /p abc.", word, "GET /a?b=c ."]


@pytest.mark.parametrize("last", [GET.replace(b"Host", b"Connection: close\r\nHost"), GET.replace(b"1.1", b"1.0")])
def test_what_follows_the_last_request_is_ignored(last: bytes) -> None:
    parser = RequestParser()
    events = parser.feed(last + b"\0garbage") + parser.feed(GET)
    assert shown(events) == ["GET /a?b=c ."]
    [head, end] = events
    assert isinstance(head, RequestHead)
    assert not head.keep_alive
    assert end is END_OF_BODY


def with_header(header: bytes, request_: bytes = POST) -> bytes:
    return request_.replace(b"Host: n\r\n", b"Host: n\r\n" + header + b"\r\n")


@pytest.mark.parametrize(
    ("request_", "status", "complaint"),
    [
        (with_header(b"Transfer-Encoding: chunked"), 400, "can't be present with"),
        (with_header(b"Content-Length: 3"), 400, "Duplicate Content-Length"),
        (POST.replace(b": 3", b": +3"), 400, "Content-Length"),
        (POST.replace(b": 3", b": 3, 3"), 400, "Content-Length"),
        (POST.replace(b": 3", b": " + b"9" * 30), 400, "overflow"),
        (CHUNKED.replace(b"chunked", b"gzip, chunked"), 501, "only Transfer-Encoding supported is 'chunked'"),
        (CHUNKED.replace(b"chunked", b"chunked, gzip"), 400, "Transfer-Encoding"),
        (CHUNKED.replace(b"chunked", b"xchunked"), 501, "only Transfer-Encoding"),
        (with_header(b"Transfer-Encoding: chunked", CHUNKED), 400, "Transfer-Encoding"),
        (CHUNKED.replace(b"1.1", b"1.0"), 400, "HTTP/1.0 has no Transfer-Encoding"),
        (GET.replace(b"Host: n\r\n", b""), 400, "exactly one Host"),
        (with_header(b"Host: m"), 400, "exactly one Host"),
        (with_header(b"X : y"), 400, "header"),
        (with_header(b"X: y\r\n z"), 400, "whitespace"),
        (with_header(b"X: a\0b"), 400, "header"),
        (GET.replace(b"\r\n", b"\n"), 400, "CRLF"),
        (GET.replace(b"/a", "/ä".encode()), 400, "url"),
        (GET.replace(b"/a?b=c", b"n:80").replace(b"GET", b"CONNECT"), 400, "must be a path"),
        (GET.replace(b"1.1", b"2.0"), 505, "only HTTP/1.1 and HTTP/1.0"),
        (GET.replace(b"1.1", b"7.3"), 505, "only HTTP/1.1 and HTTP/1.0"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "only HTTP/1.1 and HTTP/1.0"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "method"),
        (with_header(b"\r\n".join([b"a: b"] * 101)), 431, "at most 100 headers"),
        (with_header(b"a: " + b"b" * 40_000), 431, "32768 bytes of headers"),
    ],
)
def test_a_doubtful_request_is_refused_and_nothing_after_it_is_read(
    request_: bytes, status: int, complaint: str
) -> None:
    parser = RequestParser()
    [bad] = parser.feed(request_)
    assert isinstance(bad, BadRequest)
    assert bad.status == status
    assert complaint in bad.complaint
    assert parser.feed(GET) == []


@pytest.mark.parametrize(
    "chunk", [b"3\r\nabcd\r\n0\r\n\r\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n", b"f" * 17 + b"\r\n", b"-1\r\n"]
)
def test_a_body_in_bad_chunks_is_refused(chunk: bytes) -> None:
    words = parse(CHUNKED[: CHUNKED.index(b"3\r\n")] + chunk)
    assert words[-1] == "400"
    assert not words[0].endswith(".")


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: n\r\na: ",
        CHUNKED[: CHUNKED.index(b"Late")] + b"a: ",
        CHUNKED[: CHUNKED.index(b"3\r\n")] + b"3;",
    ],
    ids=["target", "header", "trailer", "chunk extension"],
)
def test_a_head_or_a_trailer_without_end_is_refused_soon(begin: bytes) -> None:
    parser = RequestParser()
    parser.feed(begin)
    for _ in range(70):
        events = parser.feed(b"b" * 1000)
        if events:
            break
    [bad] = events
    assert isinstance(bad, BadRequest)
    assert bad.status == 431
