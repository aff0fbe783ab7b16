"""What was measured of several targets: quantiles, what stands for all rounds, and a table with the ratios."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

# For each target (or policy), the value of each figure.
Figures = Mapping[str, Mapping[str, float]]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """The figures of one kind of measurement, with the title of their table."""

    title: str
    figures: Figures

    @property
    def base(self) -> str:
        """The target that the table's ratios are against: llama-swap if it was measured, else the first one."""
        return "llama-swap" if "llama-swap" in self.figures else next(iter(self.figures))

    def print(self) -> None:
        """Print the table."""
        print_ratios(f"{self.title}; ratios to {self.base}", self.figures, self.base)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is no smaller than that share of them; there must be one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def medians(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> Figures:
    return _summed_up(samples, statistics.median)


def lower_quartiles(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> Figures:
    """For what differs by less than the noise of a shared machine, which only ever adds."""
    return _summed_up(samples, lambda values: quantile(values, 0.25))


def _summed_up(
    samples: Mapping[str, Mapping[str, Sequence[float]]], one_of: Callable[[Sequence[float]], float]
) -> Figures:
    return {name: {figure: one_of(values) for figure, values in figures.items()} for name, figures in samples.items()}


def by_figure(rounds: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """From the figures of each round, the values of each figure."""
    samples: dict[str, list[float]] = {}
    for figures in rounds:
        for figure, value in figures.items():
            samples.setdefault(figure, []).append(value)
    return samples


def in_turns(targets: Mapping[str, T], rounds: int, measure: Callable[[str, T], Mapping[str, float]]) -> Figures:
    """Measure each target once per round, so that all see the same noise; return the medians of the rounds."""
    measured: dict[str, list[Mapping[str, float]]] = {name: [] for name in targets}
    for _round in range(rounds):
        for name, target in targets.items():
            measured[name].append(measure(name, target))
    return medians({name: by_figure(its_rounds) for name, its_rounds in measured.items()})


def figure_names(figures: Figures) -> list[str]:
    """Every figure that any target has, in the order of their first mention."""
    return list(dict.fromkeys(figure for values in figures.values() for figure in values))


def print_ratios(title: str, figures: Figures, base: str) -> None:
    """A table: a row for each figure, a column for each target, as value and ratio to the base."""
    print(f"\n{title}")
    print_row("", figures)
    for figure in figure_names(figures):
        reference = figures[base].get(figure)
        print_row(figure, (_cell(values.get(figure), reference) for values in figures.values()))


def print_row(label: str, cells: Iterable[str], *, label_width: int = 32) -> None:
    print(f"{label:{label_width}}" + "".join(f"{cell:>20}" for cell in cells))


def _cell(value: float | None, reference: float | None) -> str:
    if value is None:
        return "-"
    return f"{shown(value)} ({value / reference:.2f}x)" if reference else shown(value)


def shown(value: float) -> str:
    """The value for people."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
