"""Which aims hold in a run."""

from collections.abc import Mapping

import pytest

from benchmarks.aims import AIMS, Aim, print_aims
from benchmarks.figures import Section

FASTER = Aim(words="p50", section="latency", figure="ms", limit=0.5, against="llama-swap")
MORE = Aim(words="requests/s", section="latency", figure="1/s", limit=2, against="llama-swap", at_least=True)
SMALL = Aim(words="memory", section="start", figure="MiB", limit=45)


def results(agent: Mapping[str, float], llama_swap: Mapping[str, float] | None = None) -> dict[str, Section]:
    figures = {"agent": agent} | ({"llama-swap": llama_swap} if llama_swap is not None else {})
    return {"latency": Section("", figures), "start": Section("", figures)}


@pytest.mark.parametrize(
    ("aim", "agent", "llama_swap", "value", "holds"),
    [
        (FASTER, {"ms": 1.0}, {"ms": 2.0}, 0.5, True),
        (FASTER, {"ms": 1.1}, {"ms": 2.0}, 0.55, False),
        (MORE, {"1/s": 200.0}, {"1/s": 100.0}, 2.0, True),
        (MORE, {"1/s": 199.0}, {"1/s": 100.0}, 1.99, False),
        (SMALL, {"MiB": 45.0}, None, 45.0, True),
        (SMALL, {"MiB": 45.1}, None, 45.1, False),
        (SMALL, {"MiB": 45.0}, {"MiB": 1.0}, 45.0, True),
    ],
)
def test_an_aim_holds_up_to_its_limit_and_at_it(
    aim: Aim, agent: dict[str, float], llama_swap: dict[str, float] | None, value: float, holds: bool
) -> None:
    run = results(agent, llama_swap)
    assert aim.value(run) == pytest.approx(value)
    assert aim.holds(run) is holds


@pytest.mark.parametrize(
    "run",
    [
        {},
        results({"ms": 1.0}),
        results({}, {"ms": 1.0}),
        results({"ms": 1.0}, {}),
        # Nothing to divide by.
        results({"ms": 1.0}, {"ms": 0.0}),
    ],
)
def test_an_aim_whose_figures_are_missing_neither_holds_nor_fails(run: dict[str, Section]) -> None:
    assert FASTER.value(run) is None
    assert FASTER.holds(run) is None


def test_the_summary_says_of_each_aim_its_bound_what_was_measured_and_whether_it_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = results({"ms": 1.0, "1/s": 50.0}, {"ms": 2.0, "1/s": 100.0})
    print_aims(run, [FASTER, MORE, SMALL])
    *_header, faster, more, small, held = capsys.readouterr().out.splitlines()
    assert faster.split() == ["p50", "<=", "0.5x", "llama-swap", "0.50x", "yes"]
    assert more.split() == ["requests/s", ">=", "2x", "llama-swap", "0.50x", "no"]
    assert small.split() == ["memory", "<=", "45", "-", "not", "measured"]
    assert held == "1 of 3 hold"


def test_no_two_aims_are_about_the_same_figure() -> None:
    assert len({(aim.section, aim.figure, aim.of) for aim in AIMS}) == len(AIMS)
