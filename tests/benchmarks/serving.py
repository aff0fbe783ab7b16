#!/usr/bin/env python3
"""What the way through the agent costs, side by side with its peers: all measurements in one run, and a summary.

    python tests/benchmarks/serving.py [--seconds 2] [--rounds 3] [--quick] [--llama-swap BINARY]
        [--json FILE] [--plot FILE.png]

HAProxy and nginx are measured where they are installed, llama-swap where it is given. The targets take turns, round by
round, since the machine may be shared: read the ratios, not the milliseconds. The summary says which of the agent's
aims hold in this run. README.md beside this file explains the figures; each measurement is also a script of its own.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks import admission, costs, embeddings, latency, paced_streams, start_and_memory, switches
from benchmarks.aims import AIMS, Results, print_aims
from benchmarks.figures import Section
from benchmarks.options import Options, read_options
from benchmarks.peers import canned_peers
from benchmarks.processes import FRONT_CPUS, LOAD_CPUS, keep_to_load_cpu


def main() -> int:
    options = read_options(__doc__, with_files=True)
    keep_to_load_cpu()
    machine = describe_machine()
    results = measure_all(options)
    print(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in machine.items()))
    for section in results.values():
        section.print()
    print_aims(results)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(machine, results), indent=1) + "\n")
    if options.plot is not None:
        from benchmarks.serving_plot import draw_figures

        draw_figures(results, options.plot)
    return 0


def measure_all(options: Options) -> Results:
    """Every measurement, one after another."""
    results: dict[str, Section] = {}
    with canned_peers(options) as peers:
        results["latency"] = latency.measure(peers, options)
        results["paced streams"] = paced_streams.measure(peers, options)
        results["embeddings"] = embeddings.measure(peers, options)
    results["costs"] = costs.measure(options)
    results["admission"] = admission.measure(options)
    results["start"] = start_and_memory.measure(options)
    results["switches"] = switches.measure(options)
    return results


def describe_machine() -> dict[str, object]:
    """On what it runs. A load average above 0 before the start means that something else uses the CPUs too."""
    return {
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "cpus_of_the_front": sorted(FRONT_CPUS),
        "cpus_of_the_load": sorted(LOAD_CPUS),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def as_json(machine: Mapping[str, object], results: Results) -> dict[str, object]:
    """Everything that the run said, and on what it ran."""
    return {
        "machine": machine,
        "sections": {name: {"title": section.title, "figures": section.figures} for name, section in results.items()},
        "aims": [{**asdict(aim), "value": aim.value(results), "holds": aim.holds(results)} for aim in AIMS],
    }


if __name__ == "__main__":
    sys.exit(main())
