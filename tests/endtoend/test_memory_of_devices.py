"""What a model needs of a device's memory, with the real server."""

import json
import re
import time
from pathlib import Path

import httpx

from fakes.agent_process import running_agent, write_config


def test_a_model_that_fits_nowhere_is_refused_with_the_figures_and_never_started(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "large", "path": str(tiny_model), "ctx_size": 2_000_000_000}]
    with running_agent(write_config(tmp_path, llama_server, models)) as agent:
        asked = {"model": "large", "messages": [{"role": "user", "content": "hello"}]}
        answer = httpx.post(f"{agent.base_url}/v1/chat/completions", json=asked, timeout=30, trust_env=False)
        assert answer.status_code == 503
        said = answer.json()["error"]["message"]
        assert re.search(
            r"cpu:0: needs about [\d.]+ GiB \(476\.8 GiB of KV cache \+ [\d.]+ GiB of compute buffer\)", said
        )
        assert re.search(r"and the device has [\d.]+ [GM]iB", said)
        assert agent.children() == []


def test_what_a_load_took_is_known_after_a_restart_of_the_agent(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, llama_server, [{"model_id": "tiny", "path": str(tiny_model)}])
    file = Path(json.loads(config.read_text())["state_dir"]) / "loads.json"
    with running_agent(config) as agent:
        assert load_time_s(agent.base_url) is None
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        httpx.post(f"{agent.base_url}/v1/chat/completions", json=asked, timeout=30, trust_env=False).raise_for_status()
        until = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    [load] = json.loads(file.read_text())["loads"]
    assert (load["model_id"], load["device_id"]) == ("tiny", "cpu:0")
    assert 2**20 < load["memory_bytes"] < 2**30
    with running_agent(config) as agent:
        assert load_time_s(agent.base_url) == load["load_s"]


def load_time_s(base_url: str) -> float | None:
    [model] = httpx.get(f"{base_url}/v1/node/inventory", trust_env=False).json()["models"]
    load_s: float | None = model["load_time_s"]
    return load_s


def test_the_context_that_a_server_really_has_is_shown_and_less_than_asked_for_is_a_warning(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = {"model_id": "tiny", "path": str(tiny_model), "ctx_size": 16_384, "parallel": 2, "preload": True}
    with running_agent(write_config(tmp_path, llama_server, [model])) as agent:
        line = agent.wait_for_line(lambda line: "tokens of context" in line["message"])
        assert line["level"] == "warning"
        assert line["message"] == (
            "cpu:0/tiny: each slot has 4096 tokens of context, and 8192 were asked for: "
            "the model was trained for no more"
        )
        [device] = httpx.get(f"{agent.base_url}/v1/node/inventory", trust_env=False).json()["devices"]
        assert [server["slot_ctx_size"] for server in device["servers"]] == [4096]
