"""Observations counted by size, as Prometheus' histograms have them."""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Observations by bucket. `counts` has one more than `bounds`: those above all of them. What changes: `counts` and
    `sum`, in `observe`."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
