#!/usr/bin/env python3
"""How long each front takes from its start until it answers, and what memory it has after 100 requests.

    python tests/benchmarks/start_and_memory.py [--rounds 3] [--quick] [--llama-swap BINARY]

The time is from the spawn of the process to the first 200: `/livez` of the agent, `/health` of its peers (HAProxy and
nginx forward it to a server that runs already). The agent's `/readyz` is reported beside it. The memory is the
resident set of the front's processes after 100 chat completions, one after another. Of the agent also the time that
its imports take (not with `--quick`): the sum of `python -X importtime`, which itself makes them slower.
"""

import compileall
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks import peers
from benchmarks.figures import Section, in_turns
from benchmarks.load import load_requests
from benchmarks.options import Options, read_options
from benchmarks.processes import Peer, answers_200, keep_to_load_cpu

_ROOT = Path(__file__).parents[2]
REQUESTS = 100
CHAT: dict[str, object] = {"model": peers.CANNED_ALIAS, "messages": [{"role": "user", "content": "What is the sun?"}]}
READY = "s to ready"
RESIDENT = "resident MiB"

# "import time:      self [us] | cumulative | imported package"
_IMPORT_TIME = re.compile(r"^import time: +(\d+) \|", re.MULTILINE)

Start = Callable[[Path], AbstractContextManager[Peer]]


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    measure(options).print()
    return 0


def measure(options: Options) -> Section:
    """Seconds to the first 200, and MiB."""
    for package in ("nodeagent", "supervisor"):
        # As pip does when it installs them; where Python may not write bytecode, each start would compile them again.
        compileall.compile_dir(_ROOT / package, quiet=1)
    with ExitStack() as stack:
        direct = stack.enter_context(peers.canned(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        figures = in_turns(
            _starts(direct, options),
            options.rounds,
            lambda name, start: _measure(name, start, imports=not options.quick),
        )
    return Section(f"start, and memory after {REQUESTS} requests", figures)


def _starts(direct: Peer, options: Options) -> dict[str, Start]:
    starts: dict[str, Start] = {"agent": partial(peers.agent_before_canned, health="/livez")}
    if shutil.which("haproxy"):
        starts["haproxy"] = partial(peers.haproxy, upstream=direct.base_url)
    if shutil.which("nginx"):
        starts["nginx"] = partial(peers.nginx, upstream=direct.base_url)
    if options.llama_swap:
        starts["llama-swap"] = partial(peers.llama_swap_before_canned, binary=options.llama_swap)
    return starts


def _measure(name: str, start: Start, *, imports: bool) -> Mapping[str, float]:
    with tempfile.TemporaryDirectory() as scratch, start(Path(scratch)) as peer:
        figures = {READY: peer.ready_after_s}
        if name == "agent":
            figures["s to /readyz"] = _ready_after_s(peer)
        load_requests(peer.base_url, CHAT, REQUESTS)
        figures[RESIDENT] = peer.resident_mib()
    if name == "agent" and imports:
        figures["s of imports"] = _imports_s()
    return figures


def _ready_after_s(peer: Peer) -> float:
    while not answers_200(f"{peer.base_url}/readyz"):
        time.sleep(0.002)
    return time.perf_counter() - peer.spawned_at


def _imports_s() -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with peers.agent_before_canned(folder, python=["-X", "importtime"]):
            pass
        return imports_s((folder / "agent.log").read_text(errors="replace"))


def imports_s(log: str) -> float:
    """The total time of the imports in a log of `python -X importtime`, in seconds."""
    return sum(map(int, _IMPORT_TIME.findall(log))) / 1e6


if __name__ == "__main__":
    sys.exit(main())
