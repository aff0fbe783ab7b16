#!/usr/bin/env python3
"""What it costs to admit one request while others are queued: 8 devices, 40 models, in this process.

    python tests/benchmarks/admission.py [--quick]

The scheduler and the lanes are the agent's own. Their servers are a table: each device has one model loaded, and
requests that never end hold all of its slots. Measured is `Scheduler.admit` alone, with 0, 100 and 1,000 requests
queued on all devices together, and the same with the turn of its lane that follows, which goes through the queue; and
before that, an admission that a free slot serves at once.
"""

import logging
import math
import statistics
import sys
import time
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import Section
from benchmarks.options import Options, read_options
from fakes.servers import FakeServers
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.scheduler import Scheduler

DEVICES = 8
MODELS = 40
SLOTS = 4
QUEUED = (0, 100, 1000)
LOAD_S = 1.0
RATIO = "1,000 queued against 0"
AT_ONCE = "us, served at once"


def main() -> int:
    measure(read_options(__doc__)).print()
    return 0


def measure(options: Options) -> Section:
    """Microseconds for one admission at each length of the queue, and the ratio of the longest to none."""
    logging.disable(logging.INFO)
    repeats = 40 if options.quick else 400
    clock = MockClock(autojump_threshold=0)
    at_once_us, costs_us = trio.run(_measure, clock, repeats, clock=clock)
    logging.disable(logging.NOTSET)
    figures = {AT_ONCE: at_once_us}
    figures |= {f"us, {queued:,} queued": admit for queued, (admit, _turn) in costs_us.items()}
    figures |= {f"us with its turn, {queued:,}": turn for queued, (_admit, turn) in costs_us.items()}
    figures[RATIO] = costs_us[QUEUED[-1]][0] / costs_us[0][0]
    return Section(f"one admission, {DEVICES} devices of {MODELS} models", {"agent": figures})


async def _measure(clock: MockClock, repeats: int) -> tuple[float, dict[int, tuple[float, float]]]:
    """The median of an admission that is served at once. By how many are queued: the median of an admission, and of one
    with the lane's turn after it."""
    async with trio.open_nursery() as nursery:
        scheduler, last = await _busy_scheduler(nursery)
        clock.autojump_threshold = math.inf  # from here on, no time passes
        last.close()
        await wait_all_tasks_blocked()
        free = last.model_id
        at_once_us = statistics.median([(await _admit_one(scheduler, free))[0] for _ in range(repeats)]) * 1e6
        scheduler.admit("", free)
        costs_us = {}
        queued = 0
        for wanted in QUEUED:
            for number in range(queued, wanted):
                scheduler.admit("", _model(number))
            await wait_all_tasks_blocked()
            queued = wanted
            samples = [await _admit_one(scheduler, _model(number)) for number in range(repeats)]
            admit_us, turn_us = (statistics.median(values) * 1e6 for values in zip(*samples, strict=True))
            costs_us[wanted] = admit_us, turn_us
        nursery.cancel_scope.cancel()
    return at_once_us, costs_us


async def _busy_scheduler(nursery: trio.Nursery) -> tuple[Scheduler[str], Ticket[str]]:
    """One whose devices each have a model loaded and every slot in use, and the ticket of the last slot."""
    names = [f"gpu:{number}" for number in range(DEVICES)]
    rules = LaneRules(max_pending=10 * QUEUED[-1], queue_timeout_s=math.inf, startup_timeout_s=math.inf)
    hosts = {name: FakeServers(load_s=LOAD_S, slots=SLOTS) for name in names}
    lanes = {name: Lane(name, hosts[name], rules) for name in names}
    scheduler: Scheduler[str] = Scheduler(lanes, hosts)
    for number, name in enumerate(names):
        hosts[name].on_change = lanes[name].nudge
        await nursery.start(lanes[name].run)
        for _slot in range(SLOTS):
            ticket = lanes[name].submit("", _model(number))
            await ticket.granted()
    return scheduler, ticket


async def _admit_one(scheduler: Scheduler[str], model_id: str) -> tuple[float, float]:
    """Seconds of the admission, and until all lanes are at rest again; the queue is afterwards as it was before."""
    began = time.perf_counter()
    ticket = scheduler.admit("", model_id)
    admitted = time.perf_counter()
    await wait_all_tasks_blocked()
    at_rest = time.perf_counter()
    ticket.close()
    await wait_all_tasks_blocked()
    return admitted - began, at_rest - began


def _model(number: int) -> str:
    return f"model-{number % MODELS}"


if __name__ == "__main__":
    sys.exit(main())
