"""The reference of all configuration keys as Markdown, generated from the JSON Schema. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from nodeagent.config.loading import json_schema

# The parts of a configuration, each with its heading.
_SECTIONS = (
    ("", "The node"),
    ("ModelConfig", "`models[]`"),
    ("LoraConfig", "`models[].loras[]`"),
    ("DeviceConfig", "`devices[]`"),
    ("ApiKeyConfig", "`api_keys[]`"),
    ("ActivityConfig", "`activity`"),
    ("RestartConfig", "`restart`, of the node or of one model"),
)
# A default that depends on the host or on another key: its description says which.
_COMPUTED = ("node_id", "node_name", "state_dir", "llama_server_startup_limit_s", "restart", "activity")


def markdown_reference() -> str:
    """Every key with its type, default and description: one table for each part of the configuration."""
    schema = json_schema()
    parts: list[str] = []
    for name, heading in _SECTIONS:
        part = schema["$defs"][name] if name else schema
        rows = [_row(key, value, part.get("required", ())) for key, value in part["properties"].items()]
        parts.append(
            "\n".join([f"### {heading}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def _row(key: str, schema: Mapping[str, Any], required: tuple[str, ...]) -> str:
    cells = (f"`{key}`", _type(schema, _unit(key)), _default(key, schema, required), schema["description"])
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _unit(key: str) -> str | None:
    """The unit that the key's name carries, None if it carries none."""
    if key.endswith("_s"):
        return "seconds"
    if key.endswith("_bytes"):
        return "bytes"
    return "tokens" if key in ("ctx_size", "batch_size", "ubatch_size") else None


def _type(schema: Mapping[str, Any], unit: str | None = None) -> str:
    """What a value may be, with its unit and bounds."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(_one_type(option, unit) for option in options))


def _one_type(schema: Mapping[str, Any], unit: str | None) -> str:
    if "$ref" in schema:
        return "mapping"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    match schema.get("type"):
        case "integer" | "number" as kind:
            return ", ".join([unit or kind, *_bounds(schema)])
        case "string":
            return "text"
        case "boolean":
            return "`true`, `false`"
        case "array":
            return f"list of {_type(schema['items'])}"
        case _:
            return "mapping"


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    if "exclusiveMinimum" in schema:
        yield f"more than {schema['exclusiveMinimum']:g}"
    if "minimum" in schema:
        yield f"at least {schema['minimum']:g}"
    if "maximum" in schema:
        yield f"at most {schema['maximum']:.17g}"


def _default(key: str, schema: Mapping[str, Any], required: tuple[str, ...]) -> str:
    if key in required:
        return "required"
    if key in _COMPUTED:
        return "see right"
    match schema.get("default"):
        case None:
            return "none"
        case bool(value):
            return f"`{str(value).lower()}`"
        case [] | {}:
            return "empty"
        case value:
            return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
