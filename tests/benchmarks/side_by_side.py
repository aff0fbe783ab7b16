#!/usr/bin/env python3
"""Chat, embedding and rerank models on one CPU device, with real servers: one at a time, side by side, at once.

    python tests/benchmarks/side_by_side.py [--rounds 3] [--quick]

Compared are three configurations of the agent: "one model" (the default: one loaded at a time), "resident"
(`max_models_per_device: 3`) and "concurrent" (the same with `concurrent_models`). Each first gets one request for each
model. Then eight workers send 500 requests, of each kind in turn: counted are the servers that are started for them.
After that embeddings are sent one after another, on an idle node and while one long chat after another runs. All models
are tiny ones, whose loads take a tenth of a second: with real ones each switch costs seconds.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks import peers
from benchmarks.figures import Section, in_turns, quantile
from benchmarks.options import Options, read_options
from benchmarks.processes import Peer
from fakes import tiny_models
from nodeagent.config import find_llama_server, parse_config

REQUESTS, QUICK_REQUESTS = 500, 30
WORKERS = 8
# With the slow model that takes some three seconds, and with `--quick` one.
LONG_CHAT_TOKENS, QUICK_LONG_CHAT_TOKENS = 600, 350
LONG_CHATS, QUICK_LONG_CHATS = 5, 2
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "one model": {},
    "resident": {"max_models_per_device": 3},
    "concurrent": {"max_models_per_device": 3, "concurrent_models": True},
}
EMBEDDING = ("/v1/embeddings", {"model": "embedder", "input": "All work and no play makes Jack a dull boy."})
RERANKING = ("/v1/rerank", {"model": "reranker", "query": "a dull boy", "documents": ["Jack works", "Jack plays"]})


def chat(max_tokens: int) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "hello there"}]
    return "/v1/chat/completions", {"model": "chat", "messages": messages, "max_tokens": max_tokens}


def main() -> int:
    measure(read_options(__doc__)).print()
    return 0


def measure(options: Options) -> Section:
    """Starts of servers, requests per second, and waits in ms; the ratios are to one model at a time."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        models = [
            {"model_id": name, "path": str(tiny_models.write_model(model, folder)), "threads": 1}
            for name, model in {
                "chat": tiny_models.SLOW,
                "embedder": tiny_models.EMBEDDER,
                "reranker": tiny_models.RERANKER,
            }.items()
        ]
        server = find_llama_server(parse_config(json.dumps({"models": models}), folder / "none.yaml"))
        targets = {}
        for name, keys in CONFIGURATIONS.items():
            own = folder / name
            own.mkdir()
            targets[name] = stack.enter_context(peers.agent(own, server, models, **keys))
        figures = in_turns(targets, options.rounds, lambda _name, peer: _round(peer, options))
    return Section("chat, embedding and rerank models on one device", figures)


def _round(peer: Peer, options: Options) -> dict[str, float]:
    requests = QUICK_REQUESTS if options.quick else REQUESTS
    with httpx.Client(base_url=peer.base_url, timeout=120, trust_env=False) as http:
        kinds = [chat(4), EMBEDDING, RERANKING]
        for kind in kinds:
            _ask(http, kind)
        before, began = _starts(http), time.perf_counter()
        took_s = _mixed(http, list(itertools.islice(itertools.cycle(kinds), requests)))
        wall_s, starts = time.perf_counter() - began, _starts(http) - before
        idle_s = [_ask(http, EMBEDDING) for _ in range(50)]
        beside_s = _beside_long_chats(http, options)
    return {
        f"starts in {requests} requests": starts,
        "requests/s": requests / wall_s,
        "p95 ms, mixed": quantile(took_s, 0.95) * 1000,
        "p50 ms, embedding, idle": quantile(idle_s, 0.5) * 1000,
        "p50 ms, embedding, long chat": quantile(beside_s, 0.5) * 1000,
        "p95 ms, embedding, long chat": quantile(beside_s, 0.95) * 1000,
    }


def _mixed(http: httpx.Client, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[float]:
    with ThreadPoolExecutor(WORKERS) as workers:
        return list(workers.map(lambda request: _ask(http, request), requests))


def _beside_long_chats(http: httpx.Client, options: Options) -> list[float]:
    """Embeddings, one every 50 ms at most, while one long chat after another runs."""
    tokens = QUICK_LONG_CHAT_TOKENS if options.quick else LONG_CHAT_TOKENS
    chats_ended = Event()

    def chats() -> None:
        try:
            for _ in range(QUICK_LONG_CHATS if options.quick else LONG_CHATS):
                _ask(http, chat(tokens))
        finally:
            chats_ended.set()

    def embeddings() -> Iterator[float]:
        while not chats_ended.wait(0.05):
            yield _ask(http, EMBEDDING)

    with ThreadPoolExecutor(1) as other:
        running = other.submit(chats)
        time.sleep(0.1)  # the first chat runs
        took_s = list(embeddings())
        running.result()
    return took_s


def _ask(http: httpx.Client, request: tuple[str, dict[str, Any]]) -> float:
    """How long it took. Raises if it was refused."""
    began = time.perf_counter()
    http.post(request[0], json=request[1]).raise_for_status()
    return time.perf_counter() - began


def _starts(http: httpx.Client) -> int:
    """How many servers were started so far: their generations count up per device."""
    [device] = http.get("/v1/node/inventory").json()["devices"]
    return max(int(server["generation"]) for server in device["servers"])


if __name__ == "__main__":
    sys.exit(main())
