"""`devices`: what the agent would run servers on here, and how it would keep them there. No agent needs to run."""

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from nodeagent import logs
from nodeagent.cli.operations import columns, gib
from nodeagent.cli.subcommand import add_subcommand
from nodeagent.config import NodeConfig, default_llama_server, find_llama_server, load_config, located
from nodeagent.devices.backend import Backend, Build
from nodeagent.devices.limits import own_cpus
from nodeagent.devices.selection import devices_of, select
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import ConfigError

# Utilisation and power are differences between two readings.
_BETWEEN_READINGS_S = 0.5


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_subcommand(
        commands,
        "devices",
        "show the devices of this host, and what keeps a server to each",
        show_devices,
        config="the devices and llama-server of this configuration (default: those of the default settings)",
    )
    parser.add_argument("--json", action="store_true", help="everything that is known of each, for programs")


def show_devices(args: argparse.Namespace) -> int:
    config = load_config(args.config) if args.config is not None else None
    try:
        with closing(logs.configure("human", args.log_level)), closing(_backend(config)) as backend:
            found = devices_of(backend, config.devices if config is not None else (), own_cpus())
            rows = described(backend, found)
    except ConfigError as error:
        raise ConfigError(located(config, error.problems) if config is not None else error.problems) from error
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


def _backend(config: NodeConfig | None) -> Backend:
    if config is not None:
        return select(config.backend, config.devices, Build(find_llama_server(config)))
    return select("auto", (), Build(Path(default_llama_server() or "llama-server")))


def described(backend: Backend, devices: list[DeviceRef]) -> list[dict[str, Any]]:
    """What is known of each device, as JSON; None is unknown. Blocks for the time between two readings."""
    for device in devices:
        backend.read(device, time.monotonic())
    time.sleep(_BETWEEN_READINGS_S)
    return [_described(backend, device) for device in devices]


def _described(backend: Backend, device: DeviceRef) -> dict[str, Any]:
    now = time.monotonic()
    reading = backend.read(device, now)
    return {
        "device_id": device.device_id,
        "name": device.name,
        "backend": device.backend,
        "index": device.index,
        "uuid": device.uuid,
        "pci_id": device.pci_id,
        "integrated": device.integrated,
        "memory_total_bytes": device.memory_total_bytes,
        "memory_used_bytes": reading.memory_used_bytes,
        "memory_free_bytes": reading.memory_free_bytes,
        "utilization_ratio": reading.utilization_ratio,
        "temperature_celsius": reading.temperature_celsius,
        "power_watts": reading.power_watts,
        "age_s": round(now - reading.measured_at, 3),
        "environment": dict(backend.child_env(device)),
        "arguments": list(backend.child_args(device)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The same for people; `-` is unknown."""
    cells = [("DEVICE", "NAME", "BACKEND", "INDEX", "UUID", "MEMORY", "FREE", "BUSY", "KIND")]
    cells += [
        (
            row["device_id"],
            row["name"],
            row["backend"],
            str(row["index"]),
            row["uuid"] or row["pci_id"] or "-",
            gib(row["memory_total_bytes"]),
            gib(row["memory_free_bytes"]),
            "-" if row["utilization_ratio"] is None else f"{row['utilization_ratio']:.0%}",
            _KINDS[row["integrated"]],
        )
        for row in rows
    ]
    pins = [(f"{row['device_id']}:", _pinned(row["environment"], row["arguments"])) for row in rows]
    return f"{columns(cells)}\n\nWhat keeps a server to its device:\n{columns(pins)}"


_KINDS: Mapping[bool | None, str] = {True: "integrated", False: "discrete", None: "-"}


def _pinned(environment: dict[str, str], arguments: list[str]) -> str:
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), *arguments])
