"""What the front's README says is what there is."""

import re
from pathlib import Path
from typing import Any, cast

from nodeagent.front import error_table
from nodeagent.front.app import create_app
from nodeagent.front.error_table import README, markdown_table, with_table
from nodeagent.front.refusals import REFUSALS
from nodeagent.front.seam import Node

COMMAND = "python -m nodeagent.front.error_table"
TEXT = README.read_text(encoding="utf-8")


class NoNode:
    """What `create_app` needs to make the routes."""

    max_request_bytes = 1
    scheduler: Any = None


def test_the_table_of_errors_is_fresh() -> None:
    assert COMMAND in TEXT
    assert COMMAND in (error_table.__doc__ or "")
    assert with_table(TEXT) == TEXT, f"run {COMMAND}"


def test_the_table_has_a_row_of_six_cells_for_each_error() -> None:
    rows = markdown_table().splitlines()[2:]
    assert len(rows) >= len(REFUSALS)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    statuses = [int(row.split("|")[1]) for row in rows]
    assert statuses == sorted(statuses)


def test_an_old_table_is_replaced_and_the_rest_of_the_readme_stays() -> None:
    old = "before\n<!-- errors: begin -->\n| old |\n<!-- errors: end -->\nafter\n"
    new = with_table(old)
    assert new == f"before\n<!-- errors: begin -->\n{markdown_table()}<!-- errors: end -->\nafter\n"
    assert with_table(new) == new


def test_the_routes_are_those_of_the_application() -> None:
    written = set(re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) /[^`]*)` \|", TEXT, re.MULTILINE))
    rules = create_app(cast(Node, NoNode())).url_map.iter_rules()
    there = {f"{method} {rule.rule}" for rule in rules for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    assert written == there


def test_the_files_are_those_of_the_room() -> None:
    written = re.findall(r"^\| `(\w+\.py)` \|", TEXT, re.MULTILINE)
    assert sorted(written) == sorted(path.name for path in README.parent.glob("*.py") if path.name != "__init__.py")


def test_each_test_that_is_named_exists() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXT)
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in tests] == []
