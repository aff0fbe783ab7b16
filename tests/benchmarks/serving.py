"""What the way through the agent costs, side by side with its peers, in one run.

    python tests/benchmarks/serving.py [--seconds 2] [--rounds 3] [--json FILE] [--llama-swap BINARY]

Three things are measured. The latency that each adds to a canned answer, with 1 client and with 32; how many events
of streams go through in a second, with 8 streams at once; and how long a request for a model that is not loaded takes
to its first byte, two models in turn, with the real llama-server. The targets take turns, round by round, since the
machine may be shared: read the ratios, not the milliseconds.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peers
from benchmarks.figures import Figures, medians, print_ratios
from benchmarks.load import Outcome, first_byte_s, load
from fakes import tiny_models
from nodeagent.cli.demo import fetch_model
from nodeagent.config import find_llama_server, parse_config

QUESTION = [{"role": "user", "content": "What is the sun? Answer in one sentence."}]
CANNED_ALIAS = "canned"
CHAT: dict[str, object] = {"model": CANNED_ALIAS, "messages": QUESTION}
STREAM = CHAT | {"stream": True}
SWITCHES = 6


def main() -> int:
    args = _arguments()
    peers.keep_to_load_cpu()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures: dict[str, Figures] = {
            "canned answers": measure_canned(folder, args),
            "switches": measure_switches(folder, args),
        }
    print_ratios("latency and streams, against the server reached directly", figures["canned answers"], "direct")
    print_ratios("a switch of models, to the first byte, against the agent", figures["switches"], "agent")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load, for each figure in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--llama-swap", type=Path, metavar="BINARY", help="compare with this llama-swap too")
    return parser.parse_args()


def measure_canned(folder: Path, args: argparse.Namespace) -> Figures:
    """Latency in ms at 1 and 32 clients, requests and events per second, for each way to a canned answer."""
    command = [sys.executable, str(peers.CANNED), "-a", CANNED_ALIAS]
    # The agent looks at a model's file before it starts the server; the canned one does not read it.
    model = {"model_id": CANNED_ALIAS, "path": str(tiny_models.write_model(tiny_models.TINY, folder)), "parallel": 64}
    with ExitStack() as stack:
        direct = stack.enter_context(peers.canned(folder, CANNED_ALIAS))
        targets = {
            "direct": direct,
            "agent": stack.enter_context(peers.agent(folder, peers.CANNED, [model], cpus=True)),
        }
        if shutil.which("haproxy"):
            targets["haproxy"] = stack.enter_context(peers.haproxy(folder, direct))
        if args.llama_swap:
            commands = {CANNED_ALIAS: command}
            targets["llama-swap"] = stack.enter_context(peers.llama_swap(folder, args.llama_swap, commands))
        for base_url in targets.values():
            first_byte_s(base_url, STREAM)  # so that a server runs behind each
        samples: dict[str, dict[str, list[float]]] = {name: {} for name in targets}
        for _round in range(args.rounds):
            for name, base_url in targets.items():
                for figure, value in _round_of_load(base_url, args.seconds).items():
                    samples[name].setdefault(figure, []).append(value)
    return medians(samples)


def _round_of_load(base_url: str, seconds: float) -> dict[str, float]:
    one = load(base_url, CHAT, clients=1, seconds=seconds)
    many = load(base_url, CHAT, clients=32, seconds=seconds)
    streams = load(base_url, STREAM, clients=8, seconds=seconds)
    for outcome in (one, many, streams):
        _none_failed(base_url, outcome)
    return {
        "p50 ms, 1 client": one.quantile_ms(0.5),
        "p99 ms, 1 client": one.quantile_ms(0.99),
        "p50 ms, 32 clients": many.quantile_ms(0.5),
        "p99 ms, 32 clients": many.quantile_ms(0.99),
        "requests/s, 32 clients": len(many.latencies_s) / many.wall_s,
        "events/s, 8 streams": streams.events / streams.wall_s,
    }


def _none_failed(base_url: str, outcome: Outcome) -> None:
    if outcome.faults:
        raise RuntimeError(f"{base_url}: {outcome.faults} of {len(outcome.latencies_s)} requests failed")


def measure_switches(folder: Path, args: argparse.Namespace) -> Figures:
    """Milliseconds from a request for a model that is not loaded to its first byte, two models in turn."""
    files = {
        "tiny": tiny_models.write_model(tiny_models.TINY_B, folder),
        "smollm2": fetch_model(progress=True),
    }
    models: list[dict[str, Any]] = [
        {"model_id": name, "path": str(path), "ctx_size": 2048} for name, path in files.items()
    ]
    server = find_llama_server(parse_config(json.dumps({"models": models}), folder / "none.yaml"))
    ways: dict[str, Callable[[ExitStack], str]] = {
        "agent": lambda stack: stack.enter_context(peers.agent(folder, server, models, cpus=False)),
        "router": lambda stack: stack.enter_context(peers.router(folder, server, files)),
    }
    if args.llama_swap:
        flags = ["-c", "2048", "-np", "1", "--device", "none"]
        commands = {name: [str(server), "-m", str(path), *flags] for name, path in files.items()}
        ways["llama-swap"] = lambda stack: stack.enter_context(peers.llama_swap(folder, args.llama_swap, commands))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    with ExitStack() as stack:
        targets = {name: start(stack) for name, start in ways.items()}
        for _switch in range(SWITCHES):
            for name, base_url in targets.items():
                for model in files:
                    body = {"model": model, "messages": QUESTION, "max_tokens": 1, "stream": True}
                    took_ms = first_byte_s(base_url, body) * 1000
                    samples[name].setdefault(f"ms to {model}", []).append(took_ms)
    return medians(samples)


if __name__ == "__main__":
    sys.exit(main())
