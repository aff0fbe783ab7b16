"""The output of a process, line by line, however the bytes arrive."""

from hypothesis import given
from hypothesis import strategies as st

from supervisor.output import Output


def lines_of(*pieces: bytes) -> list[str]:
    seen: list[str] = []
    output = Output(seen.append)
    for piece in (*pieces, b""):
        output.feed(piece)
    assert output.lines() == seen[-1000:]
    assert output.count == len(seen)
    return seen


def test_lines_end_at_newlines_and_at_the_end() -> None:
    assert lines_of(b"one\ntwo\r\n\nlast") == ["one", "two", "", "last"]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert lines_of(b"a\xff\n") == ["a\N{REPLACEMENT CHARACTER}"]


@given(st.binary(max_size=300), st.integers(1, 20))
def test_the_lines_do_not_depend_on_how_the_bytes_are_cut(data: bytes, size: int) -> None:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert lines_of(*pieces) == lines_of(data)


def test_an_endless_line_takes_no_more_memory_than_its_visible_part() -> None:
    seen: list[str] = []
    output = Output(seen.append)
    for _ in range(1000):
        output.feed(b"x" * 65536)
        assert len(output._unfinished) <= 4097
    output.feed(b"\nnext\n")
    assert [len(line) for line in seen] == [4096 + len(" [cut]"), 4]


def test_only_the_last_thousand_lines_are_kept() -> None:
    output = Output(lambda _line: None)
    output.feed(b"".join(b"%d\n" % number for number in range(5000)))
    assert output.lines()[0] == "4000"
    assert output.lines(2) == ["4998", "4999"]
    assert output.count == 5000
