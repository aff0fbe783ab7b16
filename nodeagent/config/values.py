"""The kinds of value that a configuration key can have, beyond plain numbers and words.

Each validator raises ValueError with the whole sentence: what the value must be, and what was found. Where paths are
resolved, the validation context is the configuration file's folder.
"""

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, PlainValidator, ValidationInfo

from nodeagent.config.problems import MODEL_NAME, shown
from nodeagent.config.server_flags import FlagValue

# Default ports by scheme.
_PORTS = {"http": 80, "https": 443}

# llama-server reads its numbers as 32-bit integers.
_INT_MAX = 2**31 - 1
_THREADS_MAX = 4096

# A host name that no resolver takes for a number ("0" is 0.0.0.0 to most): its last label starts with a letter.
_HOST_NAME = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?")


def absolute(value: object, folder: Path) -> Path:
    """A path as it is configured: `~` expanded, a relative one from the folder on. Raises ValueError."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"must be a path, found {shown(value)}")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"starts in a home folder that is not known here, found {shown(value)}") from error
    # Lexically: a symbolic link in the path may be switched on purpose, and `..` is rare.
    return Path(os.path.normpath(folder / path))


def folder_of(info: ValidationInfo) -> Path:
    """Where relative paths start: the validation context."""
    return info.context if isinstance(info.context, Path) else Path.cwd()


def _absolute(value: object, info: ValidationInfo) -> Path:
    return absolute(value, folder_of(info))


def _command(value: object, info: ValidationInfo) -> str:
    if isinstance(value, str) and value and not value.startswith("~") and "/" not in value:
        return value
    return str(_absolute(value, info))


def _base_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.port != 0 and value.isprintable()
        usable = usable and is_host(parts.hostname or "")
    except ValueError:
        usable = False
    if not usable or " " in value:
        raise ValueError(f"must be a URL like http://10.0.0.5:8080, found {shown(value)}")
    if parts.username is not None:
        raise ValueError("must not hold a user name or password; put a token into the file of dispatcher_token_file")
    if "?" in value or "#" in value:
        raise ValueError(f"must end before any ? or #, found {shown(value)}")
    return value.rstrip("/")


def _origin(value: str) -> str:
    """An origin as browsers send it (RFC 6454): lower case, with the port only if it is not the default one."""
    message = f"must be the origin of a web page like https://chat.example, found {shown(value)}"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(message) from None
    host = parts.hostname or ""
    if parts.scheme not in _PORTS or not is_host(host) or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(message)
    if parts.username is not None:
        raise ValueError(message)
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


def is_host(value: str) -> bool:
    """Whether this is an IP address or a host name within DNS limits (RFC 1035: 63 bytes a label, 253 in all)."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        labels = value.removesuffix(".").split(".")
        return len(value) <= 253 and all(len(label) <= 63 for label in labels) and bool(_HOST_NAME.fullmatch(value))
    return True


def is_loopback(host: str) -> bool:
    """Whether only this host reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_unspecified(host: str) -> bool:
    """Whether this address means all addresses of the host (0.0.0.0, ::)."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host(value: str) -> str:
    if not is_host(value):
        raise ValueError(
            f"must be an IP address without brackets or a host name (0.0.0.0 or :: for all), found {shown(value)}"
        )
    return value


def _host_name(value: str) -> str:
    """In lower case, as browsers send it, and without the dot at its end that makes a name absolute."""
    name = value.removesuffix(".").lower()
    if not is_host(name):
        raise ValueError(f"must be a host name like models.example, without scheme or port, found {shown(value)}")
    return name


def _label(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"must be one line of printable text, found {shown(value)}")
    return value


def _on_off_auto(value: object) -> str:
    word = ("off", "on")[value] if isinstance(value, bool) else value
    word = word.lower() if isinstance(word, str) else word
    if not isinstance(word, str) or word not in ("on", "off", "auto"):
        raise ValueError(f"must be true, false, on, off or auto, found {shown(value)}")
    return word


def _gpu_layers(value: object) -> int | str:
    word = value.lower() if isinstance(value, str) else value
    if word in ("all", "auto") or (type(word) is int and -1 <= word <= _INT_MAX):
        return word
    raise ValueError(f"must be a whole number from -1 on, all or auto, found {shown(value)}")


def _threads(value: object) -> int:
    if type(value) is int and (value == -1 or 1 <= value <= _THREADS_MAX):
        return value
    raise ValueError(f"must be a whole number from 1 to {_THREADS_MAX}, or -1 for all cores, found {shown(value)}")


def check_main_gpu(value: object, devices: int = 1) -> None:
    """A server numbers the devices that it sees from 0."""
    if str(value) in map(str, range(devices)):
        return
    if devices == 1:
        raise ValueError(f"must be 0, found {shown(value)}: a server sees one device only")
    raise ValueError(f"must be from 0 to {devices - 1}, a place in `devices`, found {shown(value)}")


def split_shares(value: object) -> tuple[float, ...]:
    """The shares per device, from a list or from text like llama-server's `3,1`."""
    try:
        return _numbers(value)
    except ValueError as error:
        raise ValueError(f"must be a list of shares like [1], found {shown(value)}") from error


def check_shares(value: object, devices: int = 1) -> None:
    """That the shares suit that many devices. Raises ValueError."""
    shares = split_shares(value)
    if devices == 1:
        if not shares or not 0 < shares[0] < math.inf or any(share != 0 for share in shares[1:]):
            raise ValueError(
                f"must give everything to one device, like [1], found {shown(value)}: a server sees one device only"
            )
    elif len(shares) != devices:
        raise ValueError(f"must have {devices} shares, one for each of `devices`, found {shown(value)}")
    elif any(not 0 <= share < math.inf for share in shares) or not any(shares):
        raise ValueError(f"must have shares from 0 on, one of them above 0, found {shown(value)}")


def _numbers(value: object) -> tuple[float, ...]:
    if isinstance(value, str):
        return tuple(float(part) for part in re.split(r"[,/]", value))
    if not isinstance(value, list | tuple) or any(type(part) not in (int, float) for part in value):
        raise ValueError
    return tuple(float(part) for part in value)


def _cpus(value: object) -> frozenset[int]:
    if isinstance(value, frozenset):
        return value
    if not isinstance(value, list) or not value or not all(type(cpu) is int and 0 <= cpu < 4096 for cpu in value):
        raise ValueError(f"must be a list of CPU numbers like [0, 1], found {shown(value)}")
    if len(set(value)) < len(value):
        raise ValueError(f"names a CPU twice, found {shown(value)}")
    return frozenset(value)


def _flag_value(value: object) -> FlagValue:
    if value is None or isinstance(value, bool):
        return value
    items = value if isinstance(value, list | tuple) else (value,)
    texts: list[str | int | float] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise ValueError(
                f"must be text, a number, true, false, null, or a list of texts and numbers, found {shown(item)}"
            )
        if isinstance(item, str) and "\0" in item:
            raise ValueError("must not hold a NUL character")
        texts.append(item)
    return tuple(texts) if isinstance(value, list | tuple) else texts[0]


# What the agent itself sets, and flags of llama-server, which have a place of their own.
_OWN_VARIABLES = ("LLAMA_",)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _variables(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"must hold names of environment variables, found {shown(name)}")
        if name.startswith(_OWN_VARIABLES):
            raise ValueError(f"must not set {name}: put flags of llama-server under server_args")
        if "\0" in text:
            raise ValueError(f"must not hold a NUL character, found one in {name}")
    return value


_FlagInput = str | int | float | bool | list[str | int | float] | None

# What decides where a request goes, how long it is answered, or what it is about.
_NO_PARAMETERS = frozenset(
    {
        *("model", "stream", "n", "n_cmpl", "id_slot", "prompt_cache_key"),
        *("messages", "prompt", "input", "content", "query", "documents", "texts", "tokens"),
        *("input_prefix", "input_suffix", "file"),
    }
)


def _parameters(values: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """None of them decides where a request goes."""
    for name in values:
        if name in _NO_PARAMETERS or not name:
            raise ValueError(f"must be parameters of generation, such as temperature, found {shown(name)}")
    return values


AbsolutePath = Annotated[Path, PlainValidator(_absolute, json_schema_input_type=str)]
"""`~` is expanded; a relative path starts in the configuration file's folder."""
Command = Annotated[str, PlainValidator(_command, json_schema_input_type=str)]
"""A bare name, looked up on PATH as a shell does; anything with a slash is a path."""
BaseUrl = Annotated[str, AfterValidator(_base_url)]
"""An http or https URL that paths can be appended to; held without its last slash."""
Origin = Annotated[str, AfterValidator(_origin)]
Host = Annotated[str, AfterValidator(_host)]
HostName = Annotated[str, AfterValidator(_host_name)]
Label = Annotated[str, AfterValidator(_label)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME)]
Parameters = Annotated[dict[str, JsonValue], AfterValidator(_parameters)]
FlashAttn = Annotated[
    Literal["on", "off", "auto"],
    PlainValidator(_on_off_auto, json_schema_input_type=bool | Literal["on", "off", "auto"]),
]
GpuLayers = Annotated[
    int | Literal["all", "auto"], PlainValidator(_gpu_layers, json_schema_input_type=int | Literal["all", "auto"])
]
Threads = Annotated[int, PlainValidator(_threads, json_schema_input_type=int)]
TensorSplit = Annotated[tuple[float, ...], PlainValidator(split_shares, json_schema_input_type=list[float] | str)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]
Cpus = Annotated[frozenset[int], PlainValidator(_cpus, json_schema_input_type=list[int])]
ServerArg = Annotated[FlagValue, PlainValidator(_flag_value, json_schema_input_type=_FlagInput)]


def _as_tuple(value: object) -> object:
    """A list becomes the tuple that a frozen model holds; pydantic refuses anything else."""
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_as_tuple)
