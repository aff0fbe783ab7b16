"""What the scheduling promises, over the simulator's loads as made from one seed."""

import pytest

from benchmarks.scheduling.simulate import POLICIES, simulate
from benchmarks.scheduling.workloads import Workload, workloads

WORKLOADS = workloads(seed=1)


def figures(workload: Workload, policy: str) -> dict[str, float]:
    return simulate(workload, POLICIES[policy]).figures()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_no_load_takes_much_longer_than_first_come_first_served(workload: Workload) -> None:
    ours, first_come = figures(workload, "swap-aware"), figures(workload, "fifo")
    assert ours["makespan s"] <= 1.05 * first_come["makespan s"]


def test_alternating_models_take_half_the_time_and_nobody_waits_longer_for_it() -> None:
    (alternating,) = (workload for workload in WORKLOADS if workload.name == "alternating")
    ours, first_come = figures(alternating, "swap-aware"), figures(alternating, "fifo")
    assert ours["makespan s"] <= 0.5 * first_come["makespan s"]
    assert ours["wait p95 s"] <= first_come["wait p95 s"]
