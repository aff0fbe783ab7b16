"""llama-server's own fields and errors, on which its clients rely, through the agent as a process."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
CTX_SIZE = 256
LONG = "hello " * CTX_SIZE


@pytest.fixture(scope="module")
def agent(
    llama_server: Path,
    infill_model: Path,
    tiny_model: Path,
    embedder_model: Path,
    reranker_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AgentProcess]:
    greedy = {"temperature": 0}
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "ctx_size": CTX_SIZE, "default": True, "defaults": greedy},
        {"model_id": "filler", "path": str(infill_model), "ctx_size": 4096},
        {
            "model_id": "shifting",
            "path": str(tiny_model),
            "ctx_size": CTX_SIZE,
            "server_args": {"context_shift": True},
            "defaults": greedy,
        },
        {"model_id": "embedder", "path": str(embedder_model)},
        {"model_id": "reranker", "path": str(reranker_model)},
    ]
    keys: Any = {"max_models_per_device": 5, "max_pending_requests_per_device": 4}
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models, **keys)) as agent:
        yield agent


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:
        yield http


def posted(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer: httpx.Response) -> list[Any]:
    """The events of a stream that are JSON."""
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_completion_has_only_the_fields_that_are_asked_for(http: httpx.Client) -> None:
    fields = ["content", "generation_settings/n_predict", "tokens"]
    made = posted(http, "/completion", prompt="hello", n_predict=4, response_fields=fields, return_tokens=True)
    assert set(made) == set(fields)
    assert made["generation_settings/n_predict"] == 4
    assert [type(token) for token in made["tokens"]] == [int] * 4


def test_a_streamed_completion_is_that_of_the_whole_answer_and_tells_its_times_at_the_end(http: httpx.Client) -> None:
    whole = posted(http, "/completion", prompt="hello", n_predict=6, cache_prompt=False)
    body = {"prompt": "hello", "n_predict": 6, "cache_prompt": False, "stream": True}
    *pieces, last = events(http.post("/completion", json=body))
    assert "".join(piece["content"] for piece in [*pieces, last]) == whole["content"]
    assert not any(piece["stop"] for piece in pieces)
    assert (last["stop"], last["stop_type"], last["timings"]["predicted_n"]) == (True, "limit", 6)


def test_a_prompt_may_be_tokens_or_a_mixture_or_several_prompts(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"n_predict": 4, "cache_prompt": False}
    tokens = posted(http, "/tokenize", content="hello", add_special=True)["tokens"]
    by_text = posted(http, "/completion", prompt="hello", **asked)
    by_tokens = posted(http, "/completion", prompt=tokens, **asked)
    assert by_tokens["content"] == by_text["content"]
    assert posted(http, "/completion", prompt=[*tokens, " there", *tokens], **asked)["content"].strip()
    several = posted(http, "/completion", prompt=["hello", tokens], **asked)
    assert [one["content"] for one in sorted(several, key=lambda one: one["index"])] == [by_text["content"]] * 2


def test_what_is_cached_of_a_prompt_is_told(http: httpx.Client) -> None:
    prompt = "baba hugo " * 10
    fresh = posted(http, "/completion", prompt=prompt, n_predict=1, cache_prompt=False)["timings"]
    again = posted(http, "/completion", prompt=prompt, n_predict=1, cache_prompt=True)["timings"]
    assert fresh["cache_n"] == 0
    assert again["cache_n"] > again["prompt_n"]


def test_a_stop_word_ends_the_answer_before_it(http: httpx.Client) -> None:
    whole = posted(http, "/completion", prompt="hello", n_predict=8)["content"]
    word = whole.split()[3]
    stopped = posted(http, "/completion", prompt="hello", n_predict=8, stop=[word])
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == whole[: whole.index(word)]


def test_a_token_that_is_banned_is_not_said(http: httpx.Client) -> None:
    [first] = posted(http, "/completion", prompt="hello", n_predict=1, return_tokens=True)["tokens"]
    banned = posted(http, "/completion", prompt="hello", n_predict=1, return_tokens=True, logit_bias=[[first, False]])
    assert banned["tokens"] != [first]
    forced = posted(http, "/v1/chat/completions", messages=HELLO, max_tokens=3, logit_bias={str(first): 100})
    [said] = {*forced["choices"][0]["message"]["content"].split()}
    assert (
        said == posted(http, "/detokenize", tokens=[first])["content"].replace("\N{LOWER ONE EIGHTH BLOCK}", "").strip()
    )


def test_a_seed_brings_the_same_answer_again(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "n_predict": 12, "temperature": 2.0, "cache_prompt": False}
    first, again, other = (posted(http, "/completion", seed=seed, **asked)["content"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_stream_tells_the_times_of_each_token_and_the_progress_of_the_prompt(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "hugo baba"}],
        "max_tokens": 4,
        "stream": True,
        "timings_per_token": True,
        "return_progress": True,
        "stream_options": {"include_usage": True},
    }
    told = events(http.post("/v1/chat/completions", json=body))
    assert [event["timings"]["predicted_n"] for event in told if event.get("timings")][-1] == 4
    progress = [event["prompt_progress"] for event in told if "prompt_progress" in event]
    assert progress
    assert progress[-1]["processed"] == progress[-1]["total"]
    assert [event["usage"]["completion_tokens"] for event in told if event.get("usage")] == [4]


def test_tokens_come_with_their_text_and_with_those_of_the_beginning(http: httpx.Client) -> None:
    plain = posted(http, "/tokenize", content=" baba hé")["tokens"]
    pieces = posted(http, "/tokenize", content=" baba hé", with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == plain
    # What is no text by itself, as half of a character, is a list of bytes.
    data = b"".join(bytes(it["piece"]) if isinstance(it["piece"], list) else it["piece"].encode() for it in pieces)
    assert data.decode().replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip() == "baba hé"
    begun = posted(http, "/tokenize", content=" baba hé", add_special=True)["tokens"]
    assert begun == [1, *plain]


def test_a_template_is_applied_without_a_generation(http: httpx.Client) -> None:
    messages = [{"role": "system", "content": "be short"}, *HELLO]
    prompt = posted(http, "/apply-template", messages=messages)["prompt"]
    assert prompt == "system: be short\nuser: hello there\nassistant:"


def test_a_gap_is_filled(http: httpx.Client) -> None:
    gap: dict[str, Any] = {
        "model": "filler",
        "input_prefix": "def f():\n",
        "input_suffix": "return x\n",
        "prompt": "    x",
        "n_predict": 4,
    }
    filled = posted(http, "/infill", **gap)
    assert (filled["tokens_predicted"], filled["stop_type"]) == (4, "limit")
    extra = [{"filename": "a.py", "text": "x = 1\n"}]
    beside = posted(http, "/infill", **gap, input_extra=extra)
    assert beside["tokens_evaluated"] > filled["tokens_evaluated"]
    *_, last = events(http.post("/infill", json=gap | {"stream": True}))
    assert last["stop"]
    for wrong in ({"text": 3}, {"filename": 3, "text": "x"}):
        refused = http.post("/infill", json=gap | {"input_extra": [wrong]})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "field"),
    [("/completion", {"prompt": LONG}), ("/v1/completions", {"prompt": LONG}), ("/v1/chat/completions", None)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_the_clients_fault_and_the_sizes_are_told(
    http: httpx.Client, path: str, field: dict[str, Any] | None, stream: bool
) -> None:
    body = field or {"messages": [{"role": "user", "content": LONG}]}
    refused = http.post(path, json=body | {"stream": stream, "max_tokens": 4})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", CTX_SIZE)
    assert error["n_prompt_tokens"] > CTX_SIZE


def test_an_answer_ends_with_the_context_unless_that_is_shifted(http: httpx.Client) -> None:
    asked = {"prompt": "hello", "n_predict": 2 * CTX_SIZE}
    full = posted(http, "/completion", **asked)
    assert full["tokens_predicted"] < CTX_SIZE
    assert full["truncated"]
    shifted = posted(http, "/completion", model="shifting", **asked)
    assert (shifted["tokens_predicted"], shifted["truncated"]) == (2 * CTX_SIZE, True)


def test_an_embedding_is_as_asked_for(http: httpx.Client) -> None:
    asked = {"model": "embedder", "input": "one"}
    [plain] = posted(http, "/v1/embeddings", **asked, encoding_format="float")["data"]
    [packed] = posted(http, "/v1/embeddings", **asked, encoding_format="base64")["data"]
    data = base64.b64decode(packed["embedding"])
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(plain["embedding"], abs=1e-6)
    tokens = posted(http, "/tokenize", model="embedder", content="one", add_special=True)["tokens"]
    mixed = posted(http, "/v1/embeddings", model="embedder", input=["one", tokens])
    for item in mixed["data"]:
        assert item["embedding"] == pytest.approx(plain["embedding"], abs=1e-3)
    # The server's own format has no `data`.
    [own] = posted(http, "/embedding", model="embedder", content="one")
    assert own["embedding"][0] == pytest.approx(plain["embedding"], abs=1e-3)
    assert sum(number * number for number in plain["embedding"]) == pytest.approx(1.0, abs=1e-3)
    loud = posted(http, "/v1/embeddings", **asked, embd_normalize=-1)["data"][0]["embedding"]
    assert sum(number * number for number in loud) != pytest.approx(1.0, abs=1e-3)
    refused = http.post("/v1/embeddings", json=asked | {"encoding_format": "hex"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_documents_are_ranked_and_counted(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"model": "reranker", "query": "hello", "documents": ["baba", "hugo nora", "the end"]}
    ranked = posted(http, "/v1/rerank", **asked)
    assert {it["index"] for it in ranked["results"]} == {0, 1, 2}
    scores = [it["relevance_score"] for it in ranked["results"]]
    assert scores == sorted(scores, reverse=True)
    assert ranked["usage"]["prompt_tokens"] == ranked["usage"]["total_tokens"] > 0
    best = posted(http, "/v1/rerank", **asked, top_n=2)["results"]
    assert [it["index"] for it in best] == [it["index"] for it in ranked["results"]][:2]
    refused = http.post("/v1/rerank", json=asked | {"documents": []})
    assert refused.status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": [{"type": "function"}]},
        {"tools": 7},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [7]}]},
        {"grammar": 'root ::= "a"', "json_schema": {"type": "boolean"}},
        {"reasoning_format": "x"},
        {"response_format": {"type": "sound"}},
        {"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}},
        {"messages": [{"role": 123}]},
        {"messages": [{"role": "user", "content": "x"}, {}]},
        {"top_logprobs": 3},
        {"n": 100},
        {"seed": "x"},
    ],
)
def test_what_a_chat_may_not_ask_for_is_the_clients_fault(http: httpx.Client, wrong: dict[str, Any]) -> None:
    refused = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2} | wrong)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"]
