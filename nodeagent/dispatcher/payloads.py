"""Builds the payloads from a snapshot of the node. Pure, but for the time of sending."""

from datetime import UTC, datetime, timedelta
from typing import Any

from nodeagent.dispatcher import wire
from nodeagent.errors import with_last_lines
from nodeagent.scheduling.seam import ServerState, ServerView
from nodeagent.status import DeviceFit, DeviceStatus, ModelStatus, NodeSnapshot


def register(node: NodeSnapshot) -> wire.Register:
    return wire.Register(
        **_identity(node),
        devices=[wire.RegisteredDevice(**_device_facts(device)) for device in node.devices],
        models=[wire.RegisteredModel(**_model_facts(model)) for model in node.models],
    )


def heartbeat(node: NodeSnapshot, sequence: int) -> wire.Heartbeat:
    sent_at = datetime.now(UTC)
    return wire.Heartbeat(
        node_id=node.node_id,
        incarnation=node.incarnation,
        sequence=sequence,
        sent_at=sent_at,
        status=node.state.status.value,
        reasons=list(node.state.reasons),
        reason_codes=[code.value for code in node.state.reason_codes],
        devices=[wire.DeviceState(**_device_state(device, node.now, sent_at)) for device in node.devices],
        models=[wire.ModelState(**_model_state(node, model)) for model in node.models],
    )


def inventory(node: NodeSnapshot, *, for_operators: bool = False) -> wire.Inventory:
    """With `for_operators` the reasons of servers that ended have the last lines that these printed."""
    sent_at = datetime.now(UTC)
    devices = [
        wire.InventoryDevice(
            **_device_facts(device) | _device_state(device, node.now, sent_at, for_operators=for_operators),
            pci_id=device.ref.pci_id,
            integrated=device.ref.integrated,
            threads=device.ref.threads,
            cpus=sorted(device.ref.cpus) if device.ref.cpus is not None else None,
        )
        for device in node.devices
    ]
    models = [
        wire.InventoryModel(
            **_model_facts(model) | _model_state(node, model),
            path=model.path,
            arguments=list(model.arguments),
            problem=model.problem,
            fits=[wire.Fit(**_fit(fit)) for fit in model.fits],
        )
        for model in node.models
    ]
    return wire.Inventory(
        **_identity(node),
        sent_at=sent_at,
        status=node.state.status.value,
        reasons=list(node.state.reasons),
        reason_codes=[code.value for code in node.state.reason_codes],
        devices=devices,
        models=models,
    )


def _identity(node: NodeSnapshot) -> dict[str, Any]:
    return {
        "node_id": node.node_id,
        "node_name": node.node_name,
        "base_url": node.base_url,
        "agent_version": node.agent_version,
        "incarnation": node.incarnation,
        "started_at": node.started_at,
        "heartbeat_interval_s": node.heartbeat_interval_s,
        "roles": sorted({role for model in node.models for role in model.roles}),
    }


def _device_facts(device: DeviceStatus) -> dict[str, Any]:
    ref = device.ref
    return {
        "device_id": ref.device_id,
        "uuid": ref.uuid,
        "name": ref.name,
        "backend": ref.backend,
        "memory_total_bytes": ref.memory_total_bytes,
    }


def _device_state(
    device: DeviceStatus, now: float, sent_at: datetime, *, for_operators: bool = False
) -> dict[str, Any]:
    return {
        "device_id": device.ref.device_id,
        "metrics": _metrics(device, now),
        "lane": wire.LaneLoad(
            in_flight=device.lane.in_flight,
            waiting=device.lane.waiting,
            limit=device.lane.limit,
            free=device.lane.free,
            estimated_wait_s=round(device.lane.estimated_wait_s, 3),
        ),
        "servers": [_server(server, now, sent_at, for_operators=for_operators) for server in device.servers],
        "used_by": list(device.used_by),
    }


def _metrics(device: DeviceStatus, now: float) -> wire.Metrics:
    reading = device.metrics
    return wire.Metrics(
        memory_total_bytes=reading.memory_total_bytes if reading else None,
        memory_used_bytes=reading.memory_used_bytes if reading else None,
        memory_free_bytes=reading.memory_free_bytes if reading else None,
        utilization_ratio=reading.utilization_ratio if reading else None,
        temperature_celsius=reading.temperature_celsius if reading else None,
        power_watts=reading.power_watts if reading else None,
        age_s=round(now - reading.measured_at, 3) if reading else None,
    )


def _server(server: ServerView[Any], now: float, sent_at: datetime, *, for_operators: bool) -> wire.Server:
    reason = server.reason
    if reason is not None and for_operators:
        reason = with_last_lines(reason, server.last_lines)
    return wire.Server(
        model_id=server.model_id,
        state=server.state.value,
        generation=server.generation,
        since=sent_at - timedelta(seconds=now - server.since),
        ready_in_s=None if server.retry_at is None else round(max(0.0, server.retry_at - now), 3),
        slots=server.slots,
        slot_ctx_size=server.slot_ctx_size,
        reason=reason,
        reason_code=server.reason_code,
        device_ids=list(server.device_ids),
    )


def _model_facts(model: ModelStatus) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "aliases": list(model.aliases),
        "roles": list(model.roles),
        "endpoints": list(model.endpoints),
        "ctx_size": model.ctx_size,
        "parallel": model.parallel,
        "size_bytes": model.size_bytes,
    }


def _fit(fit: DeviceFit) -> dict[str, Any]:
    return {
        "device_id": fit.device_id,
        "state": fit.state.value,
        "why": fit.why,
        "memory_needed_bytes": fit.needed_bytes,
        "memory_taken_bytes": fit.taken_bytes,
        "measured": fit.is_measured,
    }


def _model_state(node: NodeSnapshot, model: ModelStatus) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "loaded_on": node.devices_with(model.model_id, ServerState.READY),
        "loading_on": node.devices_with(model.model_id, ServerState.STARTING),
        "failed_on": node.devices_with(model.model_id, ServerState.FAILED),
        "load_time_s": model.load_time_s,
    }
