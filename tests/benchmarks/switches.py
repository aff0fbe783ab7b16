#!/usr/bin/env python3
"""How long a request for a model that is not loaded takes to its first byte: two models in turn, the real llama-server.

    python tests/benchmarks/switches.py [--rounds 3] [--quick] [--llama-swap BINARY]

"direct" is the least that a switch can take: the very command that the agent runs, with the variables of its server but
for the API key, started on its own with nothing to stop before it, until its answer's first byte. The models are a tiny
one, which loads in about 20 ms, and the demo's (98 MB, fetched into the user's cache); `--quick` takes a second tiny
one instead. All servers run on the CPU of what is in front of them.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks import peers
from benchmarks.figures import Figures, Section, by_figure, lower_quartiles
from benchmarks.load import first_byte_s
from benchmarks.options import Options, read_options
from benchmarks.processes import Peer, keep_to_load_cpu, process
from fakes import tiny_models
from nodeagent.cli.demo import fetch_model
from nodeagent.config import find_llama_server, parse_config
from nodeagent.llama_server.command_line import API_KEY_VARIABLE

CTX_SIZE = 2048
SWITCHES_PER_ROUND = 4
TINY = "tiny"
OVERHEAD = "ms over a direct start, at most"


def main() -> int:
    options = read_options(__doc__)
    keep_to_load_cpu()
    measure(options).print()
    return 0


def measure(options: Options) -> Section:
    """Milliseconds to each model, and by how much the agent's slowest switch exceeds a direct start: the lower quartile
    of the switches."""
    with tempfile.TemporaryDirectory() as scratch:
        samples = _measure(Path(scratch), options)
    return Section("a switch of models, to the first byte", with_overhead(lower_quartiles(samples)))


def with_overhead(figures: Figures) -> Figures:
    """The same figures with the agent's OVERHEAD over "direct": the largest of all models."""
    agent, direct = figures["agent"], figures["direct"]
    overhead_ms = max(agent[figure] - direct[figure] for figure in direct)
    return {**figures, "agent": {**agent, OVERHEAD: overhead_ms}}


def _measure(folder: Path, options: Options) -> dict[str, Mapping[str, list[float]]]:
    files = _models(folder, options)
    rounds: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        targets = _targets(folder, files, options, stack)
        for _switch in range(1 if options.quick else SWITCHES_PER_ROUND * options.rounds):
            for name, peer in targets.items():
                rounds.setdefault(name, []).append({_label(it): _switch_ms(peer, it) for it in files})
            servers = {it: _server_of(targets["agent"], it, path) for it, path in files.items()}
            direct = {_label(it): _direct_start_ms(folder, *server, it) for it, server in servers.items()}
            rounds.setdefault("direct", []).append(direct)
    return {name: by_figure(its_rounds) for name, its_rounds in rounds.items()}


def _models(folder: Path, options: Options) -> dict[str, Path]:
    tiny = tiny_models.write_model(tiny_models.TINY, folder)
    if options.quick:
        return {TINY: tiny, "tiny-b": tiny_models.write_model(tiny_models.TINY_B, folder)}
    return {TINY: tiny, "smollm2": fetch_model(progress=True)}


def _targets(folder: Path, files: Mapping[str, Path], options: Options, stack: ExitStack) -> dict[str, Peer]:
    models: list[dict[str, Any]] = [
        {"model_id": name, "path": str(path), "ctx_size": CTX_SIZE} for name, path in files.items()
    ]
    server = find_llama_server(parse_config(json.dumps({"models": models}), folder / "none.yaml"))
    targets = {
        "agent": stack.enter_context(peers.agent(folder, server, models)),
        "router": stack.enter_context(peers.router(folder, server, files)),
    }
    if options.llama_swap:
        flags = ["-c", str(CTX_SIZE), "-np", "1", "--device", "none"]
        commands = {name: [str(server), "-m", str(path), *flags] for name, path in files.items()}
        targets["llama-swap"] = stack.enter_context(peers.llama_swap(folder, options.llama_swap, commands))
    return targets


def _label(model: str) -> str:
    return f"ms to {model}"


def _switch_ms(peer: Peer, model: str) -> float:
    question = [{"role": "user", "content": "What is the sun? Answer in one sentence."}]
    return first_byte_s(peer.base_url, {"model": model, "messages": question, "max_tokens": 1, "stream": True}) * 1000


def _server_of(agent: Peer, model: str, path: Path) -> tuple[list[str], dict[str, str]]:
    """The command of the agent's server of the model, which is loaded for it, and its environment without the key."""
    _switch_ms(agent, model)
    server = next(it for it in agent.descendants() if str(path) in it.cmdline())
    return server.cmdline(), {name: value for name, value in server.environ().items() if name != API_KEY_VARIABLE}


def _direct_start_ms(folder: Path, command: list[str], env: Mapping[str, str], model: str) -> float:
    """From the spawn of that server, on a port that is known, to its first byte."""
    port = peers.free_port()
    argv = list(command)
    argv[argv.index("--port") + 1] = str(port)
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "direct.log", env=env) as peer:
        return peer.ready_after_s * 1000 + _switch_ms(peer, model)


if __name__ == "__main__":
    sys.exit(main())
