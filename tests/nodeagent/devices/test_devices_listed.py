"""A backend's devices as the binary lists them, with scripts in the binary's place."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest

from fakes.declared import Declared
from fakes.drm_trees import lay_discrete_amd
from fakes.nvml import UUIDS, FakeGpu, FakeNvml
from nodeagent.devices.amdgpu import AmdgpuCards
from nodeagent.devices.backend import Build, DriverError, within
from nodeagent.devices.cards import Card, CardSource, match
from nodeagent.devices.listed import ListedBackend
from nodeagent.devices.listing import ListedDevice, identified, list_devices
from nodeagent.devices.nvidia_cards import NvidiaCards
from nodeagent.devices.nvml_driver import NvmlDriver
from nodeagent.devices.values import DeviceMetrics
from nodeagent.errors import StartupError

pytestmark = pytest.mark.real  # processes

MIB = 1 << 20
GIB = 1 << 30
TOTAL = 24560 * MIB
# Prints what a build with two discrete cards does; the addresses as llama.cpp prints them with `-lv 4`.
TWO_CARDS = """#!/bin/sh
case "$*" in
--list-devices)
    echo "Available devices:"
    echo "  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24512 MiB free)"
    echo "  Vulkan1: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24512 MiB free)"
    ;;
*"--device Vulkan0,Vulkan1"*)
    echo "I llama_prepare_model_devices: using device Vulkan0 (AMD (RADV NAVI31)) (0000:43:00.0) - 1 MiB free" >&2
    echo "I llama_prepare_model_devices: using device Vulkan1 (AMD (RADV NAVI31)) (0000:03:00.0) - 1 MiB free" >&2
    exit 1
    ;;
esac
"""


def script(folder: Path, text: str) -> Build:
    binary = folder / "llama-server"
    binary.write_text(text)
    binary.chmod(0o755)
    return Build(binary)


@dataclass
class FakeCards:
    """A vendor's driver; `error` is what each reading raises."""

    found: list[Card]
    error: DriverError | None = None
    closed: bool = False

    def cards(self) -> list[Card]:
        return self.found

    def read(self, card: Card, now: float) -> DeviceMetrics:
        if self.error is not None:
            raise self.error
        return DeviceMetrics(measured_at=now, memory_used_bytes=int(card.key))

    def close(self) -> None:
        self.closed = True


def card(key: str, pci_id: str) -> Card:
    return Card(key=key, name="RX 7900 XTX", pci_id=pci_id, uuid=f"GPU-{key}", integrated=False)


def test_a_device_is_measured_by_the_card_with_its_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cards = FakeCards([card("1", "0000:03:00.0"), card("2", "0000:43:00.0")])
    backend = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [lambda: cards], {})
    first, second = backend.devices([])
    assert (first.device_id, first.pci_id, first.uuid, first.integrated) == ("gpu:0", "0000:43:00.0", "GPU-2", False)
    assert backend.read(first, 7.0) == DeviceMetrics(measured_at=7.0, memory_total_bytes=TOTAL, memory_used_bytes=2)
    assert backend.read(second, 8.0) == DeviceMetrics(measured_at=8.0, memory_total_bytes=TOTAL, memory_used_bytes=1)
    assert backend.child_args(second) == ["--device", "Vulkan0"]
    assert backend.child_env(second)["GGML_VK_VISIBLE_DEVICES"] == "1"

    cards.error = DriverError("the driver hangs")
    for now in (9.0, 10.0):
        assert backend.read(first, now) == DeviceMetrics(measured_at=now, memory_total_bytes=TOTAL)
    cards.error = None
    assert backend.read(first, 11.0).memory_used_bytes == 2
    assert caplog.messages == ["gpu:0 can't be measured: the driver hangs", "gpu:0 can be measured again"]
    backend.close()
    assert cards.closed


def test_a_driver_that_fails_costs_the_readings_and_not_the_device(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> CardSource:
        raise DriverError("no such library")

    backend = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [broken], {})
    first, _second = backend.discover()
    assert caplog.messages == ["some devices can't be measured: no such library"]
    assert (first.uuid, first.pci_id, first.integrated) == (None, None, None)
    assert backend.read(first, 1.0) == DeviceMetrics(measured_at=1.0, memory_total_bytes=TOTAL)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\necho 'error: invalid argument: --list-devices' >&2; exit 1\n", "invalid argument"),
        ("#!/bin/sh\nexit 0\n", "no list"),
        ("#!/bin/sh\necho 'Available devices:'\n", "lists no device for vulkan here; it lists none at all"),
        (
            "#!/bin/sh\necho 'Available devices:'\necho '  CUDA0: L4 (9 MiB, 9 MiB free)'\n",
            "lists no device for vulkan here; it lists CUDA0",
        ),
    ],
)
def test_a_binary_without_such_devices_says_so(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=why):
        ListedBackend("vulkan", script(tmp_path, text), [], {}).discover()


def test_a_binary_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        ListedBackend("vulkan", Build(tmp_path / "none"), [], {}).discover()


def test_the_binary_is_asked_in_the_environment_of_its_servers(tmp_path: Path) -> None:
    text = (
        '#!/bin/sh\necho "Available devices:"\necho "  Vulkan0: $HSA_X-$MINE-$LLAMA_ARG_DEVICE (9 MiB, 9 MiB free)"\n'
    )
    build = script(tmp_path, text)
    environ: Mapping[str, str] = {"HSA_X": "a", "MINE": "b", "LLAMA_ARG_DEVICE": "none"}
    assert list_devices(Build(build.binary, {"MINE": "c"}), environ)[0].description == "a-c-"


ONE_ROCM = """#!/bin/sh
[ "$*" = --list-devices ] && echo "Available devices:" && echo "  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 1 MiB free)"
exit 0
"""


def test_a_rocm_card_is_pinned_by_its_uuid_once_it_is_known(tmp_path: Path) -> None:
    build = script(tmp_path, ONE_ROCM)
    bare = ListedBackend("rocm", build, [], {})
    (device,) = bare.discover()
    assert bare.child_env(device)["ROCR_VISIBLE_DEVICES"] == "0"
    # The binary tells no address, but there is one device and one card of its vendor.
    backend = ListedBackend("rocm", build, [lambda: FakeCards([card("7", "0000:03:00.0")])], {})
    (device,) = backend.discover()
    assert (device.uuid, device.pci_id) == ("GPU-7", "0000:03:00.0")
    assert backend.child_env(device)["ROCR_VISIBLE_DEVICES"] == "GPU-7"
    assert backend.child_env(device)["HIP_VISIBLE_DEVICES"] == "0"


def test_rocms_devices_are_those_of_amdgpu_by_their_addresses(tmp_path: Path) -> None:
    lay_discrete_amd(tmp_path, "card0", "0000:43:00.0", unique_id="00000000000000a0")
    lay_discrete_amd(tmp_path, "card1", "0000:03:00.0", unique_id="00000000000000b1", gpu_busy_percent="5\n")
    build = script(tmp_path, TWO_CARDS.replace("Vulkan", "ROCm"))
    backend = ListedBackend("rocm", build, [lambda: AmdgpuCards(tmp_path)], {"ROCR_VISIBLE_DEVICES": "4,3"})
    first, second = backend.discover()
    assert (first.uuid, second.uuid) == ("GPU-00000000000000a0", "GPU-00000000000000b1")
    assert backend.child_env(second)["ROCR_VISIBLE_DEVICES"] == "GPU-00000000000000b1"
    assert backend.read(second, 2.0).utilization_ratio == 0.05
    backend.close()


def test_a_driver_that_hangs_is_left_behind() -> None:
    answer = threading.Event()
    try:
        with pytest.raises(DriverError, match=r"no answer from the driver in 0\.01 s"):
            within(0.01, answer.wait)
    finally:
        answer.set()
    assert within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_what_shares_the_hosts_memory_is_used_only_if_it_is_declared_or_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own = FakeCards([card("1", "0000:03:00.0"), Card(key="2", name="780M", pci_id="0000:43:00.0", integrated=True)])
    backend = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [lambda: own], {})
    assert [device.device_id for device in backend.devices([])] == ["gpu:1"]
    assert caplog.messages == [
        "gpu:0 (AMD Radeon RX 7900 XTX (RADV NAVI31)) is integrated, so it is not used unless declared"
    ]
    assert [device.device_id for device in backend.devices([Declared("gpu:0")])] == ["gpu:0"]
    own.found = [Card(key=entry.key, name="780M", pci_id=entry.pci_id, integrated=True) for entry in own.found]
    alone = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [lambda: own], {})
    assert [device.device_id for device in alone.devices([])] == ["gpu:0", "gpu:1"]


def test_a_binary_is_asked_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    build = script(tmp_path, TWO_CARDS.replace("case", f"echo >>{count}\ncase", 1))
    backend = ListedBackend("vulkan", build, [], {})
    assert backend.devices([]) == backend.devices([])
    assert count.read_text() == "\n"


def test_nvidias_driver_measures_a_vulkan_device(tmp_path: Path) -> None:
    nvml = FakeNvml(
        gpus=[FakeGpu(uuid=UUIDS[0], bus_id="00000000:03:00.0"), FakeGpu(uuid=UUIDS[1], bus_id="00000000:43:00.0")]
    )
    nvml.gpus[0].utilization = 80
    backend = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [lambda: NvidiaCards(NvmlDriver(nvml))], {})
    first, second = backend.discover()
    assert (first.uuid, second.uuid) == (UUIDS[1], UUIDS[0])
    assert (backend.read(first, 1.0).utilization_ratio, backend.read(second, 1.0).utilization_ratio) == (0.37, 0.8)
    # Vulkan's own number pins: the UUID is NVIDIA's.
    assert backend.child_env(first)["GGML_VK_VISIBLE_DEVICES"] == "0"
    backend.close()
    assert nvml.initialised == 0


def test_a_driver_that_fails_to_list_its_cards_costs_the_readings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml(gpus=[FakeGpu(uuid=UUIDS[0], bus_id="00000000:03:00.0")])
    backend = ListedBackend("vulkan", script(tmp_path, TWO_CARDS), [lambda: NvidiaCards(NvmlDriver(nvml))], {})
    nvml.error = pynvml.NVML_ERROR_UNKNOWN
    assert len(backend.discover()) == 2
    assert caplog.messages == ["some devices can't be measured: NVML: Unknown Error"]


def test_a_build_that_does_not_tell_addresses_costs_the_readings(tmp_path: Path) -> None:
    gone = script(tmp_path, "#!/bin/sh\nexit 1\n")
    devices = [listed("NVIDIA L4", 22 * GIB)]
    assert identified(devices, gone, {}) == devices
    assert identified(devices, Build(tmp_path / "none"), {}) == devices
    assert identified([], gone, {}) == []


def test_of_two_cards_none_is_guessed(tmp_path: Path) -> None:
    two = [card("7", "0000:03:00.0"), card("8", "0000:43:00.0")]
    (device,) = ListedBackend("rocm", script(tmp_path, ONE_ROCM), [lambda: FakeCards(two)], {}).discover()
    assert (device.uuid, device.pci_id, device.integrated) == (None, None, None)


def listed(description: str, total: int, pci_id: str | None = None) -> ListedDevice:
    return ListedDevice(
        name="CUDA0",
        backend="cuda",
        description=description,
        memory_total_bytes=total,
        memory_free_bytes=0,
        pci_id=pci_id,
    )


def test_without_an_address_a_card_is_found_by_name_and_memory_if_only_one_fits() -> None:
    cards = [
        Card(key="0", name="NVIDIA L4", pci_id="0000:01:00.0", memory_total_bytes=23 * GIB),
        Card(key="1", name="NVIDIA A10", pci_id="0000:02:00.0", memory_total_bytes=23 * GIB),
        Card(key="2", name="NVIDIA A10", pci_id="0000:03:00.0", memory_total_bytes=46 * GIB),
    ]
    assert match(listed("NVIDIA L4", 22 * GIB), cards) == 0
    assert match(listed("NVIDIA A10", 46 * GIB), cards) == 2
    assert match(listed("NVIDIA L4", 10 * GIB), cards) is None
    assert match(listed("NVIDIA L4", 22 * GIB), [cards[0], cards[0]]) is None
    # The address counts alone, where there is one.
    assert match(listed("NVIDIA L4", 22 * GIB, "0000:03:00.0"), cards) == 2
    assert match(listed("NVIDIA L4", 22 * GIB, "0000:09:00.0"), cards) is None
