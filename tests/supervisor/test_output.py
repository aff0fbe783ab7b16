"""What a process printed, line by line, however it comes."""

from hypothesis import given
from hypothesis import strategies as st

from supervisor.output import Output


def lines_of(*pieces: bytes) -> list[str]:
    told: list[str] = []
    output = Output(told.append)
    for piece in (*pieces, b""):
        output.feed(piece)
    assert output.lines() == told[-1000:]
    assert output.count == len(told)
    return told


def test_lines_end_at_newlines_and_at_the_end() -> None:
    assert lines_of(b"one\ntwo\r\n\nlast") == ["one", "two", "", "last"]


def test_what_is_no_utf8_is_replaced() -> None:
    assert lines_of(b"a\xff\n") == ["a\N{REPLACEMENT CHARACTER}"]


@given(st.binary(max_size=300), st.integers(1, 20))
def test_it_does_not_matter_how_the_bytes_are_cut(data: bytes, size: int) -> None:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert lines_of(*pieces) == lines_of(data)


def test_a_line_without_end_costs_no_more_than_what_is_shown_of_it() -> None:
    told: list[str] = []
    output = Output(told.append)
    for _ in range(1000):
        output.feed(b"x" * 65536)
        assert len(output._unfinished) <= 4097
    output.feed(b"\nnext\n")
    assert [len(line) for line in told] == [4096 + len(" [cut]"), 4]


def test_only_the_last_thousand_lines_are_kept() -> None:
    output = Output(lambda _line: None)
    output.feed(b"".join(b"%d\n" % number for number in range(5000)))
    assert output.lines()[0] == "4000"
    assert output.lines(2) == ["4998", "4999"]
    assert output.count == 5000
