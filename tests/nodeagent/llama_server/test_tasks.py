"""What a model is for, and the flags that its server gets for it."""

import pytest
from msgspec.structs import replace

from nodeagent.config import ModelConfig
from nodeagent.gguf.header import GgufHeader, Task
from nodeagent.llama_server.tasks import task_args, task_of

CHAT = GgufHeader(
    size_bytes=1,
    layers=1,
    ctx_train=4096,
    embedding_length=1,
)
EMBEDDER = replace(CHAT, task="embedding", pools=True)
RERANKER = replace(CHAT, task="rerank", pools=True)


def model(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate({"model_id": "m", "path": "/m.gguf", **keys})


@pytest.mark.parametrize(
    ("keys", "header", "task"),
    [
        ({}, CHAT, "chat"),
        ({}, EMBEDDER, "embedding"),
        ({}, RERANKER, "rerank"),
        ({}, None, None),
        ({"task": "embedding"}, CHAT, "embedding"),
        ({"task": "chat"}, EMBEDDER, "chat"),
        ({"task": "rerank"}, None, "rerank"),
        # Whoever writes the flags knows better.
        ({"server_args": {"embedding": True}}, CHAT, None),
        ({"server_args": {"reranking": True}}, CHAT, None),
        ({"server_args": {"embeddings": False}}, EMBEDDER, "embedding"),
    ],
)
def test_the_file_says_what_a_model_is_for_and_the_configuration_overrides_it(
    keys: dict[str, object], header: GgufHeader | None, task: Task | None
) -> None:
    assert task_of(model(**keys), header) == task


@pytest.mark.parametrize(
    ("keys", "header", "args"),
    [
        ({}, CHAT, ""),
        ({}, None, ""),
        ({}, EMBEDDER, "--embeddings -b 4096 -ub 4096"),
        ({}, RERANKER, "--rerank -b 4096 -ub 4096"),
        ({}, replace(EMBEDDER, ctx_train=40960), "--embeddings -b 8192 -ub 8192"),
        ({"ctx_size": 32768, "parallel": 2}, EMBEDDER, "--embeddings -b 16384 -ub 16384"),
        ({"ubatch_size": 512}, EMBEDDER, "--embeddings"),
        ({"server_args": {"ubatch_size": 512}}, EMBEDDER, "--embeddings"),
        ({"task": "embedding"}, CHAT, "--embeddings --pooling mean -b 4096 -ub 4096"),
        ({"task": "embedding", "server_args": {"pooling": "last"}}, CHAT, "--embeddings -b 4096 -ub 4096"),
        ({"task": "rerank"}, None, "--rerank"),
        ({"task": "rerank", "server_args": {"reranking": True}}, RERANKER, "-b 4096 -ub 4096"),
        ({"task": "chat"}, EMBEDDER, ""),
        ({"server_args": {"embeddings": True}}, EMBEDDER, ""),
    ],
)
def test_a_model_that_embeds_or_reranks_gets_the_flags_and_one_batch_for_its_context(
    keys: dict[str, object], header: GgufHeader | None, args: str
) -> None:
    assert " ".join(task_args(model(**keys), header)) == args
