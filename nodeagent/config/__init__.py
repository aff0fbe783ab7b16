"""The configuration: its keys, and reading them from a YAML file."""

from nodeagent.config.keys import DeviceConfig, ModelConfig, NodeConfig
from nodeagent.config.loading import (
    check_config,
    find_llama_server,
    host_problems,
    json_schema,
    load_config,
    located,
    missing_models,
    parse_config,
    read_token,
    with_keys,
)

__all__ = [
    "DeviceConfig",
    "ModelConfig",
    "NodeConfig",
    "check_config",
    "find_llama_server",
    "host_problems",
    "json_schema",
    "load_config",
    "located",
    "missing_models",
    "parse_config",
    "read_token",
    "with_keys",
]
