"""What pydantic can't see field by field: keys of a configuration that contradict one another. Pure.

The checks see the values as they are in the file, where any may be missing or of the wrong type, so that their findings
are reported together with all others. Each yields pairs of a key and a message.
"""

from collections.abc import Iterator, Mapping, Sequence

from nodeagent.config.problems import shown
from nodeagent.config.server_flags import check_server_args, find_flag
from nodeagent.config.values import check_main_gpu, check_shares, is_unspecified, split_shares
from nodeagent.config.yaml_source import KeyPath

# With more slots each would get too small a share of the context; llama-server itself sets no limit.
MAX_SLOTS = 1024
_MAX_REQUEST_BYTES = 64 * 2**20

Finding = tuple[KeyPath, str]
Document = Mapping[str, object]


def check_document(document: Document) -> Iterator[Finding]:
    """Everything that is wrong between the keys of one configuration."""
    yield from _reachable(document)
    yield from _ports(document)
    yield from _devices(document)
    yield from _model_names(document)
    yield from _fallbacks(document)
    yield from _limits_of_models(document)
    yield from _default_models(document)
    yield from _api_keys(document)
    yield from _tls(document)
    declared = [device.get("device_id") for _, device in _entries(document, "devices")]
    for index, model in _entries(document, "models"):
        for key, message in (*_devices_of_model(model, declared), *_split(model)):
            yield ("models", index, *key), message
        if model.get("pinned") is True and model.get("idle_unload_s") is not None:
            yield ("models", index, "idle_unload_s"), "contradicts `pinned: true`; remove one of them"
        for key, message in _server_args(model):
            yield ("models", index, "server_args", *key), message


def is_slot_count(value: object) -> bool:
    """Whether this can be a value of `parallel`."""
    return type(value) is int and 1 <= value <= MAX_SLOTS


def server_args_parallel(model: Document) -> tuple[str, object] | None:
    """The name and value of `parallel` in `server_args`, None if it is not there."""
    server_args = model.get("server_args")
    if isinstance(server_args, dict):
        for name, value in server_args.items():
            flag = find_flag(name)
            if flag is not None and flag.key == "parallel" and value is not None and value is not False:
                return name, value
    return None


def _entries(document: Document, key: str) -> Iterator[tuple[int, Document]]:
    items = document.get(key)
    for index, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict):
            yield index, item


def _reachable(document: Document) -> Iterator[Finding]:
    host = document.get("listen_host")
    wanted = document.get("dispatcher_base_url") is not None and document.get("advertise_url") is None
    if wanted and isinstance(host, str) and is_unspecified(host):
        yield (
            ("listen_host",),
            f"{host} does not tell the dispatcher where to reach this node; set advertise_url as well",
        )


def _ports(document: Document) -> Iterator[Finding]:
    port = document.get("agent_check_port")
    if port and port == document.get("listen_port", 8081):
        yield ("agent_check_port",), f"must be another port than listen_port, found {shown(port)}"


def _devices(document: Document) -> Iterator[Finding]:
    first: dict[str, int] = {}
    backend = document.get("backend", "auto")
    for index, device in _entries(document, "devices"):
        device_id = device.get("device_id")
        if not isinstance(device_id, str):
            continue
        here = ("devices", index, "device_id")
        kind = device_id.partition(":")[0]
        if device_id in first:
            yield here, f"{device_id!r} is declared twice; the first is devices[{first[device_id]}]"
        elif kind == "gpu" and backend == "cpu":
            yield here, f"{device_id!r} is not a device of the backend 'cpu'"
        first.setdefault(device_id, index)


def _model_names(document: Document) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for index, model in _entries(document, "models"):
        aliases = model.get("aliases")
        named: list[tuple[KeyPath, object]] = [((key,), model.get(key)) for key in ("model_id", "alias")]
        named += [
            (("aliases", number), name) for number, name in enumerate(aliases if isinstance(aliases, list) else [])
        ]
        for path, name in named:
            if not isinstance(name, str):
                continue
            if name in first:
                yield (
                    ("models", index, *path),
                    f"{name!r} is already the {first[name]}; each name must belong to one model",
                )
            kind = "alias" if path[0] == "aliases" else path[0]
            first.setdefault(name, f"{kind} of models[{index}]")


def _limits_of_models(document: Document) -> Iterator[Finding]:
    node = document.get("max_request_bytes", _MAX_REQUEST_BYTES)
    for index, model in _entries(document, "models"):
        own = model.get("max_request_bytes")
        if isinstance(own, int) and isinstance(node, int) and own > node:
            yield ("models", index, "max_request_bytes"), f"must be at most that of the node ({node}), found {own}"


def _fallbacks(document: Document) -> Iterator[Finding]:
    entries = [(model.get("model_id"), model) for _index, model in _entries(document, "models")]
    models = {model_id: model for model_id, model in entries if isinstance(model_id, str)}
    known = ", ".join(models)
    for index, model in _entries(document, "models"):
        names = model.get("fallback")
        for number, name in enumerate(names if isinstance(names, list) else []):
            here = ("models", index, "fallback", number)
            if not isinstance(name, str):
                continue
            if name not in models:
                yield here, f"must be the model_id of another model ({known}), found {name!r}"
            elif name == model.get("model_id"):
                yield here, f"must be another model, found {name!r} itself"
            elif isinstance(names, list) and name in names[:number]:
                yield here, f"{name!r} is in the list already"
            elif None not in (tasks := (model.get("task"), models[name].get("task"))) and tasks[0] != tasks[1]:
                yield here, f"must be a model for the same task: {name!r} is for {tasks[1]}, this one for {tasks[0]}"


def _default_models(document: Document) -> Iterator[Finding]:
    defaults = [index for index, model in _entries(document, "models") if model.get("default") is True]
    for index in defaults[1:]:
        yield ("models", index, "default"), f"is true for models[{defaults[0]}] already; one model can be the default"


def _tls(document: Document) -> Iterator[Finding]:
    for key, needed in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
        if document.get(key) is not None and document.get(needed) is None:
            yield (key,), f"needs {needed} as well"


def _api_keys(document: Document) -> Iterator[Finding]:
    models = [model.get("model_id") for _index, model in _entries(document, "models")]
    first: dict[str, int] = {}
    for index, entry in _entries(document, "api_keys"):
        name = entry.get("name")
        if isinstance(name, str):
            if name in first:
                yield ("api_keys", index, "name"), f"{name!r} is already the name of api_keys[{first[name]}]"
            first.setdefault(name, index)
        allowed = entry.get("models")
        for number, model in enumerate(allowed if isinstance(allowed, list) else []):
            if isinstance(model, str) and model not in models:
                known = ", ".join(str(one) for one in models)
                yield (
                    ("api_keys", index, "models", number),
                    f"must be the model_id of a model ({known}), found {model!r}",
                )


def _server_args(model: Document) -> Iterator[Finding]:
    server_args = model.get("server_args")
    if not isinstance(server_args, dict):
        return
    for name, message in check_server_args(server_args, model):
        yield (name,), message
    for name, value in server_args.items():
        flag = find_flag(name)
        if flag is not None and flag.name == "slot-save-path" and model.get("keep_kv") is True:
            yield (name,), "is set by the agent because `keep_kv` is true; remove one of them"
        if flag is not None and flag.key in _SPLIT and _is_value(value):
            text = str(value) if flag.key == "tensor_split" else value
            if (wrong := _wrong_split(flag.key, text, model)) is not None:
                yield (name,), wrong
    yield from _parallel(model)


_SPLIT = {"main_gpu": check_main_gpu, "tensor_split": check_shares}


def _split(model: Document) -> Iterator[Finding]:
    """The keys that say how a model is split across the devices that its server sees."""
    for key in _SPLIT:
        value = model.get(key)
        if _is_of_its_kind(key, value) and (wrong := _wrong_split(key, value, model)) is not None:
            yield (key,), wrong


def _is_of_its_kind(key: str, value: object) -> bool:
    """Whether the value has the right type: a wrong one has its own message."""
    if key == "main_gpu":
        return type(value) is int and value >= 0
    try:
        split_shares(value)
    except ValueError:
        return False
    return value is not None


def _wrong_split(key: str, value: object, model: Document) -> str | None:
    """What is wrong with that value for as many devices as the model spans."""
    devices = model.get("devices")
    try:
        _SPLIT[key](value, max(1, len(devices)) if isinstance(devices, list) else 1)
    except ValueError as error:
        return str(error)
    return None


def _devices_of_model(model: Document, declared: Sequence[object]) -> Iterator[Finding]:
    """What is wrong with a model's `devices`, as far as it can be seen without looking for devices."""
    named = model.get("devices")
    if not isinstance(named, list) or not all(isinstance(it, str) for it in named):
        return
    for place, device_id in enumerate(named):
        here = ("devices", place)
        if device_id in named[:place]:
            yield here, f"{device_id!r} is named twice"
        elif declared and device_id not in declared:
            known = ", ".join(str(it) for it in declared)
            yield here, f"must be one of the declared `devices` ({known}), found {device_id!r}"
        elif len(named) > 1 and device_id.startswith("cpu:"):
            yield here, f"a model can't span {device_id!r}: the CPUs of a host are one device to a server"
        elif len(named) > 1 and device_id.partition(":")[0] != named[0].partition(":")[0]:
            yield here, f"a model can't span {named[0]!r} and {device_id!r}: one server runs on devices of one backend"


def _is_value(value: object) -> bool:
    """Whether this is a plain value to check: a bare true has its own message, the items of a list are not checked."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _parallel(model: Document) -> Iterator[Finding]:
    flag = server_args_parallel(model)
    if flag is None or flag[1] is True:
        return
    name, value = flag
    structured = model.get("parallel")
    if not is_slot_count(value):
        yield (name,), f"must be a whole number from 1 to {MAX_SLOTS}, found {shown(value)}"
    elif structured is not None and structured != value:
        yield (name,), f"is {value}, but the key `parallel` of this model is {shown(structured)}; keep one"
