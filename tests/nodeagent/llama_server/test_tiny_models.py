"""The tiny models behave on the real llama-server as other tests expect."""

import hashlib
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from fakes import tiny_models


@asynccontextmanager
async def serving(binary: Path, model: Path, *options: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the real server with that model on the CPU; the server is killed at the end."""
    command: list[str | Path] = [
        binary,
        "-m",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "-np",
        "1",
        "-ngl",
        "0",
        "--threads",  # more wait for each other, busily, which takes long on a busy machine
        "1",
        "--no-ui",
        *options,
    ]
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"GGML_VK_VISIBLE_DEVICES": ""},
    )
    assert process.stderr is not None
    output = b""
    try:
        while (listening := re.search(rb"listening on (http://\S+)\n", output)) is None:
            chunk = await process.stderr.receive_some()
            assert chunk, output.decode()
            output += chunk
        async with httpx.AsyncClient(base_url=listening[1].decode(), timeout=30) as client:
            while (await client.get("/health")).status_code != 200:
                pass
            yield client
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()
            await process.stderr.aclose()


def chat(text: str, max_tokens: int, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **more}


# Nothing but the temperature shapes the odds here: every token that can be drawn will be.
WILD = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


async def test_an_answer_runs_to_max_tokens_with_any_sampler_and_is_the_same_each_time_when_greedy(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path
) -> None:
    said = []
    with trio.fail_after(60):
        for model in (tiny_model, tiny_model_b):
            async with serving(llama_server, model) as client:
                for more in (WILD, {"temperature": 0.0}, {"temperature": 0.0}):
                    answer = (await client.post("/v1/chat/completions", json=chat("Hello", 200, **more))).json()
                    assert answer["choices"][0]["finish_reason"] == "length"
                    assert answer["usage"]["completion_tokens"] == 200
                    said.append(answer["choices"][0]["message"]["content"])
    assert said[1] == said[2]
    assert said[4] == said[5]
    assert said[1] != said[4]


async def test_each_token_is_an_event_of_a_stream(llama_server: Path, tiny_model: Path) -> None:
    with trio.fail_after(60):
        async with serving(llama_server, tiny_model) as client:
            answer = await client.post("/v1/chat/completions", json=chat("Hello", 50, stream=True))
    assert answer.text.count('"content":" ') == 50
    assert answer.text.rstrip().endswith("data: [DONE]")


async def test_the_slow_model_generates_until_its_client_leaves(llama_server: Path, slow_model: Path) -> None:
    with trio.fail_after(60):
        async with serving(llama_server, slow_model) as client:
            with trio.move_on_after(3) as patience:
                await client.post("/v1/chat/completions", json=chat("Hello", 8000))
    assert patience.cancelled_caught


async def test_the_embedder_embeds_and_the_reranker_ranks(
    llama_server: Path, embedder_model: Path, reranker_model: Path
) -> None:
    with trio.fail_after(60):
        async with serving(llama_server, embedder_model, "--embeddings") as client:
            embedded = await client.post("/v1/embeddings", json={"input": ["one", "two"]})
            assert [len(entry["embedding"]) for entry in embedded.json()["data"]] == [64, 64]
        async with serving(llama_server, reranker_model, "--rerank") as client:
            ranked = await client.post("/v1/rerank", json={"query": "one", "documents": ["two", "three"]})
            assert {entry["index"] for entry in ranked.json()["results"]} == {0, 1}


@pytest.mark.parametrize("model", [tiny_models.TINY, tiny_models.TINY_B], ids=lambda model: model.name)
def test_the_same_shape_and_seed_give_the_same_file(model: tiny_models.TinyModel, tmp_path: Path) -> None:
    hashes = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        file = tiny_models.write_model(model, tmp_path / name)
        hashes.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(hashes) == 1
