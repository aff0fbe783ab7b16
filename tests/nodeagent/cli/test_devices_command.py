"""`rolemesh-node-agent devices`: the real command with the real llama-server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nodeagent.cli.devices import table

pytestmark = pytest.mark.real

MASK = "GGML_VK_VISIBLE_DEVICES"


def devices(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nodeagent", "devices", *argv],
        env={**os.environ, **env},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


@pytest.fixture
def config(llama_server: Path, tmp_path: Path) -> Path:
    """The model is not there: the command does not need it."""
    path = tmp_path / "node.yaml"
    path.write_text(f"llama_server_bin: {llama_server}\nmodels: [{{model_id: a, path: none.gguf}}]\n")
    return path


def test_programs_get_everything_of_each_device(config: Path) -> None:
    done = devices("--config", str(config), "--json", **{MASK: "0,0"})
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads(done.stdout)
    assert (first["device_id"], second["device_id"]) == ("gpu:0", "gpu:1")
    assert (first["backend"], first["index"], second["index"]) == ("vulkan", 0, 1)
    assert first["name"].startswith("llvmpipe")
    assert first["memory_total_bytes"] > 0
    assert [first[key] for key in ("uuid", "memory_free_bytes", "utilization_ratio", "integrated")] == [None] * 4
    assert first["environment"][MASK] == "0"
    assert first["arguments"] == ["--device", "Vulkan0"]


def test_people_get_a_table_and_the_reason_why_it_is_the_cpu(config: Path, llama_server: Path) -> None:
    done = devices("--config", str(config), **{MASK: ""})
    assert done.returncode == 0
    assert f"using the CPU: {llama_server} lists no GPU here" in done.stderr
    heads, cpu, _blank, _title, pin = done.stdout.splitlines()
    assert heads.split() == ["DEVICE", "NAME", "BACKEND", "INDEX", "UUID", "MEMORY", "FREE", "BUSY", "KIND"]
    assert cpu.startswith("cpu:0 ")
    assert cpu.count("GiB") == 2
    assert "%" in cpu
    assert pin.startswith("cpu:0:")
    assert f"{MASK}= " in pin
    assert pin.endswith("--device none")


def test_without_a_configuration_it_shows_what_the_default_settings_would_use(llama_server: Path) -> None:
    path = f"{llama_server.parent}:{os.environ['PATH']}"
    done = devices("--json", PATH=path, **{MASK: "0"})
    assert done.returncode == 0
    assert [device["backend"] for device in json.loads(done.stdout)] == ["vulkan"]


def test_a_wrong_configuration_and_a_missing_device_have_their_exit_codes(config: Path) -> None:
    config.write_text(config.read_text() + "devices: [{device_id: 'gpu:7'}]\n")
    done = devices("--config", str(config), **{MASK: "0"})
    assert (done.returncode, done.stdout) == (78, "")
    where = f"{config}:3: devices[0].device_id"
    assert done.stderr == f"{where}: the backend vulkan has no 'gpu:7' here; it has gpu:0\n"
    config.write_text("models: 3\n")
    assert devices("--config", str(config)).returncode == 78


def test_a_table_tells_integrated_from_discrete_and_names_a_card_by_uuid_or_address() -> None:
    row = {
        "device_id": "gpu:0",
        "name": "AMD Radeon 780M",
        "backend": "rocm",
        "index": 0,
        "uuid": None,
        "pci_id": "0000:c1:00.0",
        "integrated": True,
        "memory_total_bytes": 16 << 30,
        "memory_free_bytes": 3 << 30,
        "utilization_ratio": 0.256,
        "environment": {"ROCR_VISIBLE_DEVICES": "0"},
        "arguments": [],
    }
    shown = table([row, {**row, "device_id": "gpu:1", "uuid": "GPU-5", "integrated": False}]).splitlines()
    assert shown[1].split()[-7:] == ["0000:c1:00.0", "16.0", "GiB", "3.0", "GiB", "26%", "integrated"]
    assert shown[2].split()[-7:] == ["GPU-5", "16.0", "GiB", "3.0", "GiB", "26%", "discrete"]
    assert shown[-1].split() == ["gpu:1:", "ROCR_VISIBLE_DEVICES=0"]
