"""How a response is written: where its body ends, and that no header breaks its head."""

import pytest

from nodeagent.front.response import Headers, ResponseWriter


def written(writer: ResponseWriter, status: int = 200, headers: Headers | None = None, body: bytes = b"abc") -> bytes:
    head = writer.head(status, headers or [], close=False)
    return head + writer.body(body) + writer.end()


def test_a_body_of_unknown_length_is_sent_in_chunks() -> None:
    writer = ResponseWriter(keep_alive=True)
    head, _, body = written(writer).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"\r\ndate: " in head
    assert body == b"3\r\nabc\r\n0\r\n\r\n"
    assert (writer.complete, writer.keep_alive, writer.ends_by_closing) == (True, True, False)


def test_a_declared_length_is_kept_to() -> None:
    headers = [(b"Content-Length", b"3")]
    response = written(ResponseWriter(keep_alive=True), headers=headers)
    assert response.endswith(b"\r\n\r\nabc")
    assert b"chunked" not in response
    with pytest.raises(ValueError, match="1 bytes longer"):
        written(ResponseWriter(), headers=headers, body=b"abcd")
    writer = ResponseWriter()
    with pytest.raises(ValueError, match="1 bytes shorter"):
        written(writer, headers=headers, body=b"ab")
    assert not writer.complete


@pytest.mark.parametrize(("status", "is_head"), [(204, False), (304, False), (200, True)])
def test_a_response_that_has_no_body_has_none(status: int, is_head: bool) -> None:
    writer = ResponseWriter(is_head=is_head, keep_alive=True)
    assert written(writer, status).endswith(b"\r\n\r\n")
    assert writer.complete


def test_a_body_for_http_1_0_ends_with_the_connection() -> None:
    writer = ResponseWriter(http_version="1.0")
    head = writer.head(200, [], close=False)
    assert b"connection: close" in head
    assert b"chunked" not in head
    assert writer.body(b"abc") == b"abc"
    assert writer.ends_by_closing
    assert writer.end() == b""
    assert not writer.ends_by_closing


@pytest.mark.parametrize("said", ["by the server", "by the application"])
def test_the_end_of_the_connection_is_announced_once(said: str) -> None:
    writer = ResponseWriter(keep_alive=True)
    headers = [(b"Connection", b"close"), (b"transfer-encoding", b"chunked")] if said == "by the application" else []
    head = writer.head(200, headers, close=said == "by the server")
    assert head.lower().count(b"connection: close") == head.lower().count(b"transfer-encoding") == 1
    assert not writer.keep_alive


@pytest.mark.parametrize("header", [(b"a", b"b\r\nc: d"), (b"a\n", b"b"), (b"a", b"\0")])
def test_a_header_that_would_break_the_head_is_an_error(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="line break"):
        ResponseWriter().head(200, [header], close=False)
