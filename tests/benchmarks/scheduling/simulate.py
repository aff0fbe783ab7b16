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
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path

import trio
from trio.testing import MockClock

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[3]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import by_figure, medians, print_ratios, print_row, quantile
from benchmarks.scheduling.workloads import Ask, Workload, workloads
from fakes.servers import FakeServers
from nodeagent.errors import QueueFull
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import (
    IDLE,
    Decision,
    FirstCome,
    LaneSnapshot,
    Policy,
    Priority,
    Wait,
    first_possible,
    step,
)
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.swap_aware import SwapAware

MAX_PENDING = 16


@dataclass(frozen=True, slots=True)
class AlwaysLoaded:
    """What some peers do: the loaded model is served as long as any request wants it."""

    def decide(self, lane: LaneSnapshot) -> Decision:
        if not lane.waiting:
            return Wait(IDLE)
        at_hand = {model_id for model_id, use in lane.servers.items() if use.ready} | {lane.loading}
        own = [index for index, request in enumerate(lane.waiting) if request.model_id in at_hand]
        if lane.room.concurrent:
            order = [*own, *(index for index in range(len(lane.waiting)) if index not in own)]
            return first_possible(lane, ((index, "it is loaded, or the oldest") for index in order))
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


def simulate(workload: Workload, policy: Policy, *, max_pending: int = MAX_PENDING) -> Run:
    """Run the load to its end."""
    return trio.run(partial(_simulate, workload, policy, max_pending), clock=MockClock(autojump_threshold=0))


async def _simulate(workload: Workload, policy: Policy, max_pending: int) -> Run:
    rules = LaneRules(
        max_pending=max_pending,
        queue_timeout_s=math.inf,
        startup_timeout_s=math.inf,
        policy=policy,
        max_models=workload.max_models,
        concurrent_models=workload.concurrent_models,
    )
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
    args = _arguments()
    logging.disable(logging.ERROR)
    results = {}
    for name, seeded in _by_name(args.seeds, args.only).items():
        ran = {policy: [simulate(workload, how).figures() for workload in seeded] for policy, how in POLICIES.items()}
        _print(name, ran)
        results[name] = ran
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--only", metavar="WORDS", default="", help="the loads whose name has these words")
    return parser.parse_args()


def _by_name(seeds: int, words: str) -> dict[str, list[Workload]]:
    """The loads whose name has these words, each as made from every seed."""
    by_name: dict[str, list[Workload]] = {}
    for seed in range(seeds):
        for workload in workloads(seed):
            if words in workload.name:
                by_name.setdefault(workload.name, []).append(workload)
    return by_name


def _print(name: str, ran: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    samples = {policy: by_figure(figures) for policy, figures in ran.items()}
    print_ratios(name, medians(samples), "fifo")
    first_come = samples["fifo"]["makespan s"]
    worst = (max(map(truediv, figures["makespan s"], first_come)) for figures in samples.values())
    print_row("worst makespan", (f"{ratio:.2f}x" for ratio in worst))


if __name__ == "__main__":
    sys.exit(main())
