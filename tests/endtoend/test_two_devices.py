"""Several devices on one host: CPU devices with real servers."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from fakes.agent_process import running_agent, write_config

HELLO = [{"role": "user", "content": "hello there"}]


def test_two_devices_serve_two_models_at_once(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        llama_server,
        [{"model_id": "tiny", "path": str(tiny_model)}, {"model_id": "slow", "path": str(slow_model), "threads": 1}],
        devices=[{"device_id": "cpu:0", "threads": 1, "cpus": [0]}, {"device_id": "cpu:1", "threads": 1}],
    )
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:

        def ask(model: str, tokens: int) -> httpx.Response:
            body = {"model": model, "messages": HELLO, "max_tokens": tokens}
            return http.post("/v1/chat/completions", json=body)

        http.get("/v1/node/inventory")  # the first of these takes its time, for which the long request may be too short
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(ask, "slow", 200)
            while not any(device["lane"]["in_flight"] for device in http.get("/v1/node/inventory").json()["devices"]):
                assert not long.done(), "it was never seen in flight"
                time.sleep(0.01)
            quick = [ask("tiny", 4) for _ in range(5)]
            assert not long.done(), "the long request ended before the quick ones: raise its tokens"
            answers = [*quick, long.result()]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert {answer.headers["x-node-device"] for answer in quick} == {"cpu:1"}
        assert long.result().headers["x-node-device"] == "cpu:0"
        children = agent.children()
        assert len(children) == 2
        [pinned] = [child for child in children if child.cpu_affinity() == [0]]
        assert any(str(slow_model) in argument for argument in pinned.cmdline())
        arguments = pinned.cmdline()
        assert arguments[arguments.index("-t") + 1] == "1"
