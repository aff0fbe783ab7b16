#!/usr/bin/env python3
"""What the agent's figures, API keys and log cost: the agent against itself without them.

    python tests/benchmarks/costs.py [--seconds 2] [--rounds 3] [--quick]

"figures" is the agent as it is: counters and histograms for `/metrics`, and a record of each request in the activity.
"bare" is the agent without them. "key" is the agent with an API key. "log" is the agent with the log at `info`, the
default, before a server that prints as much as llama-server does; all others log warnings, and their servers print
nothing. The aims are that figures cost at most 15 % of
what the bare agent takes, and a key at most 5 % of what the agent without keys takes. All are sent the key with each
request: clients' libraries send one whether the node has keys or not.
"""

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.figures import Section, by_figure, lower_quartiles, quantile
from benchmarks.latency import CHAT, CLIENTS
from benchmarks.load import load
from benchmarks.options import Options, read_options
from benchmarks.peers import agent_before_canned
from benchmarks.processes import Peer, keep_to_load_cpu, used_s

BARE, FIGURES, KEY, LOG = "bare", "figures", "key", "log"
P50, CPU = "p50 ms, 1 client", "CPU us/request, 32 clients"
_BARE_AGENT = Path(__file__).parent / "agent_without_figures.py"
_KEY_TEXT = "the-key-of-the-benchmark"
_HEADERS = {"Authorization": f"Bearer {_KEY_TEXT}"}
# More turns than in other measurements, each shorter: the differences are small.
_TURNS = 16


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    measure(options).print()
    return 0


def measure(options: Options) -> Section:
    """Latency in ms and CPU time in microseconds of a request by each variant: the lower quartile of the turns."""
    turns = options.rounds if options.quick else options.rounds * _TURNS
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in (BARE, FIGURES, KEY, LOG)}
    with _variants() as variants:
        for turn in range(turns):
            # There and back, so that none always comes first.
            for name in sorted(variants, reverse=bool(turn % 2)):
                measured[name].append(_round(variants[name], options.seconds / 8))
    samples = {name: by_figure(its_turns) for name, its_turns in measured.items()}
    return Section("what figures, an API key and the log cost", lower_quartiles(samples))


@contextmanager
def _variants() -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        bare = stack.enter_context(agent_before_canned(folder(), program=[str(_BARE_AGENT)]))
        figures = stack.enter_context(agent_before_canned(folder()))
        entry = {"name": "benchmark", "sha256": hashlib.sha256(_KEY_TEXT.encode()).hexdigest()}
        keyed = stack.enter_context(agent_before_canned(folder(), api_keys=[entry]))
        chatty = {"CANNED_LOG": "1"}
        logging = stack.enter_context(agent_before_canned(folder(), log_level="info", server_env=chatty))
        variants = {BARE: bare, FIGURES: figures, KEY: keyed, LOG: logging}
        for variant in variants.values():  # so that a canned server runs behind each
            load(variant.base_url, CHAT, clients=1, seconds=0, headers=_HEADERS)
        yield variants


def _round(variant: Peer, seconds: float) -> dict[str, float]:
    one = load(variant.base_url, CHAT, clients=1, seconds=seconds, headers=_HEADERS)
    cpu_before = variant.cpu_s()
    many = load(variant.base_url, CHAT, clients=CLIENTS, seconds=seconds, headers=_HEADERS)
    used = used_s(cpu_before, variant.cpu_s())
    return {
        P50: quantile(one.latencies_s, 0.5) * 1000,
        CPU: used / len(many.latencies_s) * 1e6,
    }


if __name__ == "__main__":
    sys.exit(main())
