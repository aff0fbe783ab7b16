"""NVIDIA's library through its C interface: pynvml itself runs, with a small library in the place of the driver's.

The servers compute on the CPU; the prebuilt llama-server has no CUDA.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes import fake_nvml_library
from fakes.agent_process import running_agent, write_config

UUID = "GPU-c7b57be0-94ff-d352-a59b-d0ee00aeed43"
UUID_1 = "GPU-c7b57be1-94ff-d352-a59b-d0ee00aeed43"
NOT_SUPPORTED, VERSION_MISMATCH, GPU_IS_LOST = 3, 18, 15


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_nvml_library.build(tmp_path_factory.mktemp("nvml"))


class Driver:
    """The state of the driver; it is read at each call."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._file = folder / "nvml-state"
        self.say("gpus 2", "used 1000")
        self.env = {"LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML": str(self._file), "CUDA_VISIBLE_DEVICES": "0,1"}

    def say(self, *lines: str) -> None:
        """Replaced as a whole, since a call may read it at any time."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(self._file)


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> Driver:
    return Driver(library, tmp_path)


def devices(driver: Driver, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nodeagent", "devices", "--config", str(config), "--json"],
        env={**os.environ, **driver.env},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


def config_in(folder: Path, llama_server: Path, *models: Path) -> Path:
    served = [{"model_id": file.stem, "path": str(file)} for file in models]
    return write_config(folder, llama_server, served, backend="cuda", memory_settle_timeout_s=0.5)


def test_gpus_are_found_and_measured_through_the_real_binding(
    driver: Driver, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = devices(driver, config_in(tmp_path, llama_server, tiny_model))
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads(done.stdout)
    mib = 1 << 20
    assert {name: first[name] for name in ("device_id", "name", "backend", "index", "uuid", "pci_id")} == {
        "device_id": "gpu:0",
        "name": "NVIDIA L4",
        "backend": "cuda",
        "index": 0,
        "uuid": UUID,
        "pci_id": "0000:d1:00.0",
    }
    assert (second["uuid"], second["pci_id"]) == (UUID_1, "0000:d2:00.0")
    assert second["environment"]["CUDA_VISIBLE_DEVICES"] == UUID_1
    assert (first["memory_total_bytes"], first["memory_used_bytes"]) == (23034 * mib, 1000 * mib)
    assert first["memory_free_bytes"] == 22034 * mib
    assert (first["utilization_ratio"], first["temperature_celsius"], first["power_watts"]) == (0.37, 41.0, 16.54)


def test_a_value_that_a_gpu_does_not_have_is_unknown_and_a_lost_gpu_does_not_hide_the_others(
    driver: Driver, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    driver.say(
        "gpus 2",
        f"error nvmlDeviceGetPowerUsage {NOT_SUPPORTED}",
        f"error nvmlDeviceGetMemoryInfo {NOT_SUPPORTED} 1",
        f"error nvmlDeviceGetHandleByIndex_v2 {GPU_IS_LOST} 0",
    )
    done = devices(driver, config_in(tmp_path, llama_server, tiny_model))
    # With CUDA's own rule: the first entry of the mask that is not there hides the rest.
    assert done.returncode == 1
    assert "GPU 0 is ignored: NVML: GPU is lost" in done.stderr
    driver.env["CUDA_VISIBLE_DEVICES"] = "1"
    done = devices(driver, config_in(tmp_path, llama_server, tiny_model))
    [device] = json.loads(done.stdout)
    assert (device["device_id"], device["power_watts"], device["memory_total_bytes"]) == ("gpu:1", None, None)
    assert device["temperature_celsius"] == 41.0


def test_a_library_that_does_not_fit_its_driver_is_named(
    driver: Driver, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    driver.say("gpus 2", f"error nvmlInitWithFlags {VERSION_MISMATCH}")
    driver.env["PATH"] = str(Path(sys.executable).parent)  # no nvidia-smi
    done = devices(driver, config_in(tmp_path, llama_server, tiny_model))
    assert (done.returncode, done.stdout) == (1, "")
    why = "NVML: RM has detected an NVML/RM version mismatch.; nvidia-smi: not found"
    assert done.stderr == f"rolemesh-node-agent: backend cuda can't be used: {why}\n"


def test_a_build_that_can_not_use_the_gpus_of_the_host_is_named(
    driver: Driver, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    driver.env["GGML_VK_VISIBLE_DEVICES"] = ""
    config = write_config(tmp_path, llama_server, [{"model_id": "a", "path": str(tiny_model)}], backend="auto")
    done = devices(driver, config)
    assert [device["backend"] for device in json.loads(done.stdout)] == ["cpu"]
    why = f"{llama_server} lists no GPU here, although this host has NVIDIA L4, NVIDIA L4"
    assert f"WARNING devices.selection: using the CPU: {why}\n" in done.stderr


def test_a_driver_that_hangs_costs_readings_and_no_request(
    driver: Driver,
    llama_server: Path,
    tiny_model: Path,
    tiny_model_b: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**driver.env, "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    config = config_in(tmp_path, llama_server, tiny_model, tiny_model_b)
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:

        def ask(model: str) -> httpx.Response:
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
            return http.post("/v1/chat/completions", json=body)

        def metrics_once(wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                found: dict[str, Any] = http.get("/v1/node/inventory").json()["devices"][0]["metrics"]
                if wanted(found):
                    return found
                time.sleep(0.1)
            raise AssertionError(f"not within 30 s: {found}")

        assert metrics_once(lambda found: True)["memory_used_bytes"] == 1000 << 20
        driver.say("gpus 1", "used 2000", "hang nvmlDeviceGetUtilizationRates")
        # The interval is 2 s: a reading this old means that the next one hangs.
        metrics_once(lambda found: found["age_s"] > 3.0)
        for model in (tiny_model, tiny_model_b, tiny_model):
            assert ask(model.stem).status_code == 200
        driver.say("gpus 1", "used 2000")
        assert metrics_once(lambda found: found["memory_used_bytes"] == 2000 << 20)["utilization_ratio"] == 0.37
        [child] = agent.children()
        assert child.environ()["CUDA_VISIBLE_DEVICES"] == UUID
