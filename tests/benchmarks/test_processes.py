"""Whose CPU time counts, what imports took, and how far a switch is over a direct start."""

import pytest

from benchmarks.processes import is_upstream, used_s
from benchmarks.start_and_memory import imports_s
from benchmarks.switches import OVERHEAD, with_overhead


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (["python", "tests/benchmarks/canned_server.py", "--port", "5800"], True),
        (["/opt/llama/bin/llama-server", "-m", "a.gguf"], True),
        (["python", "-m", "nodeagent", "--config", "agent.yaml"], False),
        (["llama-swap", "--config", "llama-swap.yaml"], False),
        (["nginx: worker process"], False),
        ([], False),
    ],
)
def test_servers_behind_a_front_are_told_from_the_fronts_own_processes(command_line: list[str], expected: bool) -> None:
    assert is_upstream(command_line) is expected


def test_the_cpu_time_of_all_processes_of_a_front_is_summed() -> None:
    assert used_s({1: 10.0, 2: 1.0}, {1: 10.5, 2: 1.25}) == pytest.approx(0.75)


def test_a_process_that_started_during_the_measurement_counts_from_its_start() -> None:
    assert used_s({1: 10.0}, {1: 10.5, 2: 0.25}) == pytest.approx(0.75)


def test_a_process_that_ended_during_the_measurement_spoils_it() -> None:
    with pytest.raises(ValueError, match=r"processes \[2\]"):
        used_s({1: 10.0, 2: 1.0}, {1: 10.5})


def test_the_time_of_imports_is_the_sum_of_each_ones_own() -> None:
    log = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       300 |        300 |   zipimport\n"
        "a line of the log: 7 | 7 | 7\n"
        "import time:      1700 |       2000 | site\n"
    )
    assert imports_s(log) == pytest.approx(0.002)


def test_the_overhead_of_a_switch_is_that_of_the_model_where_it_is_largest() -> None:
    figures = {"agent": {"ms to a": 90.0, "ms to b": 400.0}, "direct": {"ms to a": 50.0, "ms to b": 380.0}}
    assert with_overhead(figures)["agent"] == {"ms to a": 90.0, "ms to b": 400.0, OVERHEAD: 40.0}
