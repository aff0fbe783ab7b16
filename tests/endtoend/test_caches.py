"""Conversations keep their cache, as the real server reports it: on slots, on devices, across a switch of models."""

import time
from pathlib import Path
from typing import Any

import httpx

from fakes.agent_process import running_agent, write_config

RULES = "be kind and say little " * 12


class Conversation:
    """A conversation that grows by one turn with each question; all share a long system prompt."""

    def __init__(self, http: httpx.Client, model: str, topic: str) -> None:
        self._http = http
        self._model = model
        self._topic = topic
        self.messages: list[dict[str, str]] = [{"role": "system", "content": RULES}]
        self.device = ""

    def ask(self) -> tuple[int, int]:
        """Take one turn; return how many tokens of the prompt were cached, and how many it has."""
        self.messages.append({"role": "user", "content": f"{self._topic} {len(self.messages)} " * 6})
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self.messages,
            "max_tokens": 4,
            "temperature": 0,
        }
        answer = self._http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        self.messages.append({"role": "assistant", "content": said["choices"][0]["message"]["content"]})
        self.device = answer.headers["x-node-device"]
        usage = said["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def wait_until_idle(http: httpx.Client, timeout_s: float = 10.0) -> None:
    """Return once no request is in flight."""
    until = time.monotonic() + timeout_s
    while any(lane["in_flight"] for lane in http.get("/v1/node/queue").json()["lanes"]):
        assert time.monotonic() < until, "a request that was left is still in flight"
        time.sleep(0.02)


def test_a_conversation_continues_from_its_saved_cache_after_a_switch_of_models(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path
) -> None:
    models = [
        {"model_id": "kept", "path": str(tiny_model), "ctx_size": 4096, "keep_kv": True},
        {"model_id": "plain", "path": str(tiny_model_b), "ctx_size": 4096},
    ]
    config = write_config(tmp_path, llama_server, models)
    folder = tmp_path / "state" / "kv"
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        kept, plain = (Conversation(http, str(model["model_id"]), "the sea") for model in models)
        _, before = kept.ask()
        plain.ask()
        assert [path.stat().st_size > 0 for path in folder.iterdir()] == [True]
        assert folder.stat().st_mode & 0o777 == 0o700
        cached, prompt = kept.ask()
        assert before <= cached < prompt
        assert list(folder.iterdir()) == [], "used, and deleted"
        assert plain.ask()[0] == 0, "it has no keep_kv"
        # The same server again, with a truncated file, on which it would abort.
        [file] = folder.iterdir()
        file.write_bytes(file.read_bytes()[:-1])
        assert kept.ask()[0] == 0
    assert not folder.exists()


def test_each_of_two_conversations_that_take_turns_keeps_its_slot(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "ctx_size": 8192, "parallel": 2}]
    config = write_config(tmp_path, llama_server, models)
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        sea, sun = Conversation(http, "tiny", "the sea"), Conversation(http, "tiny", "the sun")
        before = {conversation: conversation.ask()[1] for conversation in (sea, sun)}
        for conversation in (sea, sun, sea, sun):
            cached, prompt = conversation.ask()
            assert cached >= before[conversation], "all of its last turn's prompt"
            before[conversation] = prompt


def test_a_conversation_returns_to_the_device_that_has_it_in_its_cache(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "ctx_size": 4096, "preload": False}]
    devices = [{"device_id": "cpu:0", "threads": 1}, {"device_id": "cpu:1", "threads": 1}]
    config = write_config(tmp_path, llama_server, models, devices=devices)
    with running_agent(config) as agent, httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        token = {"Authorization": f"Bearer {(tmp_path / 'state' / 'admin.token').read_text().strip()}"}
        for device in devices:
            answer = http.post("/v1/node/models/tiny/load", json={"device_id": device["device_id"]}, headers=token)
            assert answer.status_code == 200, answer.text
        sea, sun = Conversation(http, "tiny", "the sea"), Conversation(http, "tiny", "the sun")
        before = {sea: sea.ask()[1]}
        endless = {"model": "tiny", "messages": sea.messages, "max_tokens": 3000, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=endless) as busy:
            assert busy.headers["x-node-device"] == sea.device
            before[sun] = sun.ask()[1]  # meanwhile, so it begins on the other device
        assert sun.device != sea.device
        wait_until_idle(http)  # the agent has noticed that the stream was left
        devices_before = {sea: sea.device, sun: sun.device}
        for conversation in (sea, sun, sea, sun):
            cached, prompt = conversation.ask()
            assert conversation.device == devices_before[conversation]
            assert cached >= before[conversation], "all of its last turn's prompt"
            before[conversation] = prompt
