#!/usr/bin/env python3
"""The scheduling of the agent in virtual time: the lanes and the scheduler themselves, over servers that are a table.

    python tests/benchmarks/scheduling/simulate.py [--seeds 5] [--json FILE]

Every load is run under each policy: first come first served, always serve the loaded model (nothing bounds its
passing), and the agent's own. Printed are the makespan, the waits (from asking to being granted, refusals and their
pauses included) and the number of loads: of each the median over the seeds, with its ratio to first come first served;
and the worst ratio of the makespans of any seed.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio
from trio.testing import MockClock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.scheduling.workloads import Ask, Workload, workloads
from fakes.servers import FakeServers
from nodeagent.errors import QueueFull
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import Decision, FirstCome, LaneNow, Policy, Priority, Wait, step
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.swap_aware import SwapAware

MAX_PENDING = 16


@dataclass(frozen=True, slots=True)
class AlwaysLoaded:
    """What some peers do: the loaded model is served for as long as anybody wants it."""

    def decide(self, lane: LaneNow) -> Decision:
        if not lane.waiting:
            return Wait("nobody waits")
        at_hand = {model_id for model_id, use in lane.servers.items() if use.ready} | {lane.loading}
        own = [index for index, request in enumerate(lane.waiting) if request.model_id in at_hand]
        return step(lane, own[0] if own else 0, "it is loaded" if own else "it is the oldest")


POLICIES: dict[str, Policy] = {"fifo": FirstCome(), "always loaded": AlwaysLoaded(), "swap-aware": SwapAware()}


@dataclass
class Run:
    """What came of one load under one policy; times in seconds."""

    makespan_s: float = 0.0
    loads: int = 0
    waits_s: list[float] = field(default_factory=list)
    urgent_waits_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        figures = {
            "makespan s": self.makespan_s,
            "loads": float(self.loads),
            "wait p50 s": quantile(self.waits_s, 0.5),
            "wait p95 s": quantile(self.waits_s, 0.95),
            "wait max s": max(self.waits_s),
        }
        if self.urgent_waits_s:
            figures["interactive p95 s"] = quantile(self.urgent_waits_s, 0.95)
        return figures


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def simulate(workload: Workload, policy: Policy, *, max_pending: int = MAX_PENDING) -> Run:
    """Run the load to its end."""
    return trio.run(partial(_simulate, workload, policy, max_pending), clock=MockClock(autojump_threshold=0))


async def _simulate(workload: Workload, policy: Policy, max_pending: int) -> Run:
    rules = LaneRules(max_pending, math.inf, math.inf, policy=policy)
    names = [f"gpu:{number}" for number in range(workload.devices)]
    hosts = {name: FakeServers(load_s=workload.load_s, slots=workload.slots) for name in names}
    lanes = {name: Lane(name, hosts[name], rules) for name in names}
    scheduler: Scheduler[str] = Scheduler(lanes, hosts)
    run = Run()
    async with trio.open_nursery() as nursery:
        for name in names:
            hosts[name].on_change = lanes[name].nudge
            await nursery.start(lanes[name].run)
        began = trio.current_time()
        async with trio.open_nursery() as clients:
            for asks in workload.clients:
                clients.start_soon(_client, scheduler, iter(asks), workload.think_s, run)
            for workers, asks in workload.feeds:
                feed = iter(asks)
                for _worker in range(workers):
                    clients.start_soon(_client, scheduler, feed, workload.think_s, run)
        run.makespan_s = trio.current_time() - began
        nursery.cancel_scope.cancel()
    run.loads = sum(step.startswith("start ") for host in hosts.values() for step in host.history)
    return run


async def _client(scheduler: Scheduler[str], asks: Iterator[Ask], think_s: float, run: Run) -> None:
    for ask in asks:
        await trio.sleep_until(ask.at)
        began = trio.current_time()
        while True:
            try:
                ticket = scheduler.admit("", ask.model_id, ask.priority)
                break
            except QueueFull as refused:
                await trio.sleep(max(0.1, min(refused.retry_after_s, 5.0)))
        await ticket.granted()
        waited_s = trio.current_time() - began
        run.waits_s.append(waited_s)
        if ask.priority is Priority.INTERACTIVE:
            run.urgent_waits_s.append(waited_s)
        await trio.sleep(ask.service_s)
        ticket.close()
        await trio.sleep(think_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--only", metavar="WORDS", default="", help="the loads whose name has these words")
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    results = {}
    for number in range(len(workloads(0))):
        runs = (
            {
                name: [simulate(workloads(seed)[number], policy) for seed in range(args.seeds)]
                for name, policy in POLICIES.items()
            }
            if args.only in workloads(0)[number].name
            else {}
        )
        if runs:
            results[workloads(0)[number].name] = {name: [it.figures() for it in ran] for name, ran in runs.items()}
            _print(workloads(0)[number].name, results[workloads(0)[number].name])
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def _print(name: str, results: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{name}\n{'':20}" + "".join(f"{policy:>22}" for policy in results))
    for figure in results["fifo"][0]:
        base = statistics.median(it[figure] for it in results["fifo"])
        cells = []
        for figures in results.values():
            value = statistics.median(it[figure] for it in figures)
            cells.append(f"{value:.2f} ({value / base:.2f}x)" if base else f"{value:.2f}")
        print(f"{figure:20}" + "".join(f"{cell:>22}" for cell in cells))
    worst = [
        max(mine["makespan s"] / base["makespan s"] for mine, base in zip(ran, results["fifo"], strict=True))
        for ran in results.values()
    ]
    print(f"{'worst makespan':20}" + "".join(f"{f'{ratio:.2f}x':>22}" for ratio in worst))


if __name__ == "__main__":
    sys.exit(main())
