"""CI's floor for the coverage of each file."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "coverage_floor.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_floor", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


floor = loaded()


def test_a_file_under_the_floor_fails_unless_it_is_excused() -> None:
    percents = {"a.py": 84.9, "b.py": 85.0, "c.py": 10.0}
    assert floor.below_floor(percents, {"c.py": "needs a GPU"}) == [
        "a.py: 84.9 % is under 85 %: test it, or say in EXCUSED why not"
    ]


def test_an_excuse_for_a_file_that_is_not_there_fails() -> None:
    assert floor.below_floor({"a.py": 100.0}, {"b.py": "gone"}) == ["b.py is excused, but there is no such file"]


@pytest.mark.parametrize(("percents", "code"), [({"a.py": 84.0}, 1), ({}, 1), ({"a.py": 99.0}, 0)])
def test_the_exit_code_says_whether_ci_fails(
    percents: dict[str, float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "EXCUSED", {})
    report = tmp_path / "coverage.json"
    files = {file: {"summary": {"percent_covered": percent}} for file, percent in percents.items()}
    report.write_text(json.dumps({"files": files}))
    assert floor.main(report) == code


def test_each_excuse_has_a_reason_and_a_file() -> None:
    root = SCRIPT.parent.parent
    assert [file for file, reason in floor.EXCUSED.items() if not reason or not (root / file).is_file()] == []
