"""The models that the configuration keeps to some of the node's devices, and the groups of devices that they span."""

from collections.abc import Iterator, Sequence

from nodeagent.config import ModelConfig, NodeConfig
from nodeagent.devices.values import DeviceRef, joined
from nodeagent.errors import Problem


def runs_on(model: ModelConfig, device: DeviceRef) -> bool:
    """Whether the configuration lets a server of the model run on this device, or on these devices together."""
    if len(model.devices) > 1 or device.members:
        return model.devices == tuple(part.device_id for part in device.parts)
    return not model.devices or model.devices == (device.device_id,)


def spans_of(config: NodeConfig, devices: Sequence[DeviceRef]) -> list[DeviceRef]:
    """Each group of devices that models span, as one device; see `misplaced` for what there may be wrong."""
    by_id = {device.device_id: device for device in devices}
    groups = dict.fromkeys(model.devices for model in config.models if len(model.devices) > 1)
    return [joined([by_id[device_id] for device_id in group]) for group in groups]


def misplaced(config: NodeConfig, devices: Sequence[DeviceRef]) -> list[Problem]:
    """The models whose `devices` these don't have, or that no one server can span."""
    by_id = {device.device_id: device for device in devices if not device.members}
    return [
        config.problem(("models", index, "devices", place), message)
        for index, model in enumerate(config.models)
        for place, message in _misplaced(model, by_id)
    ]


def _misplaced(model: ModelConfig, by_id: dict[str, DeviceRef]) -> Iterator[tuple[int, str]]:
    first = by_id.get(model.devices[0]) if model.devices else None
    for place, device_id in enumerate(model.devices):
        device = by_id.get(device_id)
        if device is None:
            yield place, f"must be one of the node's devices ({', '.join(by_id)}), found {device_id!r}"
        elif len(model.devices) > 1 and device.backend == "cpu":
            yield place, f"a model can't span {device_id!r}: the CPUs of a host are one device to a server"
        elif first is not None and device.backend != first.backend:
            yield (
                place,
                f"a model can't span {first.device_id!r} ({first.backend}) and {device_id!r} ({device.backend}): "
                "one server runs on devices of one backend",
            )
        elif first is not None and (device.llama_server_bin, device.env) != (first.llama_server_bin, first.env):
            yield (
                place,
                f"a model can't span {first.device_id!r} and {device_id!r}: their `llama_server_bin` or `env` differ",
            )


def unknown_groups(config: NodeConfig, spans: Sequence[DeviceRef]) -> list[Problem]:
    """The models of a changed configuration that span a group of devices which none did when the agent started."""
    known = [tuple(part.device_id for part in span.members) for span in spans]
    return [
        config.problem(
            ("models", index, "devices"),
            f"no model spanned {', '.join(model.devices)} when the agent started; restart it to add such a model",
        )
        for index, model in enumerate(config.models)
        if len(model.devices) > 1 and model.devices not in known
    ]
