"""Rules of this code base that no linter knows, checked in the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("nodeagent", "supervisor") for path in (ROOT / package).rglob("*.py"))


def unnamed_tasks(source: str) -> Iterator[int]:
    """The line of each call that starts a task in a nursery without a name for it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="start_soon"), keywords=keywords):
                named = keywords
            case ast.Call(func=ast.Attribute(value=nursery, attr="start"), keywords=keywords):
                if not ast.unparse(nursery).endswith("nursery"):  # a thread, or a child of the supervisor
                    continue
                named = keywords
            case _:
                continue
        if "name" not in {keyword.arg for keyword in named}:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_task_has_a_name(path: Path) -> None:
    """A traceback, and a look at a running agent, then say which task it is."""
    lines = list(unnamed_tasks(path.read_text(encoding="utf-8")))
    assert lines == [], f"give these tasks a name: {path.relative_to(ROOT)}, lines {lines}"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("nursery.start_soon(run, 1)", False),
        ("self._nursery.start_soon(run)", False),
        ("await nursery.start(run)", False),
        ("await self._nursery.start(partial(run, name='x'))", False),
        ("nursery.start_soon(run, 1, name='run')", True),
        ("await nursery.start(run, name=f'run {x}')", True),
        ("thread.start()", True),
        ("await supervisor.start(spec)", True),
    ],
)
def test_a_task_without_a_name_is_found(call: str, named: bool) -> None:
    assert list(unnamed_tasks(f"async def main():\n    {call}\n")) == ([] if named else [2])
