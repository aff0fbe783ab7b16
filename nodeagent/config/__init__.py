"""The configuration: its keys, reading them from a YAML file, and checking what they name on this host."""

from nodeagent.config.api_keys import ApiKeyConfig, Role
from nodeagent.config.help_flags import Dialect, parse_dialect, parse_help, unknown_to_binary
from nodeagent.config.host_checks import (
    check_config,
    default_llama_server,
    find_llama_server,
    guarding_keys,
    host_problems,
    located,
    missing_models,
    read_api_keys,
    read_token,
    require_extras,
)
from nodeagent.config.key_file import key_file, read_key_file
from nodeagent.config.keys import DeviceConfig, NodeConfig
from nodeagent.config.loading import json_schema, load_config, parse_config, with_keys
from nodeagent.config.model_keys import ModelConfig
from nodeagent.config.reference import markdown_reference
from nodeagent.config.tls import tls_context

__all__ = [
    "ApiKeyConfig",
    "DeviceConfig",
    "Dialect",
    "ModelConfig",
    "NodeConfig",
    "Role",
    "check_config",
    "default_llama_server",
    "find_llama_server",
    "guarding_keys",
    "host_problems",
    "json_schema",
    "key_file",
    "load_config",
    "located",
    "markdown_reference",
    "missing_models",
    "parse_config",
    "parse_dialect",
    "parse_help",
    "read_api_keys",
    "read_key_file",
    "read_token",
    "require_extras",
    "tls_context",
    "unknown_to_binary",
    "with_keys",
]
