"""The estimates are what the real llama-server reports for models of every family."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fakes import tiny_families
from fakes.tiny_families import Family
from nodeagent.gguf.header import read_header
from nodeagent.gguf.memory import Settings, estimate

MIB = 2**20
# Each buffer is reported with two decimals.
ROUNDING_MIB = 0.006


@pytest.fixture(scope="module")
def reports(llama_server: Path) -> Any:
    """Load a model on the CPU with these flags; returns the MiB of all buffers of each kind, by its own account."""

    def report(model: Path, *flags: str) -> dict[str, list[float]]:
        own = [
            "-m",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--device",
            "none",
            "--no-warmup",
            "--fit",
            "off",
        ]
        process = subprocess.Popen(
            [llama_server, *own, "-lv", "4", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GGML_VK_VISIBLE_DEVICES": ""},
        )
        found: dict[str, list[float]] = {}
        with process:
            assert process.stderr is not None
            for line in process.stderr:
                if size := re.search(r"(model|KV|RS|compute) buffer size = +([\d.]+) MiB", line):
                    found.setdefault(size[1], []).append(float(size[2]))
                if "listening on" in line:
                    break
            process.kill()
        assert "compute" in found, "the model was not loaded"
        return found

    return report


CASES: list[tuple[list[str], dict[str, Any]]] = [
    (["-c", "5000", "-np", "3"], {"ctx_size": 5000, "parallel": 3}),
    (
        ["-c", "4096", "-np", "2", "-kvu", "--swa-full"],
        {"ctx_size": 4096, "parallel": 2, "unified": True, "swa_full": True},
    ),
    (["-c", "0", "-np", "1", "-ub", "128", "-ctk", "q8_0"], {"ctx_size": 0, "ubatch_size": 128, "cache_k": "q8_0"}),
]


@pytest.mark.parametrize("family", tiny_families.FAMILIES, ids=lambda family: family.name)
def test_the_cache_is_what_the_server_reports(reports: Any, family: Family, tmp_path: Path) -> None:
    model = tiny_families.write_family(family, tmp_path)
    header = read_header(model)
    for flags, settings in CASES:
        needed = estimate(header, Settings(**settings))
        assert needed is not None
        said = reports(model, *flags)
        caches = said.get("KV", []) + said.get("RS", [])
        assert abs(sum(caches) - needed.cache / MIB) <= ROUNDING_MIB * max(1, len(caches)), (flags, said)
        assert sum(said["compute"]) * 0.3 < needed.compute / MIB <= sum(said["compute"]) + 0.01, (flags, said)
        assert sum(said["model"]) <= needed.weights / MIB, (flags, said)


def test_a_real_models_memory_is_what_the_server_reports(reports: Any, smollm2: Path) -> None:
    header = read_header(smollm2)
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["-c", "8192", "-np", "4"], {"ctx_size": 8192, "parallel": 4}),
        (["-c", "8192", "-np", "1", "-fa", "off"], {"ctx_size": 8192, "flash_attn": False}),
    ]
    for flags, settings in cases:
        needed = estimate(header, Settings(**settings))
        assert needed is not None
        said = reports(smollm2, *flags)
        assert sum(said["KV"]) == needed.cache / MIB
        assert sum(said["compute"]) * 0.7 < needed.compute / MIB <= sum(said["compute"]), (flags, said)
        assert 0.9 * needed.weights / MIB < sum(said["model"]) <= needed.weights / MIB
