"""Whether a server has the context that was asked for."""

from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import ModelConfig
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.context import shrunk

HEADER = GgufHeader(size_bytes=1, layers=1, ctx_train=32_768, embedding_length=1)


@pytest.mark.parametrize(
    ("keys", "slot_ctx_size", "wanted"),
    [
        ({}, 4096, None),
        ({"ctx_size": 8192}, 8192, None),
        ({"ctx_size": 8192}, 4096, 8192),
        ({"server_args": {"c": 8192}}, 4096, 8192),
        ({"ctx_size": 8192, "parallel": 2}, 4096, None),
        ({"ctx_size": 8192, "parallel": 2}, 2048, 4096),
        ({"ctx_size": 8192, "parallel": 2, "server_args": {"kvu": True}}, 4096, 8192),
        ({"ctx_size": 5000, "parallel": 3}, 1792, None),
        ({"ctx_size": 0}, 32_768, None),
        ({"ctx_size": 0}, 8192, 32_768),
    ],
    ids=str,
)
def test_a_slot_with_less_than_its_part_of_what_was_asked_for_is_told(
    keys: dict[str, Any], slot_ctx_size: int, wanted: int | None
) -> None:
    model = ModelConfig.model_validate({"model_id": "m", "path": "/m.gguf", **keys})
    said = shrunk(model, HEADER, slot_ctx_size)
    why = "llama-server fitted it to the memory"
    expected = f"each slot has {slot_ctx_size} tokens of context, and {wanted} were asked for: {why}"
    assert said == (expected if wanted is not None else None)


def test_a_context_that_is_longer_than_the_models_training_is_cut_by_llama_server() -> None:
    model = ModelConfig(model_id="m", path=Path("/m.gguf"), ctx_size=65_536)
    said = shrunk(model, HEADER, 32_768)
    assert said is not None
    assert said.endswith("32768 tokens of context, and 65536 were asked for: the model was trained for no more")
