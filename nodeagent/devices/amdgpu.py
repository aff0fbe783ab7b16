"""AMD's cards through the kernel driver amdgpu, without a library.

Documentation/gpu/amdgpu/driver-misc.rst and thermal.rst of the kernel describe the files. The order is that of KFD's
topology, in which ROCm numbers the cards; `unique_id` in it is the UUID that ROCR_VISIBLE_DEVICES takes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.devices.backend import DriverError
from nodeagent.devices.cards import Card
from nodeagent.devices.drm import DrmCard, Readings, drm_cards, hwmon
from nodeagent.devices.values import DeviceMetrics
from supervisor.cgroups import number, read

_LAST: Final = 1 << 30  # cards that KFD does not list come after those that it does


class _Node(msgspec.Struct, frozen=True):
    """A GPU in KFD's topology. `gfx` is 110000 for gfx1100; `is_apu`, whether CPU cores are part of it."""

    order: int
    gfx: int
    is_apu: bool


class AmdgpuCards:
    """Implements `cards.CardSource`. `root` is where sys is.

    What changes: `_cards` in `cards`, `_readings` in `read`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        """Raises DriverError if there is no such card."""
        self._root = root
        self._cards: dict[str, DrmCard] = {}
        self._readings = Readings()
        if not drm_cards(root, ("amdgpu",)):
            raise DriverError("no card of the driver amdgpu", absent=True)

    def cards(self) -> list[Card]:
        found = drm_cards(self._root, ("amdgpu",))
        self._cards = {card.pci_id: card for card in found}
        nodes = _kfd_nodes(self._root)
        ordered = sorted(found, key=lambda card: nodes[card.pci_id].order if card.pci_id in nodes else _LAST)
        return [_described(card, nodes.get(card.pci_id)) for card in ordered]

    def read(self, card: Card, now: float) -> DeviceMetrics:
        drm = self._cards[card.key]
        return self._readings.of_card(drm, now, lambda: _measured(drm, now, integrated=bool(card.integrated)))

    def close(self) -> None:
        """Does nothing: each reading opens its files."""


def _described(card: DrmCard, node: _Node | None) -> Card:
    unique_id = read(card.device / "unique_id").strip().lower()
    integrated = _is_apu(card, node)
    gfx = f"gfx{node.gfx // 10000}{node.gfx // 100 % 100:x}{node.gfx % 100:x}" if node is not None else ""
    return Card(
        key=card.pci_id,
        name=read(card.device / "product_name").strip() or f"AMD {gfx}".strip(),
        pci_id=card.pci_id,
        uuid=f"GPU-{unique_id}" if unique_id.strip("0") else None,
        memory_total_bytes=_memory(card, "total", integrated=bool(integrated)),
        integrated=integrated,
    )


def _measured(card: DrmCard, now: float, *, integrated: bool) -> DeviceMetrics:
    total, used = (_memory(card, name, integrated=integrated) for name in ("total", "used"))
    busy = number(read(card.device / "gpu_busy_percent"))
    edge = hwmon(card, "temp1_input")  # in thousandths of a degree; of some cards only the junction is known
    celsius = edge if edge is not None else hwmon(card, "temp2_input")
    microwatts = hwmon(card, "power1_average", "power1_input")
    return DeviceMetrics(
        measured_at=now,
        memory_total_bytes=total,
        memory_used_bytes=used,
        memory_free_bytes=max(0, total - used) if total is not None and used is not None else None,
        utilization_ratio=min(1.0, busy / 100) if busy is not None else None,
        temperature_celsius=celsius / 1000 if celsius is not None else None,
        power_watts=microwatts / 1e6 if microwatts is not None else None,
    )


def _memory(card: DrmCard, name: str, *, integrated: bool) -> int | None:
    """An APU's own memory is a part that the firmware set aside; it uses the system's (GTT) as well."""
    vram = number(read(card.device / f"mem_info_vram_{name}"))
    gtt = number(read(card.device / f"mem_info_gtt_{name}")) if integrated else 0
    return vram + gtt if vram is not None and gtt is not None else None


def _is_apu(card: DrmCard, node: _Node | None) -> bool | None:
    """By KFD, else by the format of `gpu_metrics`: version 1 is that of cards, 2 and 3 are those of APUs."""
    if node is not None and node.is_apu:
        return True
    try:
        with card.device.joinpath("gpu_metrics").open("rb") as file:
            header = file.read(4)
    except OSError:
        header = b""
    if len(header) == 4:
        return header[2] in (2, 3)
    return None if node is None else False


def _kfd_nodes(root: Path) -> Mapping[str, _Node]:
    """The GPUs that ROCm can use, by PCI address; none without KFD (or without the right to see it)."""
    nodes: dict[str, _Node] = {}
    folders = root.joinpath("sys/class/kfd/kfd/topology/nodes").glob("*")
    for folder in sorted((folder for folder in folders if folder.name.isdecimal()), key=lambda path: int(path.name)):
        pairs = (line.partition(" ") for line in read(folder / "properties").splitlines())
        facts = {name: number(text) or 0 for name, _, text in pairs}
        minor = facts.get("drm_render_minor", 0)
        if minor <= 0 or facts.get("simd_count", 0) <= 0:  # a CPU
            continue
        uevent = read(root / f"sys/class/drm/renderD{minor}/device/uevent").splitlines()
        for line in uevent:
            if line.startswith("PCI_SLOT_NAME="):
                node = _Node(len(nodes), facts.get("gfx_target_version", 0), facts.get("cpu_cores_count", 0) > 0)
                nodes[line.partition("=")[2]] = node
    return nodes
