"""A model that spans two devices, by Mesa's software driver named twice, beside models that use one of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fakes.agent_process import running_agent, write_config

MASK = "GGML_VK_VISIBLE_DEVICES"
PATIENT = {"llama_server_startup_timeout_s": 120, "queue_timeout_s": 120, "max_pending_requests_per_device": 8}


def ask(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
    return http.post("/v1/chat/completions", json=body)


def test_a_model_spans_two_devices_and_takes_turns_with_models_of_one(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MASK, "0,0")
    gpu = {"gpu_layers": 99, "ctx_size": 512}
    served: list[dict[str, object]] = [
        {
            "model_id": "wide",
            "path": str(tiny_model),
            "devices": ["gpu:1", "gpu:0"],
            "tensor_split": [1, 1],
            "split_mode": "layer",
            "server_args": {"verbosity": 4},
            **gpu,
        },
        {"model_id": "narrow", "path": str(tiny_model_b), "devices": ["gpu:1"], **gpu},
    ]
    config = write_config(tmp_path, llama_server, served, backend="vulkan", **PATIENT)
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=180, trust_env=False) as http:
        first = ask(http, "wide")
        assert first.status_code == 200, first.text
        assert first.headers["x-node-device"] == "gpu:1+gpu:0"
        assert first.json()["usage"]["completion_tokens"] == 4
        child = agent.wait_child()
        assert child.environ()[MASK] == "0,0"
        arguments = child.cmdline()
        assert arguments[arguments.index("--device") + 1] == "Vulkan0,Vulkan1"
        assert arguments[arguments.index("-ts") + 1] == "1,1"
        printed = http.get("/v1/node/devices/gpu:1/logs?lines=1000", headers=agent.operator_headers()).text
        for device in ("Vulkan0", "Vulkan1"):
            assert f"{device} model buffer size" in printed

        other, home = http.get("/v1/node/inventory").json()["devices"]
        assert [(it["model_id"], it["device_ids"]) for it in home["servers"]] == [("wide", ["gpu:1", "gpu:0"])]
        assert (other["servers"], other["used_by"], home["used_by"]) == ([], ["wide"], [])

        narrow = ask(http, "narrow")
        assert (narrow.status_code, narrow.headers["x-node-device"]) == (200, "gpu:1")
        assert [it.cmdline()[it.cmdline().index("-a") + 1] for it in agent.children()] == ["narrow"]

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda model: ask(http, model), ["narrow", "wide", "narrow", "wide"]))
        assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
        assert {answer.headers["x-node-device"] for answer in answers} == {"gpu:1+gpu:0", "gpu:1"}

        for model, was_on in (("wide", ["gpu:1+gpu:0"]), ("narrow", ["gpu:1"])):
            loaded = bool([it for it in agent.children() if model in it.cmdline()])
            unloaded = http.post(f"/v1/node/models/{model}/unload", headers=agent.operator_headers())
            assert unloaded.json()["unloaded_from"] == (was_on if loaded else [])
        assert agent.children() == []
        for lane in http.get("/v1/node/queue").json()["lanes"]:
            assert (lane["in_flight"], lane["waiting"], lane["held_for"]) == (0, 0, [])
