#!/usr/bin/env python3
"""Many short requests with large bodies, as a program sends that embeds documents: 64 clients, bodies of 32 KiB.

    python tests/benchmarks/embeddings.py [--seconds 2] [--rounds 3] [--quick] [--llama-swap BINARY]

The agent refuses embeddings from a chat model, so its canned model is one that embeds; the other peers don't ask.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import Section, in_turns, quantile
from benchmarks.load import load
from benchmarks.options import Options, read_options
from benchmarks.peers import CANNED_ALIAS, agent_before_canned, canned_peers
from benchmarks.processes import Peer, keep_to_load_cpu, used_s

CLIENTS = 64
BODY_BYTES = 32 * 1024
PATH = "/v1/embeddings"
_TEXT = ("All work and no play makes Jack a dull boy. " * (BODY_BYTES // 40))[: BODY_BYTES - 100]
BODY: dict[str, object] = {"model": CANNED_ALIAS, "input": _TEXT}


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    with canned_peers(options) as peers:
        measure(peers, options).print()
    return 0


def measure(peers: Mapping[str, Peer], options: Options) -> Section:
    """Latencies in ms, requests per second, and CPU time per request in microseconds."""
    with tempfile.TemporaryDirectory() as folder, agent_before_canned(Path(folder), task="embedding") as agent:
        load(agent.base_url, BODY, clients=1, seconds=0, path=PATH)  # so that its canned server runs
        figures = in_turns(
            {**peers, "agent": agent}, options.rounds, lambda name, peer: _round(name, peer, options.seconds)
        )
    return Section(f"embeddings, {CLIENTS} clients, bodies of 32 KiB", figures)


def _round(name: str, peer: Peer, seconds: float) -> dict[str, float]:
    cpu_before = peer.cpu_s()
    outcome = load(peer.base_url, BODY, clients=CLIENTS, seconds=seconds, path=PATH)
    cpu_after = peer.cpu_s()
    requests = len(outcome.latencies_s)
    figures = {
        "p50 ms": quantile(outcome.latencies_s, 0.5) * 1000,
        "p99 ms": quantile(outcome.latencies_s, 0.99) * 1000,
        "requests/s": requests / outcome.wall_s,
    }
    if name != "direct":  # the server itself, which is not what is measured
        figures["CPU us/request"] = used_s(cpu_before, cpu_after) / requests * 1e6
    return figures


if __name__ == "__main__":
    sys.exit(main())
