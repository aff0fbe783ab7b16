#!/usr/bin/env python3
"""The latency that each way adds to a canned answer, and how much goes through it.

    python tests/benchmarks/latency.py [--seconds 2] [--rounds 3] [--quick] [--llama-swap BINARY]

One client, then 32 clients that each send a request when they have their last answer, then 8 clients with streams
whose 200 events the server writes at once, so that they pile up in front of the client.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import Section, in_turns, quantile
from benchmarks.load import load
from benchmarks.options import Options, read_options
from benchmarks.peers import CANNED_ALIAS, canned_peers
from benchmarks.processes import Peer, keep_to_load_cpu, used_s

QUESTION = [{"role": "user", "content": "What is the sun? Answer in one sentence."}]
CHAT: dict[str, object] = {"model": CANNED_ALIAS, "messages": QUESTION}
STREAM = CHAT | {"stream": True}
CLIENTS = 32
STREAMS = 8


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    with canned_peers(options) as peers:
        measure(peers, options).print()
    return 0


def measure(peers: Mapping[str, Peer], options: Options) -> Section:
    """Latencies in ms, requests and events per second, and the CPU time of each in microseconds."""
    figures = in_turns(peers, options.rounds, lambda name, peer: _round(name, peer, options.seconds))
    return Section("latency and throughput of canned answers", figures)


def _round(name: str, peer: Peer, seconds: float) -> dict[str, float]:
    one = load(peer.base_url, CHAT, clients=1, seconds=seconds)
    cpu_idle = peer.cpu_s()
    many = load(peer.base_url, CHAT, clients=CLIENTS, seconds=seconds)
    cpu_after_many = peer.cpu_s()
    streams = load(peer.base_url, STREAM, clients=STREAMS, seconds=seconds)
    cpu_after_streams = peer.cpu_s()
    requests = len(many.latencies_s)
    figures = {
        "p50 ms, 1 client": quantile(one.latencies_s, 0.5) * 1000,
        "p99 ms, 1 client": quantile(one.latencies_s, 0.99) * 1000,
        "p50 ms, 32 clients": quantile(many.latencies_s, 0.5) * 1000,
        "p99 ms, 32 clients": quantile(many.latencies_s, 0.99) * 1000,
        "requests/s, 32 clients": requests / many.wall_s,
        "events/s, 8 streams": streams.events / streams.wall_s,
    }
    if name != "direct":  # the server itself, which is not what is measured
        figures["CPU us/request, 32 clients"] = used_s(cpu_idle, cpu_after_many) / requests * 1e6
        figures["CPU us/event, 8 streams"] = used_s(cpu_after_many, cpu_after_streams) / streams.events * 1e6
    return figures


if __name__ == "__main__":
    sys.exit(main())
