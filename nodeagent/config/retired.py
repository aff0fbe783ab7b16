"""Keys of earlier versions: they are ignored with a warning, so that an upgrade does not stop a node. Pure."""

from collections.abc import Mapping

from nodeagent.config.yaml_source import KeyPath

# A key of the node -> what to do about it.
_RETIRED: Mapping[str, str] = {
    "residency_linger_s": "no longer has any effect; remove it",
}


def without_retired(document: Mapping[str, object]) -> tuple[dict[str, object], list[tuple[KeyPath, str]]]:
    """The document without retired keys, and for each one that it had its path and a message."""
    kept = {key: value for key, value in document.items() if key not in _RETIRED}
    found: list[tuple[KeyPath, str]] = [((key,), _RETIRED[key]) for key in document if key in _RETIRED]
    return kept, found
