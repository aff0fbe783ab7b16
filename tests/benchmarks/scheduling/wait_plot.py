"""A picture of who waited when. Needs matplotlib, which comes with the `bench` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scheduling.workers import Answer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of each model in order: the colour of its waits, and that of its answers.
_COLOURS = (("#9ecae1", "#08519c"), ("#fdc28c", "#b33c00"))
_ROW_INCHES = 0.013
_EDGES_INCHES = 0.6
# An answer is a few pixels long at most, so that it is drawn higher than its wait.
_WAIT_POINTS, _ANSWER_POINTS = 0.8, 2.2


def draw_waits(answers: Mapping[str, Sequence[Answer]], path: Path) -> None:
    """Write a PNG with a panel for each target: a line for each request, light until its first byte, then dark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(len(its_answers) for its_answers in answers.values())
    height = len(answers) * (rows * _ROW_INCHES + _EDGES_INCHES)
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(answers), sharex=True, squeeze=False)[:, 0]
    for panel, (name, its_answers) in zip(panels, answers.items(), strict=True):
        _draw_panel(panel, name, its_answers)
    panels[0].legend(loc="lower right", ncols=len(_COLOURS))
    panels[-1].set_xlabel("seconds since the start")
    figure.savefig(path, dpi=150)


def _draw_panel(panel: "Axes", name: str, answers: Sequence[Answer]) -> None:
    """`answers` are of two models at most, and there is at least one."""
    models = sorted({answer.model_id for answer in answers})
    for model_id, (light, dark) in zip(models, _COLOURS, strict=False):
        own = [answer for answer in answers if answer.model_id == model_id]
        numbers = [answer.number for answer in own]
        asked, first, last = zip(*((it.asked_s, it.first_byte_s, it.last_byte_s) for it in own), strict=True)
        panel.hlines(numbers, asked, first, colors=light, linewidth=_WAIT_POINTS, label=f"{model_id} waits")
        panel.hlines(numbers, first, last, colors=dark, linewidth=_ANSWER_POINTS, label=f"{model_id} is answered")
    end_s = max(answer.last_byte_s for answer in answers)
    panel.set_title(f"{name}: {len(answers)} answered, the last after {end_s:.0f} s", loc="left", fontsize=10)
    panel.set_ylabel("request")
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.margins(x=0.01, y=0.02)
