"""The tree in the docstring of `nodeagent.errors` is the tree of the classes."""

import ast
import re
from pathlib import Path

import nodeagent
from nodeagent import errors

ROOT = "NodeAgentError"


def drawn_tree() -> dict[str, str]:
    """Each class with its base, as drawn."""
    lines = (errors.__doc__ or "").splitlines()
    above: list[str] = []
    bases: dict[str, str] = {}
    for line in lines[lines.index(ROOT) :]:
        found = re.match(r"((?:│   |    )*)[├└]── (\w+)", line)
        if found:
            depth = len(found[1]) // 4
            above[depth:] = [found[2]]
            bases[found[2]] = above[depth - 1] if depth else ROOT
    return bases


def defined_tree() -> dict[str, str]:
    """Each class of the package that derives from the root, with its base."""
    bases = {}
    for path in sorted(Path(nodeagent.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.bases:
                bases[node.name] = ast.unparse(node.bases[0])
    found: dict[str, str] = {}
    while more := {name: base for name, base in bases.items() if base in {ROOT, *found} and name not in found}:
        found |= more
    return found


def test_the_tree_of_errors_names_exactly_the_classes_there_are() -> None:
    assert drawn_tree() == defined_tree()


def test_an_error_of_another_room_is_drawn_with_its_file() -> None:
    folder = Path(nodeagent.__file__).parent
    drawn = re.findall(r"── (\w+) .*\(([\w/]+\.py)\)", errors.__doc__ or "")
    assert {name for name, _path in drawn} == {name for name in drawn_tree() if not hasattr(errors, name)}
    for name, path in drawn:
        assert f"class {name}(" in (folder / path).read_text(encoding="utf-8")
