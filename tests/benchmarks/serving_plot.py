"""A picture of all figures, side by side. Needs matplotlib, which comes with the `bench` extra."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Section, figure_names, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "agent": "#08519c",
    "trio": "#3182bd",
    "llama-swap": "#b33c00",
    "haproxy": "#74a9cf",
    "nginx": "#9ebcda",
    "router": "#fdae6b",
    "direct": "#bdbdbd",
}
_COLUMNS = 4
_PANEL_INCHES = (4.0, 1.9)


def draw_figures(results: Mapping[str, Section], path: Path) -> None:
    """Write a PNG with a panel for each figure that several targets have: a bar for each of these."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        f"{name}: {figure}": values
        for name, section in results.items()
        for figure in figure_names(section.figures)
        if len(values := _values(section, figure)) > 1
    }
    rows = math.ceil(len(panels) / _COLUMNS)
    canvas = Figure(figsize=(_COLUMNS * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel, (title, values) in zip(axes, panels.items(), strict=False):
        _draw_panel(panel, title, values)
    for unused in axes[len(panels) :]:
        unused.axis("off")
    canvas.savefig(path, dpi=110)


def _values(section: Section, figure: str) -> dict[str, float]:
    """By target."""
    return {name: figures[figure] for name, figures in section.figures.items() if figure in figures}


def _draw_panel(panel: "Axes", title: str, values: Mapping[str, float]) -> None:
    colours = [_COLOURS.get(name, "#636363") for name in values]
    bars = panel.barh(list(values), list(values.values()), color=colours)
    panel.bar_label(bars, [shown(value) for value in values.values()], fontsize=8, padding=2)
    panel.set_title(title, loc="left", fontsize=9)
    panel.tick_params(labelsize=8, bottom=False, labelbottom=False)
    panel.margins(x=0.25)
    panel.invert_yaxis()
