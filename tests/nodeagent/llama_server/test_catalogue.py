"""What is known of the model files: whether they can be read."""

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from nodeagent.config import ModelConfig
from nodeagent.gguf.header import GgufError, GgufHeader
from nodeagent.llama_server.catalogue import Catalogue

GIB = 2**30


def header(size_bytes: int) -> GgufHeader:
    return GgufHeader(size_bytes=size_bytes, layers=64, ctx_train=262_144, embedding_length=8192)


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(model_id="large", path=Path("large.gguf"), **keys)


async def test_a_problem_is_logged_once_and_gone_when_the_file_is_repaired(caplog: pytest.LogCaptureFixture) -> None:
    broken: set[str] = set()

    def read(path: Path) -> GgufHeader:
        if path.name in broken:
            raise GgufError(path, "truncated")
        return header(1 * GIB)

    catalogue = Catalogue(read=read)
    with trio.fail_after(5):
        assert (catalogue.header("large"), catalogue.problem("large")) == (None, None)
        broken.add("large.gguf")
        await catalogue.inspect_all([model()])
        assert (catalogue.header("large"), catalogue.problem("large")) == (None, "large.gguf: truncated")
        assert caplog.messages == [
            "model large can't be loaded: large.gguf: truncated; the file is checked again with each load"
        ]
        broken.clear()
        assert await catalogue.inspect(model()) is None
        assert (catalogue.header("large"), catalogue.problem("large")) == (header(1 * GIB), None)
        broken.add("large.gguf")
        assert await catalogue.inspect(model()) == "large.gguf: truncated"
        assert catalogue.header("large") == header(1 * GIB), "as it was last read"


async def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    with trio.fail_after(5):
        problem = await Catalogue().inspect(ModelConfig(model_id="m", path=tmp_path / "m.gguf"))
    assert problem == f"{tmp_path / 'm.gguf'}: no such file"


async def test_a_mount_that_hangs_affects_only_its_own_models(caplog: pytest.LogCaptureFixture) -> None:
    hangs = threading.Event()

    def read(path: Path) -> GgufHeader:
        if path.is_relative_to("/mnt"):
            hangs.wait()
        return header(1 * GIB)

    catalogue = Catalogue(read=read, patience_s=0.2)
    lost = [ModelConfig(model_id=f"lost-{number}", path=Path(f"/mnt/{number}.gguf")) for number in range(12)]
    try:
        with trio.fail_after(5):
            began = trio.current_time()
            await catalogue.inspect_all([model(), *lost])
            assert trio.current_time() - began < 2  # not one after the other
            assert catalogue.problem("large") is None
            assert catalogue.problem("lost-11") == "/mnt/11.gguf: could not be read within 0.2 s"
            assert caplog.text.count("could not be read within") == 12
            for _ in range(4):  # and those that hang do not use up all threads
                await catalogue.inspect_all(lost)
            assert await trio.to_thread.run_sync(lambda: "free") == "free"
    finally:
        hangs.set()
    with trio.fail_after(5):
        assert await catalogue.inspect(lost[0]) is None
