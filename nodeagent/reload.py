"""A changed configuration file: read again, compared, and merged with the keys that only a restart can change.

`Node.reload` applies the result.
"""

import logging
import ssl
from collections.abc import Mapping
from operator import attrgetter

import msgspec

from nodeagent.config import (
    ApiKeyConfig,
    NodeConfig,
    find_llama_server,
    guarding_keys,
    load_config,
    tls_context,
    with_keys,
)
from nodeagent.errors import ConfigError, Problem
from nodeagent.front.seam import Reloaded
from nodeagent.state_dir import write_certificate

logger = logging.getLogger(__name__)

# Running parts were built with these keys: a new value takes effect when the agent is restarted.
FIXED_KEYS = (
    "listen_host",
    "listen_port",
    "agent_check_port",
    "node_id",
    "node_name",
    "state_dir",
    "dispatcher_base_url",
    "dispatcher_token_file",
    "advertise_url",
    "heartbeat_interval_s",
    "llama_server_bin",
    "memory_settle_timeout_s",
    "memory_reserve_bytes",
    "max_request_bytes",
    "activity.max_records",
    "activity.path",
    "otlp_endpoint",
    "backend",
    "devices",
)
TLS_KEYS = ("tls_cert", "tls_key", "tls_client_ca")
_ACTIVITY = "activity."


class Again(msgspec.Struct, frozen=True):
    """What a reload reads: the configuration, its API keys by SHA-256, and its TLS."""

    config: NodeConfig
    keys: Mapping[str, ApiKeyConfig]
    tls: ssl.SSLContext | None


def read_again(config: NodeConfig) -> Again:
    """Read the file that this configuration came from and what it names, and look for the server's binary. Blocks on
    the disk; raises ConfigError."""
    if config.source.file is None:
        raise ConfigError([Problem("this configuration did not come from a file")])
    again = load_config(config.source.file)
    find_llama_server(again)
    if again.tls_cert is not None and config.tls_cert is not None:
        write_certificate(config.state_dir, again.tls_cert)
    return Again(again, guarding_keys(again), tls_context(again))


def compare(before: NodeConfig, after: NodeConfig) -> Reloaded:
    """What a reload from `before` to `after` changes."""
    old = {model.model_id: model for model in before.models}
    new = {model.model_id: model for model in after.models}
    return Reloaded(
        added=tuple(model_id for model_id in new if model_id not in old),
        changed=tuple(model_id for model_id in new if old.get(model_id, new[model_id]) != new[model_id]),
        removed=tuple(model_id for model_id in old if model_id not in new),
        needs_restart=tuple(key for key in _fixed(before, after) if attrgetter(key)(after) != attrgetter(key)(before)),
    )


def merge(before: NodeConfig, after: NodeConfig) -> NodeConfig:
    """`after`, with the keys that need a restart as they are in `before`."""
    fixed = {key: attrgetter(key)(before) for key in _fixed(before, after)}
    of_activity = {key.removeprefix(_ACTIVITY): fixed.pop(key) for key in [*fixed] if key.startswith(_ACTIVITY)}
    return with_keys(after, fixed | {"activity": after.activity.model_copy(update=of_activity)})


def _fixed(before: NodeConfig, after: NodeConfig) -> tuple[str, ...]:
    """The keys that a reload leaves as they are. Certificates may change, but not whether the address speaks TLS."""
    toggled = (before.tls_cert is None) != (after.tls_cert is None)
    return (*FIXED_KEYS, *TLS_KEYS) if toggled else FIXED_KEYS


def log_warnings(config: NodeConfig) -> None:
    """Log what the configuration's file has that is not an error, such as a key that no longer has any effect."""
    for warning in config.source.warnings:
        logger.warning("%s", warning)
