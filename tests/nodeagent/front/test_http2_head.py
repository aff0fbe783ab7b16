"""What is accepted as a request's head in HTTP/2, and what HTTP/1.1 would have for it."""

import pytest

from nodeagent.front.http2_head import Fields, MalformedRequest, check_trailers, request_head
from nodeagent.front.protocol import HEADERS_MAX_BYTES, HEADERS_MAX_COUNT, BadRequest, RequestHead

METHOD, SCHEME, AUTHORITY, PATH = (
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"n"),
    (b":path", b"/a"),
)
PSEUDO = [METHOD, SCHEME, AUTHORITY, PATH]


def head_of(*fields: tuple[bytes, bytes], ended: bool = False) -> RequestHead:
    found = request_head(list(fields), ended=ended)
    assert isinstance(found, RequestHead)
    return found


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ([], [(b"host", b"n")]),
        ([(b"x", b"1"), (b"x", b"2")], [(b"host", b"n"), (b"x", b"1"), (b"x", b"2")]),
        ([(b"host", b"n"), (b"x", b"")], [(b"host", b"n"), (b"x", b"")]),
        ([(b"te", b"Trailers")], [(b"host", b"n"), (b"te", b"Trailers")]),
        ([(b"x", b"a\tb \xe4")], [(b"host", b"n"), (b"x", b"a\tb \xe4")]),
    ],
)
def test_the_authority_becomes_the_host_and_comes_first(fields: Fields, headers: Fields) -> None:
    head = head_of(*PSEUDO, *fields, ended=True)
    assert (head.method, head.target, head.http_version, head.headers) == ("POST", b"/a", "2", headers)
    assert (head.has_body, head.keep_alive, head.expects_continue) == (False, True, False)


def test_a_host_without_an_authority_is_enough() -> None:
    assert head_of(METHOD, SCHEME, PATH, (b"host", b"n"), ended=True).headers == [(b"host", b"n")]


def test_a_body_without_a_length_is_one_of_chunks_as_http_1_1_has_it() -> None:
    assert head_of(*PSEUDO).headers[-1] == (b"transfer-encoding", b"chunked")
    assert head_of(*PSEUDO, (b"content-length", b"3")).headers[-1] == (b"content-length", b"3")


def test_a_client_may_wait_for_a_100_only_with_a_body() -> None:
    expects = (b"expect", b"100-Continue")
    assert head_of(*PSEUDO, expects).expects_continue
    assert not head_of(*PSEUDO, expects, ended=True).expects_continue


def test_options_of_everything_is_that_of_the_root() -> None:
    assert head_of((b":method", b"OPTIONS"), SCHEME, AUTHORITY, (b":path", b"*"), ended=True).target == b"/"


@pytest.mark.parametrize(
    "fields",
    [
        [SCHEME, AUTHORITY, PATH],
        [METHOD, AUTHORITY, PATH],
        [METHOD, SCHEME, AUTHORITY],
        [METHOD, SCHEME, PATH],
        [METHOD, SCHEME, AUTHORITY, (b":path", b"")],
        [METHOD, SCHEME, AUTHORITY, (b":path", b"*")],
        [METHOD, SCHEME, AUTHORITY, (b":path", b"a")],
        [METHOD, SCHEME, AUTHORITY, (b":path", b"https://n/a")],
        [METHOD, SCHEME, (b":authority", b"user@n"), PATH],
        [(b":method", b"PO ST"), SCHEME, AUTHORITY, PATH],
        [(b":method", b""), SCHEME, AUTHORITY, PATH],
        [*PSEUDO, METHOD],
        [*PSEUDO, (b":status", b"200")],
        [*PSEUDO, (b":protocol", b"websocket")],
        [*PSEUDO[:3], (b"x", b"1"), PATH],
        [*PSEUDO, (b"host", b"m")],
        [*PSEUDO, (b"host", b"n"), (b"host", b"n")],
        [*PSEUDO, (b"host", b"n"), (b"host", b"m")],
        [*PSEUDO, (b"X", b"1")],
        [*PSEUDO, (b"", b"1")],
        [*PSEUDO, (b"x y", b"1")],
        [*PSEUDO, (b"x:", b"1")],
        [*PSEUDO, (b"x\r\ny", b"1")],
        [*PSEUDO, (b"x", b" 1")],
        [*PSEUDO, (b"x", b"1\t")],
        [*PSEUDO, (b"x", b"1\r\ny: 2")],
        [*PSEUDO, (b"x", b"\0")],
        [*PSEUDO, (b"x", b"\x7f")],
        [*PSEUDO[:3], (b":path", b"/a\nb")],
        [*PSEUDO, (b"connection", b"close")],
        [*PSEUDO, (b"keep-alive", b"1")],
        [*PSEUDO, (b"proxy-connection", b"close")],
        [*PSEUDO, (b"transfer-encoding", b"chunked")],
        [*PSEUDO, (b"upgrade", b"h2c")],
        [*PSEUDO, (b"te", b"gzip")],
        [*PSEUDO, (b"content-length", b"1"), (b"content-length", b"1")],
        [*PSEUDO, (b"content-length", b"-1")],
        [*PSEUDO, (b"content-length", b"1, 1")],
    ],
)
def test_a_malformed_head_is_refused(fields: Fields) -> None:
    with pytest.raises(MalformedRequest):
        request_head(fields, ended=False)


def test_a_length_without_a_body_is_malformed_unless_it_is_zero() -> None:
    with pytest.raises(MalformedRequest):
        request_head([*PSEUDO, (b"content-length", b"1")], ended=True)
    assert not head_of(*PSEUDO, (b"content-length", b"0"), ended=True).has_body


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([*PSEUDO, *((b"x", b"1"),) * HEADERS_MAX_COUNT, (b"x", b"1")], 431),
        ([*PSEUDO, (b"x", b"1" * HEADERS_MAX_BYTES)], 431),
        ([*PSEUDO[:3], (b":path", b"/" + b"a" * HEADERS_MAX_BYTES)], 431),
        ([*PSEUDO[:3], (b":path", b"/\xc3\xa4")], 400),
        ([(b":method", b"CONNECT"), AUTHORITY], 400),
    ],
)
def test_what_is_well_formed_but_not_served_gets_an_answer(fields: Fields, status: int) -> None:
    found = request_head(fields, ended=True)
    assert isinstance(found, BadRequest)
    assert (found.status, found.answers_head) == (status, False)


def test_the_refusal_of_a_head_request_has_no_body() -> None:
    found = request_head([(b":method", b"HEAD"), *PSEUDO[1:3], (b":path", b"/\xc3\xa4")], ended=True)
    assert isinstance(found, BadRequest)
    assert found.answers_head


@pytest.mark.parametrize("fields", [[PATH], [(b"X", b"1")], [(b"x", b"\n")], [(b"connection", b"close")]])
def test_trailers_are_checked_like_headers(fields: Fields) -> None:
    check_trailers([(b"x", b"1")])
    with pytest.raises(MalformedRequest):
        check_trailers(fields)
