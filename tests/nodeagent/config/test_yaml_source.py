import textwrap
from pathlib import Path

import pytest

from nodeagent.config.yaml_source import Source, read_yaml, where

FILE = Path("agent.yaml")


def read(text: str) -> Source:
    return read_yaml(textwrap.dedent(text), FILE)


def complaints(text: str) -> list[str]:
    return [str(problem) for problem in read(text).problems]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("'true'", "true"),
        ("", None),
        ("~", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-23", "2026-11-23"),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("=", "="),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("q8_0", "q8_0"),
        ("7B", "7B"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, meant: object) -> None:
    source = read(f"key: {written}\n")

    assert source.problems == []
    assert isinstance(source.value, dict)
    assert source.value == {"key": meant}
    assert type(source.value["key"]) is type(meant)


def test_every_key_and_item_knows_its_line() -> None:
    source = read(
        """\
        a: 1
        b:
          - c: 2
            d:
              e: 3
          - 4
        """
    )

    assert source.lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 0, "c"): 3,
        ("b", 0, "d"): 4,
        ("b", 0, "d", "e"): 5,
        ("b", 1): 6,
    }
    assert source.line(("b", 0, "d", "missing", "deeper")) == 4
    assert source.line(()) is None


def test_a_key_path_is_written_as_people_do() -> None:
    assert where(("models", 0, "server_args", "no-mmap")) == "models[0].server_args.no-mmap"
    assert where(("server_args", "two\nlines", "x")) == "server_args['two\\nlines'].x"
    assert where(()) == ""


def test_each_key_that_is_given_twice_is_named_with_both_lines_and_the_first_holds() -> None:
    text = """\
    a: 1
    b: {c: 1, c: 2}
    a: 2
    """

    assert complaints(text) == [
        "agent.yaml:2: b.c: given twice; the first is on line 2",
        "agent.yaml:3: a: given twice; the first is on line 1",
    ]
    assert read(text).value == {"a": 1, "b": {"c": 1}}


def test_a_merge_brings_keys_that_the_mapping_itself_and_earlier_merges_replace() -> None:
    source = read(
        """\
        - &one {a: 1, b: 1}
        - &two {b: 2, c: 2}
        - {<<: *one, b: 3}
        - {<<: [*one, *two]}
        """
    )

    assert source.problems == []
    assert isinstance(source.value, list)
    assert source.value[2:] == [{"a": 1, "b": 3}, {"a": 1, "b": 1, "c": 2}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,\nb: 2\n", "agent.yaml:3: not valid YAML"),
        ("a: b: c\n", "agent.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2\n", "agent.yaml:2: not valid YAML"),
        ("a: *nothing\n", "agent.yaml:1: not valid YAML: found undefined alias"),
        ("a: &x [*x]\n", "agent.yaml:1: not valid YAML: an anchor contains itself"),
        ("a: &x {<<: *x}\n", "agent.yaml:1: not valid YAML: an anchor contains itself"),
        ("a: 1\n---\nb: 2\n", "agent.yaml:2: not valid YAML: expected a single document"),
        ("a: \x01\n", "agent.yaml: not valid YAML: unacceptable character"),
        ("1: a\n", "agent.yaml:1: a key must be text, found 1"),
        ("? [a]\n: b\n", "agent.yaml:1: a key must be text, found a list or mapping"),
        ("a: !!python/object/apply:os.system [x]\n", "agent.yaml:1: a: the tag"),
        ("a: !mine x\n", "agent.yaml:1: a: the tag '!mine' is not known for 'x'"),
        ("a: !!int x\n", "agent.yaml:1: a: the tag 'tag:yaml.org,2002:int' is not known for 'x'"),
        ("a: {<<: 5}\n", "agent.yaml:1: a: << takes a mapping or a list of mappings"),
        (f"a: {'9' * 5000}\n", "agent.yaml:1: a: a number of 5000 digits is too long"),
        ("[" * 1000, "agent.yaml: not usable: nested too deeply"),
    ],
)
def test_what_can_not_be_read_is_one_line_with_its_place(text: str, said: str) -> None:
    [complaint] = complaints(text)

    assert complaint.startswith(said)
    assert "\n" not in complaint


def test_anchors_can_not_blow_a_small_file_up() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"

    [complaint] = complaints(bomb)

    assert "too many values" in complaint


def test_an_empty_document_is_no_value_and_no_problem() -> None:
    source = read("# only a comment\n")

    assert (source.value, source.problems) == (None, [])
