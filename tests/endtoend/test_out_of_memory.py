"""A GPU whose memory runs out: the agent as a process, with llama-servers that say so as a CUDA build does."""

import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes import fake_nvml_library, gpu_memory_server
from fakes.agent_process import AgentProcess, running_agent, write_config


@pytest.fixture
def config(llama_server: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One GPU with 23034 MiB, of which 1000 are taken; `big` has room beside nothing, and `huge` not even alone."""
    servers, state, binary = tmp_path / "servers", tmp_path / "nvml", tmp_path / "llama-server"
    servers.mkdir()
    state.write_text(f"gpus 1\nused {gpu_memory_server.OTHERS_MIB}\nservers {servers}\n")
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {gpu_memory_server.__file__} {llama_server} {servers} "$@"\n')
    binary.chmod(0o755)
    library = fake_nvml_library.build(tmp_path)
    for name, value in {
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_NVML": str(state),
        "CUDA_VISIBLE_DEVICES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    models: list[dict[str, Any]] = [
        # For `small` the estimate is right: so much context would take 7.6 GiB. For the others it is far too low.
        {"model_id": "small-8000", "path": str(tiny_model), "ctx_size": 32_000_000},
        {"model_id": "big-20000", "path": str(tiny_model)},
        {"model_id": "huge-30000", "path": str(tiny_model)},
    ]
    return write_config(
        tmp_path, binary, models, backend="cuda", max_models_per_device=2, memory_settle_timeout_s=1, restart={}
    )


def ask(agent: AgentProcess, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def starts(agent: AgentProcess, model: str) -> int:
    return sum(f"loading {model}" in line["message"] for line in agent.lines)


def test_room_is_made_for_a_load_that_ran_out_and_a_hopeless_one_is_refused_with_the_figures(config: Path) -> None:
    with running_agent(config) as agent:
        assert ask(agent, "small-8000").status_code == 200
        answer = ask(agent, "big-20000")
        assert answer.status_code == 200, answer.text
        agent.wait_for_line(
            lambda line: line["message"] == "gpu:0: making room for big-20000: small-8000 will be unloaded"
        )
        [child] = agent.children()
        assert "big-20000" in child.cmdline()

        answer = ask(agent, "huge-30000")
        assert answer.status_code == 503
        said = answer.json()["error"]["message"]
        for figures in ("out of device memory", "its server asked for 14.6 GiB at once", "the device has 22.5 GiB"):
            assert figures in said
        assert starts(agent, "huge-30000") == 2, "once beside big, once alone"
        assert ask(agent, "huge-30000").status_code == 503
        assert starts(agent, "huge-30000") == 2, "known to be hopeless"
        until = time.monotonic() + 10
        while "huge" not in (config.parent / "state" / "loads.json").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
    with running_agent(config) as agent:
        answer = ask(agent, "huge-30000")
        assert (answer.status_code, starts(agent, "huge-30000")) == (503, 0)
        assert "at least 21.6 GiB have to be free, and at most 21.5 GiB can be" in answer.json()["error"]["message"]
        load = f"{agent.base_url}/v1/node/models/huge-30000/load"
        assert httpx.post(load, headers=agent.operator_headers(), timeout=60, trust_env=False).status_code == 503
        assert starts(agent, "huge-30000") == 1, "an operator may insist"
