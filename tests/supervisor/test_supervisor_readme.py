"""What `supervisor/README.md` says is so: its snippet runs, its tests exist, its tables are complete."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.lifecycle import Cause
from supervisor.snapshot import ChildState

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "supervisor" / "README.md").read_text(encoding="utf-8")
TESTS_NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(title: str) -> set[str]:
    return set(re.findall(r"^\| `([\w.]+)`[^|]*\|", section(title), re.MULTILINE))


@pytest.mark.real
def test_its_snippet_runs() -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", snippet], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"^\w+", ended.stdout, re.MULTILINE) == ["Started", "Ready", "Stopping", "Exited", "Stopped"]


@pytest.mark.parametrize(("path", "name"), TESTS_NAMED)
def test_a_test_that_it_names_exists(path: str, name: str) -> None:
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions


def test_every_promise_names_a_test() -> None:
    rows = section("The promises, and the tests that show them").split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == len(TESTS_NAMED) >= 20


def test_its_tables_have_every_state_cause_and_file() -> None:
    states = {state.value for state in ChildState}
    assert first_column("The states of a child") == states | set(Cause)
    files = {path.name for path in (ROOT / "supervisor").glob("*.py")} - {"__init__.py"}
    assert first_column("The files") == files
