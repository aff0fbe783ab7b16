#!/usr/bin/env python3
"""Two models asked for in turn, on one device that holds one of them: the agent's scheduling, with real servers.

    python tests/benchmarks/scheduling/alternating.py [--requests 200] [--rounds 1] [--json FILE] [--plot FILE.png]
        [--llama-swap BINARY]

Sixteen workers take the next request of a shared list: a short chat with the one model, then one with the other, and
so on. Both models are the same file under two names, so their loads cost the same, and each of those takes longer
than a chat. Compared are the agent with its own scheduling, the agent with `scheduling: fifo`, llama-server's router
mode with room for one model, and llama-swap; each is started anew for each round, and runs alone.

Printed are the makespan, the number of loads, and the waits (from asking to the first byte of the answer): of each
the median of the rounds, with its ratio to fifo. A request that is refused (429) or fails (got anything else but a
whole answer) is asked again after its Retry-After, or a second; both are counted, and their pauses are part of the
waits. So the makespans are of the same work. All servers have one thread, and share a CPU with what is in front of
them, as the load has another: read the ratios.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[3]))  # the root first: tests/nodeagent is no package

from benchmarks import peers
from benchmarks.figures import by_figure, medians, print_ratios, quantile
from benchmarks.processes import Peer, keep_to_load_cpu
from benchmarks.scheduling.wait_plot import draw_waits
from benchmarks.scheduling.workers import Outcome, ask_all
from nodeagent.cli.demo import fetch_model
from nodeagent.config import find_llama_server, parse_config

WORKERS = 16
MAX_PENDING = 16
CTX_SIZE = 2048
THREADS = 1
MAX_TOKENS = 8
# A load and a cold prompt take about half a second, so this is more than a target needs that loads for each request.
LIMIT_S_PER_REQUEST = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """One way to the models: `start` runs it in a folder of its own, `loads` counts, while it runs, its servers'
    starts, by its base URL and that folder."""

    start: Callable[[Path], AbstractContextManager[Peer]]
    loads: Callable[[str, Path], int]


def main() -> int:
    args = _arguments()
    keep_to_load_cpu()
    outcomes: dict[str, list[Outcome]] = {}
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        targets = _targets(_two_models(Path(scratch)), args.llama_swap)
        for number in range(args.rounds):
            for name, target in targets.items():
                outcome, loads = _measure(target, Path(scratch) / f"{name}-{number}", args.requests)
                outcomes.setdefault(name, []).append(outcome)
                figures.setdefault(name, []).append(_figures(outcome, loads, args.requests))
                _tell_failures(name, outcome)
    _print(args.requests, figures)
    _write(args, outcomes, figures)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each target has them (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and times there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw there who waited when, in the first round")
    parser.add_argument("--llama-swap", type=Path, metavar="BINARY", help="compare with this llama-swap too")
    args = parser.parse_args()
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: install the `bench` extra")
    return args


def _two_models(folder: Path) -> dict[str, Path]:
    """The demo's model twice; a copy, since links would share the page cache."""
    original = fetch_model(progress=True)
    return {"a": original, "b": Path(shutil.copyfile(original, folder / "b.gguf"))}


def _targets(files: dict[str, Path], llama_swap: Path | None) -> dict[str, Target]:
    models: list[dict[str, Any]] = [
        {"model_id": name, "path": str(path), "ctx_size": CTX_SIZE, "threads": THREADS} for name, path in files.items()
    ]
    server = find_llama_server(parse_config(json.dumps({"models": models}), Path("none.yaml")))
    flags = ["-c", str(CTX_SIZE), "-t", str(THREADS)]

    def agent(scheduling: str) -> Target:
        keys: dict[str, Any] = {"scheduling": scheduling, "max_pending_requests_per_device": MAX_PENDING}
        return Target(lambda folder: peers.agent(folder, server, models, **keys), _loads_by_agent)

    targets = {
        "fifo": agent("fifo"),
        "swap_aware": agent("swap_aware"),
        "router": Target(
            lambda folder: peers.router(folder, server, files, flags), _loads_by_log("router.log", "spawning server")
        ),
    }
    if llama_swap is not None:
        alone = ["-np", "1", "--device", "none"]
        commands = {name: [str(server), "-m", str(path), *flags, *alone] for name, path in files.items()}
        targets["llama-swap"] = Target(
            lambda folder: peers.llama_swap(folder, llama_swap, commands),
            _loads_by_log("llama-swap.log", "Health check passed"),
        )
    return targets


def _loads_by_agent(base_url: str, _folder: Path) -> int:
    """Generations are counted over all servers of the agent, so that the highest is how many there were."""
    inventory = httpx.get(f"{base_url}/v1/node/inventory", trust_env=False).raise_for_status().json()
    return max((server["generation"] for device in inventory["devices"] for server in device["servers"]), default=0)


def _loads_by_log(log: str, words: str) -> Callable[[str, Path], int]:
    """How many lines have these words: each target writes one such for each load."""
    return lambda _base_url, folder: (folder / log).read_text(errors="replace").count(words)


def _measure(target: Target, folder: Path, requests: int) -> tuple[Outcome, int]:
    folder.mkdir()
    with target.start(folder) as peer:
        bodies = [_body(number) for number in range(requests)]
        outcome = ask_all(peer.base_url, bodies, workers=WORKERS, limit_s=requests * LIMIT_S_PER_REQUEST)
        return outcome, target.loads(peer.base_url, folder)


def _body(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is {number} plus {number + 1}?"}
    return {"model": "ab"[number % 2], "messages": [question], "max_tokens": MAX_TOKENS, "temperature": 0}


def _figures(outcome: Outcome, loads: int, requests: int) -> dict[str, float]:
    waits_s = [answer.wait_s for answer in outcome.answers] or [float("nan")]
    return {
        "makespan s": outcome.makespan_s,
        "loads": float(loads),
        "wait p50 s": quantile(waits_s, 0.5),
        "wait p95 s": quantile(waits_s, 0.95),
        "wait max s": max(waits_s),
        "refused": float(outcome.refusals),
        "failed": float(len(outcome.failures)),
        "never answered": float(requests - len(outcome.answers)),
    }


def _tell_failures(name: str, outcome: Outcome) -> None:
    errors = Counter(error for its_errors in outcome.failures.values() for error in its_errors)
    for error, times in errors.most_common(3):
        print(f"{name}: {times} times {error}", file=sys.stderr)


def _print(requests: int, figures: dict[str, list[dict[str, float]]]) -> None:
    title = f"{requests} requests for two models in turn, {WORKERS} at a time, against fifo"
    print_ratios(title, medians({name: by_figure(rounds) for name, rounds in figures.items()}), "fifo")


def _write(
    args: argparse.Namespace, outcomes: dict[str, list[Outcome]], figures: dict[str, list[dict[str, float]]]
) -> None:
    if args.json is not None:
        runs = {name: [asdict(outcome) for outcome in rounds] for name, rounds in outcomes.items()}
        args.json.write_text(json.dumps({"figures": figures, "runs": runs}, indent=1) + "\n")
    if args.plot is not None:
        answers = {name: rounds[0].answers for name, rounds in outcomes.items() if rounds[0].answers}
        draw_waits(answers, args.plot)


if __name__ == "__main__":
    sys.exit(main())
