"""The configuration: its keys, reading them from a YAML file, and checking what they name on this host."""

from nodeagent.config.help_flags import Dialect, parse_dialect, parse_help, unknown_to_binary
from nodeagent.config.host_checks import (
    check_config,
    default_llama_server,
    find_llama_server,
    host_problems,
    located,
    missing_models,
    read_token,
)
from nodeagent.config.keys import DeviceConfig, ModelConfig, NodeConfig
from nodeagent.config.loading import json_schema, load_config, parse_config, with_keys
from nodeagent.config.reference import markdown_reference

__all__ = [
    "DeviceConfig",
    "Dialect",
    "ModelConfig",
    "NodeConfig",
    "check_config",
    "default_llama_server",
    "find_llama_server",
    "host_problems",
    "json_schema",
    "load_config",
    "located",
    "markdown_reference",
    "missing_models",
    "parse_config",
    "parse_dialect",
    "parse_help",
    "read_token",
    "unknown_to_binary",
    "with_keys",
]
