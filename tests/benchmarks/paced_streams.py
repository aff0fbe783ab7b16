#!/usr/bin/env python3
"""What a streamed token costs at the pace of a real server: 32 streams of 50 events a second.

    python tests/benchmarks/paced_streams.py [--seconds 2] [--rounds 3] [--quick] [--llama-swap BINARY]

Measured is the CPU time of the front's processes for each event (no start or end of a stream is in the measured time),
and the time between one event and the next, which is 20 ms where nothing delays them. "In step": all streams get their
events at the same moments, as slots of one llama-server do, so one wake-up of the front may serve many of them.
"Spread": the moments are spread evenly, as with many servers, so each event needs a wake-up of its own (not measured
with `--quick`).
"""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import Section, in_turns, quantile
from benchmarks.load import Outcome, load_beside
from benchmarks.options import Options, read_options
from benchmarks.peers import CANNED_ALIAS, canned_peers
from benchmarks.processes import Peer, keep_to_load_cpu, used_s

STREAMS = 32
EVENTS_PER_S = 50
# Until every stream runs, and how long the streams go on after what is measured.
SETTLE_S = 0.4
REST_S = 0.2


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    with canned_peers(options) as peers:
        measure(peers, options).print()
    return 0


def measure(peers: Mapping[str, Peer], options: Options) -> Section:
    """CPU time per event in microseconds, and how far apart events arrive in ms."""
    orders = {"in step": 0.0} if options.quick else {"in step": 0.0, "spread": 1 / STREAMS}

    def measure_one(name: str, peer: Peer) -> dict[str, float]:
        return {
            f"{figure}, {order}": value
            for order, spread in orders.items()
            for figure, value in _measure(name, peer, options.seconds, spread).items()
        }

    figures = in_turns(peers, options.rounds, measure_one)
    return Section(f"{STREAMS} streams of {EVENTS_PER_S} events a second", figures)


def _measure(name: str, peer: Peer, seconds: float, spread: float) -> dict[str, float]:
    """`spread` is the phase between one stream and the next."""
    cpu_us_per_event = 0.0

    async def read_cpu(outcome: Outcome) -> None:
        nonlocal cpu_us_per_event
        await asyncio.sleep(SETTLE_S)
        cpu_before, events_before = peer.cpu_s(), outcome.events
        await asyncio.sleep(seconds)
        cpu_after, events_after = peer.cpu_s(), outcome.events
        cpu_us_per_event = used_s(cpu_before, cpu_after) / (events_after - events_before) * 1e6

    outcome = load_beside(peer.base_url, [_body(number * spread, seconds) for number in range(STREAMS)], read_cpu)
    assert outcome.gaps_s is not None
    figures = {"p99 ms apart": quantile(outcome.gaps_s, 0.99) * 1000}
    if name != "direct":  # the server itself, which is not what is measured
        figures["CPU us/event"] = cpu_us_per_event
    return figures


def _body(phase: float, seconds: float) -> dict[str, object]:
    events = round((SETTLE_S + seconds + REST_S) * EVENTS_PER_S)
    pace = {"events": events, "per_s": EVENTS_PER_S, "phase": phase}
    messages = [{"role": "user", "content": "Tell me a long story."}]
    return {"model": CANNED_ALIAS, "messages": messages, "stream": True, "paced": pace}


if __name__ == "__main__":
    sys.exit(main())
