"""Reads one YAML document into plain values and remembers the line of each key.

Scalars follow the core schema of YAML 1.2: only `true` and `false` are booleans, so `on`, `off`, `yes` and `no` stay
words (llama-server has flags with such values), and `1:30` and `2026-11-23` stay text. From YAML 1.1 only the merge
key `<<` is kept, because several models often share their settings.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import yaml

from nodeagent.config.variables import expand
from nodeagent.errors import Problem

KeyPath = tuple[str | int, ...]

# Anchors can multiply a small file into an endless document; no real configuration comes near this many values.
_MAX_VALUES = 100_000

# Python refuses to read decimal numbers of more than 4300 digits; no key takes more than 19.
_MAX_DIGITS = 100

_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_NULL = "tag:yaml.org,2002:null"
_STR = "tag:yaml.org,2002:str"
_SEQ = "tag:yaml.org,2002:seq"
_MAP = "tag:yaml.org,2002:map"

# The regular expressions of the YAML 1.2.2 specification, section 10.3.2, with the characters they can start with.
_CORE_SCHEMA = {
    _BOOL: (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    _INT: (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    _FLOAT: (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        "-+.0123456789",
    ),
    _NULL: (re.compile(r"null|Null|NULL|~|"), "nN~\0"),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the resolvers of YAML 1.1 taken out."""

    yaml_implicit_resolvers = {}


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    # An empty plain scalar (`key:`) is looked up under "".
    _Loader.add_implicit_resolver(
        _tag, re.compile(rf"(?:{_pattern.pattern})\Z"), ["" if char == "\0" else char for char in _first]
    )


class Source(msgspec.Struct):
    """One file's text as values. `lines` has the line (from 1) of each key and list item, `problems` what is wrong,
    `warnings` what is not an error.

    `value` holds dicts with text keys, lists, text, numbers, booleans and None; it is None after a syntax error.
    """

    file: Path | None
    value: object = None
    lines: dict[KeyPath, int] = msgspec.field(default_factory=dict)
    problems: list[Problem] = msgspec.field(default_factory=list)
    warnings: list[Problem] = msgspec.field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.file.absolute().parent if self.file else Path.cwd()

    def line(self, path: KeyPath) -> int | None:
        """The line of that key, or of the nearest key around it; None for the file as a whole."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem at that key, with its file and line."""
        return Problem(message, where(path), self.file, self.line(path))


def where(path: KeyPath) -> str:
    """A key path as people write it, on one line whatever the keys hold: `models[0].ctx_size`."""
    text = "".join(f".{step}" if isinstance(step, str) and step.isprintable() else f"[{step!r}]" for step in path)
    return text.removeprefix(".")


def read_yaml(text: str, file: Path, environ: Mapping[str, str] = os.environ) -> Source:
    """Parse `text`, with references to variables replaced from `environ`.

    Never raises for its content: everything that is wrong is in `problems` of the result.
    """
    source = Source(file)
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            source.value = _Builder(source, environ).build(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        said = ", ".join(part for part in (error.context, error.problem) if part)
        source.problems.append(Problem(f"not valid YAML: {said}", file=file, line=line))
    except yaml.YAMLError as error:
        source.problems.append(Problem(f"not valid YAML: {' '.join(str(error).split())}", file=file))
    except RecursionError:
        source.problems.append(Problem("not usable: nested too deeply", file=file))
    return source


class _Builder:
    """Turns the nodes of one document into values. Writes the lines and problems of its `Source`."""

    def __init__(self, source: Source, environ: Mapping[str, str]) -> None:
        self._source = source
        self._environ = environ
        self._built = 0  # rises with every value
        self._open: set[int] = set()  # the nodes being built, by identity: an anchor may hold itself

    def build(self, node: yaml.Node, path: KeyPath) -> object:
        self._built += 1
        if self._built > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (_SEQ, _MAP):
            self._report(node, path, f"the tag {node.tag!r} is not known")
        with self._opened(node):
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)

    @contextmanager
    def _opened(self, node: yaml.Node) -> Iterator[None]:
        if id(node) in self._open:
            raise yaml.constructor.ConstructorError(None, None, "an anchor contains itself", node.start_mark)
        self._open.add(id(node))
        yield
        self._open.discard(id(node))

    def _report(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self._source.problems.append(Problem(message, where(path), self._source.file, _line(node)))

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> object:
        text = str(node.value)
        if "${" in text:
            node, text = self._expanded(node, path)
        if node.tag == _STR:
            if not _is_encodable(text):
                self._report(node, path, "holds a character that can't be encoded in UTF-8 (a lone surrogate)")
                return ""
            return text
        pattern = _CORE_SCHEMA.get(node.tag)
        if pattern is None or not pattern[0].fullmatch(text):
            self._report(node, path, f"the tag {node.tag!r} is not known for {text!r}")
            return text
        if node.tag == _BOOL:
            return text.lower() == "true"
        if node.tag == _INT:
            if len(text) > _MAX_DIGITS:
                self._report(node, path, f"a number of {len(text)} digits is too long")
                return 0
            # Base 0 reads 0o and 0x, but refuses the leading zeros that a decimal may have in YAML.
            return int(text, 0) if text[1:2] in ("o", "x") else int(text)
        if node.tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return None

    def _expanded(self, node: yaml.ScalarNode, path: KeyPath) -> tuple[yaml.ScalarNode, str]:
        """The scalar with its variables replaced; an unquoted one gets the type of what it then says."""
        try:
            text = expand(str(node.value), self._environ)
        except ValueError as error:
            self._report(node, path, str(error))
            return node, str(node.value)
        tag = _plain_tag(text) if node.style is None and node.tag == _STR else node.tag
        return yaml.ScalarNode(tag, text, node.start_mark, node.end_mark, node.style), text

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[object]:
        values: list[object] = []
        for index, item in enumerate(node.value):
            self._source.lines[*path, index] = _line(item)
            values.append(self.build(item, (*path, index)))
        return values

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        # What is merged in goes first, so that the mapping's own keys win.
        values = self._merged(node, path)
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._report(key_node, path, f"a key must be text, found {shown}")
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in first:
                self._report(key_node, here, f"given twice; the first is on line {first[key]}")
                continue
            first[key] = self._source.lines[here] = _line(key_node)
            values[key] = self.build(value_node, here)
        return values

    def _merged(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            if not _is_merge(key_node):
                continue
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            # Of several merged mappings the earlier wins.
            for part in reversed(merged):
                if isinstance(part, yaml.MappingNode):
                    with self._opened(part):
                        values.update(self._mapping(part, path))
                else:
                    self._report(part, path, "<< takes a mapping or a list of mappings")
        return values


def _plain_tag(text: str) -> str:
    """The tag of an unquoted scalar."""
    return next((tag for tag, (pattern, _first) in _CORE_SCHEMA.items() if pattern.fullmatch(text)), _STR)


def _is_encodable(text: str) -> bool:
    """Whether the text can be an argument, a file name or a header: a lone surrogate can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_merge(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "<<" and node.style is None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
