import resource
import subprocess
import sys

import pytest

from nodeagent.descriptors import in_use, limit, raise_limit


@pytest.mark.real
def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; from nodeagent.descriptors import raise_limit;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard));"
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    raised, soft = map(int, done.stdout.split())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert raised == soft == (10240 if hard == resource.RLIM_INFINITY else hard)


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (256, resource.RLIM_INFINITY, 10240),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10240),
    ],
)
def test_the_limit_in_effect(soft: int, hard: int, raised: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: sets.append(limits))
    assert raise_limit() == raised
    assert sets == ([(raised, hard)] if soft not in (raised, resource.RLIM_INFINITY) else [])


def test_a_limit_that_can_not_be_raised_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_kind: int, _limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert raise_limit() == 1024
    assert caplog.messages == ["the limit of file descriptors stays at 1024: not allowed to raise maximum limit"]


@pytest.mark.real
def test_the_descriptors_in_use_are_counted() -> None:
    before = in_use()
    with open("/dev/null"), open("/dev/null"):
        assert in_use() == before + 2
    assert in_use() == before
    assert before < limit()
