"""The frames that a client may send besides its requests, in virtual time."""

import pytest
import trio
from h2.errors import ErrorCodes
from trio.testing import MockClock

from nodeagent.front.http2_flood import BadFrames, FloodGuard

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION, UNKNOWN = 0, 1, 2, 3, 4, 6, 8, 9, 99
END_STREAM = 1


def frame(kind: int, length: int = 0, flags: int = 0) -> bytes:
    return length.to_bytes(3, "big") + bytes([kind, flags]) + b"\0\0\0\1" + b"\xff" * length


def guard() -> FloodGuard:
    made = FloodGuard()
    made.feed(PREFACE)
    return made


@pytest.mark.parametrize(
    ("kind", "length", "at_most"),
    [
        (RST_STREAM, 4, 200),
        (SETTINGS, 0, 200),
        (PING, 8, 500),
        (PRIORITY, 5, 1000),
        (WINDOW_UPDATE, 4, 1000),
        (DATA, 0, 1000),
        (HEADERS, 0, 1000),
        (UNKNOWN, 0, 1000),
    ],
)
async def test_what_is_no_request_is_limited_and_time_gives_some_back(
    kind: int, length: int, at_most: int, autojump_clock: MockClock
) -> None:
    found = guard()
    for _ in range(at_most):
        found.feed(frame(kind, length))
    with pytest.raises(BadFrames) as caught:
        found.feed(frame(kind, length))
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM
    await trio.sleep(1)
    found.feed(frame(kind, length) * (at_most // 20))


async def test_requests_and_bodies_and_steady_pings_are_not_limited(autojump_clock: MockClock) -> None:
    found = guard()
    for _ in range(3000):
        found.feed(frame(HEADERS, 30) + frame(DATA, 1) + frame(DATA, 0, END_STREAM))
    for _ in range(3000):
        found.feed(frame(PING, 8))
        await trio.sleep(0.02)


async def test_each_frame_of_an_answer_may_be_acknowledged_twice(autojump_clock: MockClock) -> None:
    found = guard()
    for _ in range(3000):
        found.answered()
        found.feed(frame(WINDOW_UPDATE, 4) * 2)


async def test_a_fault_for_which_the_node_resets_a_stream_costs_as_a_reset(autojump_clock: MockClock) -> None:
    found = guard()
    for _ in range(200):
        found.was_reset()
    with pytest.raises(BadFrames):
        found.was_reset()


@pytest.mark.parametrize("size", [1, 2, 8, 9, 10, 50])
async def test_frames_are_counted_however_they_are_cut(size: int, autojump_clock: MockClock) -> None:
    found = FloodGuard()
    sent = PREFACE + frame(SETTINGS, 6) + frame(HEADERS, 30) + frame(DATA, 100)
    # That frame's body consists of what would be frames that are too long.
    sent += frame(RST_STREAM, 4) * 199
    for start in range(0, len(sent), size):
        found.feed(sent[start : start + size])
    with pytest.raises(BadFrames):
        found.feed(frame(RST_STREAM, 4))


async def test_a_frame_that_is_too_long_is_refused_by_its_first_bytes(autojump_clock: MockClock) -> None:
    found = guard()
    found.feed(frame(DATA, 2**14))
    with pytest.raises(BadFrames) as caught:
        found.feed(frame(DATA, 2**14 + 1)[:9])
    assert caught.value.code == ErrorCodes.FRAME_SIZE_ERROR


async def test_a_head_in_too_many_pieces_is_refused(autojump_clock: MockClock) -> None:
    found = guard()
    for _ in range(3):
        found.feed(frame(HEADERS, 2**14) + frame(CONTINUATION, 2**14) * 3)
    with pytest.raises(BadFrames):
        found.feed(frame(CONTINUATION, 1))
