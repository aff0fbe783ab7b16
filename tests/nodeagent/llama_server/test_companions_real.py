"""The real llama-server takes the flags of the files beside a model, and uses the files."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fakes import tiny_families
from nodeagent.config import Dialect, ModelConfig
from nodeagent.devices.cpu import CpuBackend
from nodeagent.llama_server.binary_help import dialect_of
from nodeagent.llama_server.command_line import command


def test_the_installed_build_speaks_the_newest_dialect(llama_server: Path) -> None:
    assert dialect_of(str(llama_server)) == Dialect()
    assert dialect_of("/nowhere/llama-server") == Dialect()


@contextmanager
def serving(llama_server: Path, **keys: Any) -> Iterator[httpx.Client]:
    """A client of the model's server, started as the agent starts it."""
    backend = CpuBackend()
    model = ModelConfig.model_validate({"model_id": "m", **keys})
    run = command(model, backend.discover()[0], backend, llama_server, Path("/kv"), dialect_of)
    environment = os.environ | dict(run.env)
    with subprocess.Popen(run.argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, b"")
            address = next(found[1] for line in lines if (found := re.search(rb"listening on (http://\S+)", line)))
            with httpx.Client(base_url=address.decode(), timeout=60) as client:
                while client.get("/health").status_code != 200:
                    pass
                yield client
        finally:
            process.kill()


def test_a_draft_model_drafts(llama_server: Path, tiny_model: Path) -> None:
    with serving(llama_server, path=str(tiny_model), draft_model=str(tiny_model)) as client:
        asked = {"prompt": "Hello", "n_predict": 32, "temperature": 0}
        timings = client.post("/completion", json=asked).json()["timings"]
    assert timings["draft_n"] > 0


def test_loras_are_applied_with_their_scale(llama_server: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapter = str(tiny_families.write_adapter(tmp_path))
    loras = [adapter, {"path": adapter, "scale": 0.5}]
    with serving(llama_server, path=str(tiny_model), loras=loras) as client:
        assert [entry["scale"] for entry in client.get("/lora-adapters").json()] == [1.0, 0.5]
