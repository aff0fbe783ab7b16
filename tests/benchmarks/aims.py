"""What the agent aims at, in figures of one run on one machine, and whether the run reaches it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import admission, costs, start_and_memory, switches
from benchmarks.figures import Section, print_row

LLAMA_SWAP = "llama-swap"

# By kind of measurement: "latency", "paced streams", ...
Results = Mapping[str, Section]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A bound on one of the agent's figures: on the value itself, or as a ratio to the same figure `against` a peer.

    `at_least` makes `limit` a lower bound. `of` is whose figure it is.
    """

    words: str
    section: str
    figure: str
    limit: float
    against: str | None = None
    at_least: bool = False
    of: str = "agent"

    @property
    def bound(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit:g}" + (f"x {self.against}" if self.against else "")

    def value(self, results: Results) -> float | None:
        """What the bound is on; None if it was not measured."""
        figures = results[self.section].figures if self.section in results else {}
        own = figures.get(self.of, {}).get(self.figure)
        if self.against is None or own is None:
            return own
        reference = figures.get(self.against, {}).get(self.figure)
        return own / reference if reference else None

    def holds(self, results: Results) -> bool | None:
        """None if it was not measured."""
        value = self.value(results)
        if value is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


AIMS: Sequence[Aim] = (
    Aim(words="p50, 1 client", section="latency", figure="p50 ms, 1 client", limit=0.5, against=LLAMA_SWAP),
    Aim(
        words="requests/s, 32 clients",
        section="latency",
        figure="requests/s, 32 clients",
        limit=2,
        against=LLAMA_SWAP,
        at_least=True,
    ),
    Aim(words="p99, 32 clients", section="latency", figure="p99 ms, 32 clients", limit=1, against=LLAMA_SWAP),
    Aim(
        words="events/s, streams that pile up",
        section="latency",
        figure="events/s, 8 streams",
        limit=2,
        against=LLAMA_SWAP,
        at_least=True,
    ),
    Aim(
        words="CPU per event at token pace",
        section="paced streams",
        figure="CPU us/event, in step",
        limit=1,
        against=LLAMA_SWAP,
    ),
    Aim(
        words="CPU per request, embeddings",
        section="embeddings",
        figure="CPU us/request",
        limit=1,
        against=LLAMA_SWAP,
    ),
    Aim(
        words="CPU with figures",
        section="costs",
        figure=costs.CPU,
        limit=1.15,
        against=costs.BARE,
        of=costs.FIGURES,
    ),
    Aim(
        words="p50 with figures",
        section="costs",
        figure=costs.P50,
        limit=1.15,
        against=costs.BARE,
        of=costs.FIGURES,
    ),
    Aim(
        words="CPU with an API key",
        section="costs",
        figure=costs.CPU,
        limit=1.05,
        against=costs.FIGURES,
        of=costs.KEY,
    ),
    Aim(
        words="p50 with an API key",
        section="costs",
        figure=costs.P50,
        limit=1.05,
        against=costs.FIGURES,
        of=costs.KEY,
    ),
    Aim(words="admission, 1,000 queued against 0", section="admission", figure=admission.RATIO, limit=1.5),
    Aim(words="ready after start, s", section="start", figure=start_and_memory.READY, limit=0.5),
    Aim(words="resident memory, MiB", section="start", figure=start_and_memory.RESIDENT, limit=45),
    Aim(words="a switch over a direct start, ms", section="switches", figure=switches.OVERHEAD, limit=30),
    Aim(
        words="a switch to the tiny model",
        section="switches",
        figure=f"ms to {switches.TINY}",
        limit=1,
        against="router",
    ),
)

_ANSWERS = {True: "yes", False: "no", None: "not measured"}


def print_aims(results: Results, aims: Sequence[Aim] = AIMS) -> None:
    """The summary: each aim with its bound, what was measured, and whether it holds."""
    print("\nsummary: the agent's aims")
    print_row("", ["aim", "measured", "holds"], label_width=36)
    for aim in aims:
        value = aim.value(results)
        shown = "-" if value is None else f"{value:.2f}" + ("x" if aim.against else "")
        print_row(aim.words, [aim.bound, shown, _ANSWERS[aim.holds(results)]], label_width=36)
    held = sum(aim.holds(results) is True for aim in aims)
    print(f"{held} of {len(aims)} hold")
