"""Which backend the agent uses on this host."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Final

from nodeagent.devices.amdgpu import AmdgpuCards
from nodeagent.devices.apple import AppleCards
from nodeagent.devices.backend import Backend, Build, DeclaredDevice, DriverError, within
from nodeagent.devices.cpu import CpuBackend
from nodeagent.devices.cuda import CudaBackend, open_driver
from nodeagent.devices.intel import IntelCards
from nodeagent.devices.limits import Cpus, with_threads
from nodeagent.devices.listed import ListedBackend, OpenSource
from nodeagent.devices.listing import ListedDevice, list_devices
from nodeagent.devices.mixed import MixedBackend, Part
from nodeagent.devices.nvidia_cards import NvidiaCards
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import StartupError

logger = logging.getLogger(__name__)

Open = Callable[[Build], Backend]
"""Opens a backend, to be used with that llama-server. Raises DriverError if its driver can't be used."""
Listing = Callable[[Build, Mapping[str, str]], list[ListedDevice]]


# For a driver that hangs. With many GPUs and no persistence mode NVIDIA's takes seconds; nvidia-smi has 15.
_OPEN_MAX_S: Final = 30.0


def _nvidia() -> NvidiaCards:
    return NvidiaCards(open_driver())


# What measures the devices of each backend. Vulkan runs on any vendor's.
SOURCES: Final[Mapping[str, Sequence[OpenSource]]] = MappingProxyType(
    {
        "rocm": (AmdgpuCards,),
        "sycl": (IntelCards,),
        "metal": (AppleCards,),
        "vulkan": (_nvidia, AmdgpuCards, IntelCards),
    }
)


def _cuda(build: Build) -> Backend:
    """With NVIDIA's driver; without it, as the binary lists the GPUs (Jetson, WSL, containers without NVML)."""
    try:
        return CudaBackend(within(_OPEN_MAX_S, open_driver), {**os.environ, **build.env}, id_prefix=build.id_prefix)
    except DriverError as no_driver:
        backend = ListedBackend("cuda", build)
        try:
            backend.discover()
        except StartupError:
            raise no_driver from None
        logger.warning("the GPUs can't be measured: %s", no_driver)
        return backend


def _listed(name: str) -> Open:
    return lambda build: ListedBackend(name, build, SOURCES.get(name, ()))


BACKENDS: Final[Mapping[str, Open]] = MappingProxyType(
    {
        "cpu": lambda _build: CpuBackend(),
        "cuda": _cuda,
        **{name: _listed(name) for name in ("rocm", "sycl", "metal", "vulkan")},
    }
)


def host_cards() -> list[str]:
    """The names of the cards whose drivers this host has, but for graphics in a processor."""
    names = []
    for open_it in SOURCES["vulkan"]:
        try:
            with closing(within(_OPEN_MAX_S, open_it)) as source:
                names += [card.name or card.key for card in source.cards() if not card.integrated]
        except DriverError as error:
            logger.debug("%s", error)
    return names


# A card that two backends of one binary can use is used by the first of them: the vendor's own before Vulkan.
PREFERENCE: Final = ("cuda", "rocm", "sycl", "metal", "vulkan")


def select(
    name: str,
    declared: Sequence[DeclaredDevice],
    build: Build,
    *,
    backends: Mapping[str, Open] = BACKENDS,
    listing: Listing = list_devices,
    cards: Callable[[], list[str]] = host_cards,
) -> Backend:
    """Open the backend of that name, and those that declared devices name; the caller closes what is returned.

    The id of a declared device begins with the name of its backend, or with `gpu`, which is the backend of that name.
    "auto" is what the binary can use here: the first of PREFERENCE of which it lists a device, else the CPU unless a
    `gpu` is declared. Blocks on drivers, for seconds at worst. Raises StartupError if a backend can't be used.
    """

    def opening(kind: str, used: Build, *, gpus_wanted: bool) -> Backend:
        if kind == "auto":
            return _usable(used, backends, listing, cards, gpus_wanted=gpus_wanted)
        try:
            return backends[kind](used)
        except DriverError as error:
            raise StartupError(f"backend {kind} can't be used: {error}") from error

    if not declared:
        return opening(name, build, gpus_wanted=False)
    parts: list[Part] = []
    with ExitStack() as opened:
        for prefix, used, places in _groups(declared, build):
            kind = name if prefix == "gpu" else prefix
            backend = opening(kind, used, gpus_wanted=True)
            opened.callback(backend.close)
            parts.append(Part(backend, tuple(places)))
        opened.pop_all()
    return parts[0].backend if len(parts) == 1 else MixedBackend(parts)


def devices_of(backend: Backend, declared: Sequence[DeclaredDevice], cpus: Cpus) -> list[DeviceRef]:
    """The backend's devices, each with the threads that this process's CPUs allow. See `Backend.devices`."""
    return with_threads(backend.devices(declared), cpus)


def _groups(declared: Sequence[DeclaredDevice], build: Build) -> list[tuple[str, Build, list[int]]]:
    """The places of the devices that one backend with one build handles, in order."""
    groups: list[tuple[str, Build, list[int]]] = []
    for place, entry in enumerate(declared):
        prefix = entry.device_id.partition(":")[0]
        program = entry.llama_server_bin
        binary = Path(shutil.which(program) or program) if program is not None else build.binary
        used = Build(binary, entry.env, prefix)
        for known_prefix, known, places in groups:
            if (known_prefix, known) == (prefix, used) or prefix == known_prefix == "cpu":
                places.append(place)
                break
        else:
            groups.append((prefix, used, [place]))
    return groups


def _usable(
    build: Build, backends: Mapping[str, Open], listing: Listing, cards: Callable[[], list[str]], *, gpus_wanted: bool
) -> Backend:
    try:
        listed = listing(build, os.environ)
    except DriverError as error:
        # A binary that is not there is reported by the check of the configuration.
        level = logging.DEBUG if error.absent else logging.WARNING
        logger.log(level, "%s; the devices of NVIDIA's driver are used, if there are any", error)
        candidates: list[str] = ["cuda"]
        why = "this llama-server does not list its devices"
    else:
        candidates = [name for name in PREFERENCE if name in backends and name in {one.backend for one in listed}]
        unknown = ", ".join(device.name for device in listed if device.backend not in backends)
        why = f"{build.binary} lists {f'only {unknown}' if unknown else 'no GPU'} here"
    for name in candidates:
        try:
            if (backend := _with_devices(backends[name], build)) is not None:
                return backend
        except (DriverError, StartupError) as error:
            # A driver that is installed and fails is worth a warning: the node starts without its GPUs.
            absent = isinstance(error, DriverError) and error.absent
            logger.log(logging.DEBUG if absent else logging.WARNING, "backend %s can't be used: %s", name, error)
            why = f"backend {name} can't be used: {error}"
    if gpus_wanted:
        raise StartupError(why)
    if not candidates and (unused := cards()):
        logger.warning("using the CPU: %s, although this host has %s", why, ", ".join(unused))
    else:
        logger.info("using the CPU: %s", why)
    return backends["cpu"](build)


def _with_devices(open_it: Open, build: Build) -> Backend | None:
    """The opened backend; closed again, and None, if it has no device."""
    backend = open_it(build)
    try:
        found = backend.discover()
    except StartupError:
        backend.close()
        raise
    if found:
        return backend
    backend.close()
    return None
