"""The output of a process, line by line, however the bytes arrive."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.output import Output, printable


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


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (b"\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
        (b"\x1b]0;title\x07\x1bP$q\x1b\\", "\\x1b]0;title\\x07\\x1bP$q\\x1b\\"),
        (b"a\0b\x7f", r"a\x00b\x7f"),
        ("\x85\x9b31m".encode(), r"\x85\x9b31m"),
        ("\u2028\u202eevil".encode(), r"\u2028\u202eevil"),
        (b"50 %\r100 %\r", r"50 %\x0d100 %"),
        ("\ttab, \xe4, \u4e2d, \U0001f600".encode(), "\ttab, \xe4, \u4e2d, \U0001f600"),
    ],
)
def test_control_characters_are_escaped(printed: bytes, shown: str) -> None:
    assert lines_of(printed + b"\n") == [shown]


@given(st.text())
def test_printable_text_has_no_control_character_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in shown.replace("\t", ""))
    assert shown.encode().decode() == shown
    assert printable(shown) == shown


def test_a_line_of_nul_bytes_is_cut_to_its_visible_length() -> None:
    [line] = lines_of(b"\0" * 5000)
    assert len(line) == 4096 + len(" [cut]")
