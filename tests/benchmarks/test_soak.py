"""What the soak makes of its samples."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.soak import BOUNDS, Sample, growth, report


def samples(resident_mib: Callable[[int], float] = lambda _it: 60.0, descriptors: int = 0) -> list[Sample]:
    """Twelve of them; `descriptors` more are open in each of the last four."""
    return [
        Sample(
            minute=it,
            requests=it * 100,
            resident_mib=resident_mib(it),
            descriptors=25 + (descriptors if it >= 8 else 0),
            threads=3,
            tasks=16,
        )
        for it in range(12)
    ]


def test_growth_in_the_first_third_is_a_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    warm = samples(lambda it: 40.0 + 5 * min(it, 4))
    assert growth(warm) == dict.fromkeys(BOUNDS, 0)
    assert report(warm, Counter(), "") == 0
    assert "nothing grew" in capsys.readouterr().out


def test_steady_growth_of_memory_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(samples(lambda it: 60.0 + it), Counter(), "") == 1
    assert "resident_mib grew by 4" in capsys.readouterr().out


def test_one_descriptor_that_leaks_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(samples(descriptors=1), Counter(), "") == 1
    assert "descriptors grew by 1" in capsys.readouterr().out


def test_a_descriptor_that_is_open_now_and_then_is_no_leak() -> None:
    now_and_then = [replace(it, descriptors=25 + (number in (5, 9, 10, 11))) for number, it in enumerate(samples())]
    assert report(now_and_then, Counter(), "") == 0


@pytest.mark.parametrize("log", ["Traceback (most recent call last)", "gone; restart in 4.0 s: 2 of 3 in 60 s"])
def test_what_the_log_tells_fails(log: str) -> None:
    assert report(samples(), Counter(), log) == 1


def test_a_truncated_stream_fails() -> None:
    assert report(samples(), Counter({"stream 200": 5, "stream truncated": 1}), "") == 1
