"""A response as HTTP/2: what waits to be sent, without I/O."""

import pytest

from nodeagent.front.http2_response import Http2Response
from nodeagent.front.protocol import RequestHead


def response(method: str = "GET") -> Http2Response:
    return Http2Response(
        RequestHead(
            method=method,
            target=b"/",
            http_version="2",
            headers=[],
            values={},
            has_body=False,
            keep_alive=True,
            expects_continue=False,
        )
    )


def waiting(made: Http2Response) -> bytes:
    return b"".join(made.waiting)


def test_nothing_is_returned_and_everything_waits() -> None:
    made = response()
    assert made.head(200, [(b"X-A", b"b"), (b"Connection", b"close")], close=True) == b""
    assert made.body(b"some") + made.body(b"") + made.body(b"more") + made.end() == b""
    assert [field for field in made.fields if field[0] != b"date"] == [(b":status", b"200"), (b"x-a", b"b")]
    assert (waiting(made), made.complete, made.keep_alive) == (b"somemore", True, True)


def test_what_waits_is_taken_in_pieces() -> None:
    made = response()
    made.head(200, [], close=False)
    made.body(b"0123456789")
    made.body(b"abc")
    assert [bytes(made.take(4)) for _ in range(4)] == [b"0123", b"4567", b"89", b"abc"]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_a_response_without_a_body_has_none(method: str, status: int) -> None:
    made = response(method)
    made.head(status, [(b"content-length", b"4")], close=False)
    made.body(b"some")
    made.end()
    assert (waiting(made), made.complete) == (b"", True)


def test_a_body_of_another_length_than_declared_is_an_error() -> None:
    made = response()
    made.head(200, [(b"content-length", b"4")], close=False)
    with pytest.raises(ValueError, match="shorter"):
        made.end()
    with pytest.raises(ValueError, match="longer"):
        made.body(b"12345")


@pytest.mark.parametrize("field", [(b"x", b"a\r\nb: c"), (b"x\n", b"a"), (b"x", b"a\0")])
def test_a_header_that_would_break_the_head_of_http_1_1_is_an_error_here_too(field: tuple[bytes, bytes]) -> None:
    made = response()
    with pytest.raises(ValueError, match="line break"):
        made.head(200, [field], close=False)
    assert not made.started
