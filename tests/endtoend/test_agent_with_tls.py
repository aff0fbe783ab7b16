"""The agent as a process with TLS: clients, commands, a new certificate."""

import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import trustme

from fakes.agent_process import running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


def write_certificate(authority: trustme.CA, folder: Path) -> None:
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "node.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "node.pem")


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def command(config: Path, *argv: str) -> str:
    argv = (sys.executable, "-m", "nodeagent", *argv, "--config", str(config))
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


def test_clients_and_commands_use_tls_and_a_reload_brings_a_new_certificate(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    first, second = trustme.CA(), trustme.CA()
    write_certificate(first, tmp_path)
    files = {"tls_cert": str(tmp_path / "node.pem"), "tls_key": str(tmp_path / "node.key")}
    models = [{"model_id": "chat", "path": str(tiny_model)}]
    config = write_config(tmp_path, llama_server, models, **files)
    with running_agent(config) as agent:
        assert agent.base_url.startswith("https://127.0.0.1:")
        with (
            openai.DefaultHttpxClient(verify=trusting(first), trust_env=False) as http,
            openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", http_client=http) as client,
        ):
            events = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4, stream=True)
            assert list(events)[-1].choices[0].finish_reason in ("length", "stop")
        assert "chat" in command(config, "status")
        write_certificate(second, tmp_path)
        command(config, "reload")
        with httpx.Client(verify=trusting(second), trust_env=False) as later:
            until = time.monotonic() + 10
            while True:
                try:
                    assert later.get(f"{agent.base_url}/readyz").status_code == 200
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < until
        assert "chat" in command(config, "status")
        assert command(config, "check-config")
