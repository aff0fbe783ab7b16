"""Cutting an event stream at the ends of events."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.llama_server.sse import EventCutter

ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")
EVENT = st.tuples(
    st.sampled_from([b"data: a", b"event: x\ndata: b", b": ping", b"data: \xc3\xa9"]), st.sampled_from(ENDS)
)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(st.lists(EVENT, max_size=6), st.lists(st.integers(0, 500), max_size=12), st.sampled_from([b"", b"data: be"]))
def test_only_complete_events_are_returned_and_nothing_is_lost(
    events: list[tuple[bytes, bytes]], cuts: list[int], begun: bytes
) -> None:
    stream = b"".join(text + end for text, end in events) + begun
    cutter = EventCutter()
    passed = b""
    for piece in pieces_of(stream, cuts):
        passed += cutter.feed(piece)
        assert not passed or passed.endswith((b"\n\n", b"\r\r", b"\n\r", b"\r\n\r\n", b"\n\r\n", b"\r\n", b"\r"))
    rest = cutter.rest()
    assert passed + rest == stream
    assert rest.strip() == begun


def test_an_event_that_arrives_in_small_pieces_takes_linear_time() -> None:
    cutter = EventCutter()
    event = b"data: " + b"x" * 200_000
    for place in range(0, len(event), 100):
        assert cutter.feed(event[place : place + 100]) == b""
    assert cutter.feed(b"\n\n") == event + b"\n\n"
