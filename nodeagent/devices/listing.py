"""What a llama-server binary itself says of the devices that it can use.

`--list-devices` prints (build b10434):

    Available devices:
      Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24100 MiB free)

It names neither the PCI address nor what kind of device it is. `identified` gets the addresses: with `-lv 4` the server
names each device's before it reads a model's tensors, so a model of one line that ends there is enough:

    llama_prepare_model_devices: using device Vulkan0 (AMD ...) (0000:03:00.0) - 24100 MiB free
"""

import logging
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from nodeagent.devices.backend import Build, DriverError

logger = logging.getLogger(__name__)

# The first start after a driver's update may compile for seconds.
_TIMEOUT_S: Final = 60.0
# A build that serves what is no model, instead of ending, costs this much of the agent's start.
_ADDRESSES_MAX_S: Final = 20.0
_MIB: Final = 1 << 20
_HEADER: Final = "Available devices:"
_ROW: Final = re.compile(r"\s+(\S+): (.*) \((\d+) MiB, (\d+) MiB free\)\s*")
_USING: Final = re.compile(r"using device (\S+) \(.*\) \(([0-9a-fA-F]+:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9a-fA-F])\)")
_UNIFIED: Final = re.compile(r"ggml_vulkan: (\d+) = .*\| uma: ([01])")
# How the names of each backend's devices begin; what follows is a number (`Metal` had none).
_PREFIXES: Final = {
    "CUDA": "cuda",
    "ROCm": "rocm",
    "SYCL": "sycl",
    "Vulkan": "vulkan",
    "MTL": "metal",
    "Metal": "metal",
}
# Full numbers of free memory (SYCL), and the same order of GPUs as every other tool of NVIDIA.
_ENV: Final = {"ZES_ENABLE_SYSMAN": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class ListedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `backend` is the name in the configuration, None for a vendor that the agent does not know.

    `pci_id` and `integrated` are None where the binary does not say.
    """

    name: str
    backend: str | None
    description: str
    memory_total_bytes: int
    memory_free_bytes: int
    pci_id: str | None = None
    integrated: bool | None = None


def list_devices(build: Build, environ: Mapping[str, str]) -> list[ListedDevice]:
    """The devices that this binary can use in this environment, with the variables of `build`. Blocks.

    Raises DriverError if it does not say.
    """
    done = _run([str(build.binary), "--list-devices"], build, environ)
    if done.returncode != 0 or _HEADER not in done.stdout:
        message = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "no list")
        raise DriverError(f"{build.binary} --list-devices: {message} (exit {done.returncode})")
    return parse_listing(done.stdout, done.stderr)


def identified(devices: Sequence[ListedDevice], build: Build, environ: Mapping[str, str]) -> list[ListedDevice]:
    """The same devices with their PCI addresses, as far as this build tells them. Blocks; never fails."""
    if not devices:
        return []
    with tempfile.TemporaryDirectory(prefix="rolemesh-") as folder:
        model = Path(folder, "no-model.gguf")
        model.write_bytes(_bare_model())
        names = ",".join(device.name for device in devices)
        argv = [str(build.binary), "-m", str(model), "--device", names, "-lv", "4", "--fit", "off"]
        try:
            done = _run([*argv, "--host", "127.0.0.1", "--port", "0"], build, environ, _ADDRESSES_MAX_S)
        except DriverError as error:
            logger.debug("the PCI addresses of the devices are unknown: %s", error)
            return list(devices)
    addresses = parse_addresses(done.stdout + done.stderr)
    return [replace(device, pci_id=addresses.get(device.name)) for device in devices]


def parse_listing(stdout: str, stderr: str = "") -> list[ListedDevice]:
    """The rows of the list. Those without memory (BLAS, Accelerate) are no devices to run a server on."""
    unified = {f"Vulkan{found[1]}": found[2] == "1" for found in _UNIFIED.finditer(stderr)}
    rows = (_ROW.fullmatch(line) for line in stdout.partition(_HEADER)[2].splitlines())
    return [
        ListedDevice(
            name=row[1],
            backend=_PREFIXES.get(row[1].rstrip("0123456789")),
            description=row[2],
            memory_total_bytes=int(row[3]) * _MIB,
            memory_free_bytes=int(row[4]) * _MIB,
            integrated=unified.get(row[1]),
        )
        for row in rows
        if row is not None and int(row[3]) > 0
    ]


def parse_addresses(log: str) -> dict[str, str]:
    """The PCI address of each device that the log names with one."""
    return {found[1]: pci_address(found[2]) for found in _USING.finditer(log)}


def pci_address(text: str) -> str:
    """A PCI address as sysfs spells it: `0000:01:00.0`. NVIDIA's library writes eight digits of the domain."""
    domain, _, rest = text.strip().lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"


def _run(
    argv: list[str], build: Build, environ: Mapping[str, str], timeout_s: float = _TIMEOUT_S
) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in environ.items() if not name.startswith("LLAMA_")}
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**inherited, **_ENV, **build.env},
        )
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        raise DriverError(f"{argv[0]}: {error.strerror or error}", absent=absent) from error
    except subprocess.TimeoutExpired:
        raise DriverError(f"{argv[0]}: no answer in {timeout_s:g} s") from None


def _bare_model() -> bytes:
    """A GGUF file that names an architecture and nothing else: no server gets further than to its devices."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    key = string("general.architecture") + struct.pack("<I", 8) + string("llama")  # 8 is the type of strings
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key  # version 3, no tensor, one key
