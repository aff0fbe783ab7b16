"""Faults done to real processes, many times. `--faults-full` runs the whole of each count; without it, a tenth."""

from collections.abc import Callable, Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-full", action="store_true", help="run every fault as often as the guarantees were shown")


@pytest.fixture(scope="session", autouse=True)
def _agents_without_coverage() -> Iterator[None]:
    """What is measured here is time and memory, which coverage in the agents would change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often to do what is to be done `whole` times."""
    full = request.config.getoption("--faults-full")
    return lambda whole: whole if full else max(1, whole // 10)


@pytest.fixture
def show(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure that was seen, past pytest's capture."""

    def print_figure(text: str) -> None:
        record_property("figure", text)
        with capsys.disabled():
            print(f"\n  [figure] {text}")

    return print_figure
