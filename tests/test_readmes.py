"""The READMEs name files, functions and commands that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "node_modules") for part in path.relative_to(ROOT).parts)
)
NODE_README = ROOT / "nodeagent" / "README.md"

_FILE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)`")
_FILE_THEN_NAME = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)`\s+`([A-Za-z_][A-Za-z_0-9.]*)`")
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")


def defined(path: Path) -> set[str]:
    """The names defined at the top of a module, and the methods of its classes as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (it for it in node.body if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def found(name: str, beside: Path) -> Path | None:
    """The file that a README means: from the repository's root, from its own folder, from that folder's tests, or from
    `nodeagent/`."""
    own_tests = ROOT / "tests" / beside.parent.relative_to(ROOT)
    candidates = (ROOT / name, beside.parent / name, own_tests / name, ROOT / "nodeagent" / name)
    return next((path for path in candidates if path.exists()), None)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_readme_names_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    names = {*_FILE.findall(text), *_LINK.findall(text)}
    missing = sorted(name for name in names if found(name, readme) is None)
    assert missing == []


def test_every_function_of_the_walks_exists_in_the_file_named_before_it() -> None:
    pairs = _FILE_THEN_NAME.findall(NODE_README.read_text(encoding="utf-8"))
    assert len(pairs) >= 25
    wrong = []
    for file, name in pairs:
        path = found(file, NODE_README)
        if path is None or name not in defined(path):
            wrong.append(f"{file} has no {name}")
    assert wrong == []


def test_a_name_that_does_not_exist_is_found() -> None:
    assert "Lane.submit" in defined(ROOT / "nodeagent/scheduling/lane.py")
    assert "Lane.no_such_method" not in defined(ROOT / "nodeagent/scheduling/lane.py")
    assert found("front/no_such_file.py", NODE_README) is None
