"""Vulkan devices, by Mesa's software driver: real servers that compute on what is, to them, a GPU.

The driver's one device is listed only if it is named, and named twice it is two.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from nodeagent.devices.backend import Build
from nodeagent.devices.listed import ListedBackend
from nodeagent.devices.listing import identified, list_devices
from nodeagent.devices.selection import select
from nodeagent.devices.values import DeviceMetrics

MASK = "GGML_VK_VISIBLE_DEVICES"
TWO = {MASK: "0,0"}
# The first start of a server compiles the shaders that it needs: seconds on a slow machine.
PATIENT = {"llama_server_startup_timeout_s": 120}


def ask(http: httpx.Client, model: str, tokens: int = 4) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens}
    return http.post("/v1/chat/completions", json=body)


def models(*files: Path) -> list[dict[str, object]]:
    return [{"model_id": file.stem, "path": str(file), "gpu_layers": 99, "ctx_size": 512} for file in files]


def printed(agent: AgentProcess, http: httpx.Client, device_id: str) -> str:
    return http.get(f"/v1/node/devices/{device_id}/logs?lines=1000", headers=agent.operator_headers()).text


def test_the_devices_are_those_that_the_binary_lists(llama_server: Path) -> None:
    backend = ListedBackend("vulkan", Build(llama_server), [], TWO)
    first, second = backend.discover()
    assert (first.device_id, first.backend, first.index) == ("gpu:0", "vulkan", 0)
    assert first.name.startswith("llvmpipe")
    assert first.memory_total_bytes
    assert (first.uuid, first.pci_id) == (None, None)
    assert (second.device_id, second.index) == ("gpu:1", 1)
    assert {backend.child_env(device)[MASK] for device in (first, second)} == {"0"}
    assert backend.child_env(first)["CUDA_VISIBLE_DEVICES"] == ""
    # The binary repeats the total as free, and nothing else can measure it: unknown, not 0.
    assert backend.read(first, 3.0) == DeviceMetrics(measured_at=3.0, memory_total_bytes=first.memory_total_bytes)
    backend.close()


def test_the_real_binary_names_the_devices_of_a_bare_model(llama_server: Path, tmp_path: Path) -> None:
    """The model of one line gets as far as to the line with the address; this driver has none."""
    build = Build(llama_server)
    wrapper = tmp_path / "llama-server"
    log = tmp_path / "log"
    wrapper.write_text(f'#!/bin/sh\nexec {llama_server} "$@" 2>{log}\n')
    wrapper.chmod(0o755)
    found = list_devices(build, TWO)
    assert identified(found, Build(wrapper), TWO) == found
    for device in found:
        assert f"using device {device.name} ({device.description}) (unknown id) - " in log.read_text()


def test_auto_uses_a_vulkan_device_that_the_binary_can_use(llama_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MASK, "0")
    backend = select("auto", [], Build(llama_server))
    assert (backend.name, [device.device_id for device in backend.devices([])]) == ("vulkan", ["gpu:0"])
    backend.close()


def test_a_server_computes_on_its_device_and_models_are_switched(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MASK, "0")
    config = write_config(
        tmp_path, llama_server, models(tiny_model, tiny_model_b), backend="vulkan", memory_settle_timeout_s=5, **PATIENT
    )
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=180, trust_env=False) as http:
        for model in (tiny_model, tiny_model_b, tiny_model):
            answer = ask(http, model.stem)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-node-device"] == "gpu:0"
            assert answer.json()["usage"]["completion_tokens"] == 4
        child = agent.wait_child()
        assert child.environ()[MASK] == "0"
        assert child.environ()["CUDA_VISIBLE_DEVICES"] == ""
        arguments = child.cmdline()
        assert arguments[arguments.index("--device") + 1] == "Vulkan0"
        [device] = http.get("/v1/node/inventory").json()["devices"]
        metrics = device["metrics"]
        assert metrics["memory_total_bytes"] > 0
        assert [metrics[key] for key in ("memory_used_bytes", "memory_free_bytes", "utilization_ratio")] == [None] * 3


def test_a_server_on_a_cpu_loads_no_driver_of_a_gpu(llama_server: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It is a build for Vulkan on a host that has drivers, as the other tests show."""
    config = write_config(tmp_path, llama_server, models(tiny_model), backend="cpu")
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=180, trust_env=False) as http:
        assert ask(http, tiny_model.stem).status_code == 200
        mapped = Path(f"/proc/{agent.wait_child().pid}/maps").read_text()
    assert "libvulkan.so" in mapped
    assert "libvulkan_lvp.so" not in mapped


def test_two_devices_serve_at_once(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MASK, "0,0")
    served = [{**model, "server_args": {"verbosity": 4}} for model in models(tiny_model, tiny_model_b)]
    config = write_config(tmp_path, llama_server, served, backend="vulkan", **PATIENT)
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=180, trust_env=False) as http:
        for device_id, model in (("gpu:0", tiny_model), ("gpu:1", tiny_model_b)):
            loaded = http.post(
                f"/v1/node/models/{model.stem}/load",
                json={"device_id": device_id, "wait": True},
                headers=agent.operator_headers(),
            )
            assert loaded.status_code == 200, loaded.text
        assert len(agent.children()) == 2
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda model: ask(http, model.stem), (tiny_model, tiny_model_b)))
        assert [(answer.status_code, answer.headers["x-node-device"]) for answer in answers] == [
            (200, "gpu:0"),
            (200, "gpu:1"),
        ]
        for device_id in ("gpu:0", "gpu:1"):
            assert "Vulkan0 model buffer size" in printed(agent, http, device_id)


def test_a_vulkan_device_with_a_build_and_variables_of_its_own_serves_beside_a_cpu(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path
) -> None:
    """The node's environment shows no Vulkan device: only the device's own does."""
    own = tmp_path / "bin" / "llama-server"
    own.parent.mkdir()
    own.symlink_to(llama_server)
    served = models(tiny_model, tiny_model_b)
    served[1] |= {"llama_server_bin": str(own), "env": {"MINE": "the model's"}}
    config = write_config(
        tmp_path,
        llama_server,
        served,
        backend="auto",
        devices=[
            {"device_id": "cpu:0"},
            {"device_id": "vulkan:0", "llama_server_bin": str(own), "env": {MASK: "0", "MINE": "the device's"}},
        ],
        **PATIENT,
    )
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=180, trust_env=False) as http:
        for device_id, model in (("cpu:0", tiny_model_b), ("vulkan:0", tiny_model)):
            body = {"device_id": device_id, "wait": True}
            path = f"/v1/node/models/{model.stem}/load"
            assert http.post(path, json=body, headers=agent.operator_headers()).status_code == 200
        assert ask(http, tiny_model.stem).headers["x-node-device"] == "vulkan:0"
        assert ask(http, tiny_model_b.stem).headers["x-node-device"] == "cpu:0"
        [on_cpu] = [child for child in agent.children() if "none" in child.cmdline()]
        [on_vulkan] = [child for child in agent.children() if "Vulkan0" in child.cmdline()]
        assert {on_cpu.cmdline()[0], on_vulkan.cmdline()[0]} == {str(own)}
        assert (on_cpu.environ()["MINE"], on_vulkan.environ()["MINE"]) == ("the model's", "the device's")
        assert (on_cpu.environ()[MASK], on_vulkan.environ()[MASK]) == ("", "0")
