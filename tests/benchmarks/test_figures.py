"""The figures of the benchmarks: quantiles, medians of rounds, the table of ratios."""

import pytest

from benchmarks.figures import Section, by_figure, figure_names, in_turns, medians, print_ratios, quantile


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.2, 1.0), (0.21, 2.0), (0.5, 3.0), (0.8, 4.0), (0.99, 5.0), (1.0, 5.0)]
)
def test_a_quantile_is_the_smallest_value_that_reaches_the_share(share: float, expected: float) -> None:
    assert quantile([5.0, 3.0, 1.0, 4.0, 2.0], share) == expected


def test_the_p99_of_a_hundred_values_leaves_one_out() -> None:
    assert quantile([float(number) for number in range(1, 101)], 0.99) == 99.0


def test_the_only_value_is_every_quantile() -> None:
    assert {quantile([7.0], share) for share in (0.0, 0.5, 0.99, 1.0)} == {7.0}


def test_a_round_that_lacks_a_figure_does_not_count_for_it() -> None:
    samples = by_figure([{"ms": 1.0}, {"ms": 5.0, "us": 7.0}, {"ms": 3.0}])
    assert samples == {"ms": [1.0, 5.0, 3.0], "us": [7.0]}
    assert medians({"agent": samples}) == {"agent": {"ms": 3.0, "us": 7.0}}


def test_targets_take_turns_and_the_median_round_counts() -> None:
    turns = []

    def measure(name: str, target: list[float]) -> dict[str, float]:
        turns.append(name)
        return {"ms": target.pop(0)}

    figures = in_turns({"a": [1.0, 9.0, 2.0], "b": [4.0, 3.0, 8.0]}, 3, measure)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert figures == {"a": {"ms": 2.0}, "b": {"ms": 4.0}}


def test_ratios_are_against_llama_swap_where_it_was_measured_and_against_the_first_target_elsewhere() -> None:
    assert Section("", {"direct": {}, "agent": {}, "llama-swap": {}}).base == "llama-swap"
    assert Section("", {"direct": {}, "agent": {}}).base == "direct"


def test_a_table_has_every_figure_of_any_target_and_a_dash_where_one_was_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = {"base": {"ms": 2.0}, "agent": {"ms": 5.0, "us": 1234.5}}
    assert figure_names(figures) == ["ms", "us"]
    print_ratios("title", figures, "base")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["ms"] == ["2.00", "(1.00x)", "5.00", "(2.50x)"]
    assert rows["us"] == ["-", "1,234"]


def test_no_ratio_is_printed_against_zero(capsys: pytest.CaptureFixture[str]) -> None:
    print_ratios("title", {"base": {"us": 0.0}, "agent": {"us": 5.0}}, "base")
    assert capsys.readouterr().out.splitlines()[-1].split() == ["us", "0.00", "5.00"]
