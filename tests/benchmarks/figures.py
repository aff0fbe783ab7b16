"""What was measured of several targets: quantiles, medians over the rounds, and a table that says the ratios."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

# Of each target (or policy), the value of each figure.
Figures = Mapping[str, Mapping[str, float]]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is no smaller than so large a share of them; there must be one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def medians(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> Figures:
    return {
        name: {figure: statistics.median(values) for figure, values in figures.items()}
        for name, figures in samples.items()
    }


def by_figure(rounds: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Of the figures of each round, the values of each figure."""
    samples: dict[str, list[float]] = {}
    for figures in rounds:
        for figure, value in figures.items():
            samples.setdefault(figure, []).append(value)
    return samples


def print_ratios(title: str, figures: Figures, base: str) -> None:
    """A table: a row for each figure, a column for each target, as value and ratio to the base."""
    print(f"\n{title}")
    print_row("", figures)
    for figure, reference in figures[base].items():
        print_row(figure, (_cell(values.get(figure), reference) for values in figures.values()))


def print_row(label: str, cells: Iterable[str]) -> None:
    print(f"{label:24}" + "".join(f"{cell:>22}" for cell in cells))


def _cell(value: float | None, reference: float) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} ({value / reference:.2f}x)" if reference else f"{value:.2f}"
