"""AMD's cards, with trees laid out as the kernel's documents describe them."""

from pathlib import Path

import pytest

from fakes.cgroup_trees import lay
from fakes.drm_trees import GIB, lay_card, lay_discrete_amd, lay_kfd
from nodeagent.devices.amdgpu import AmdgpuCards
from nodeagent.devices.backend import DriverError
from nodeagent.devices.cards import Card
from nodeagent.devices.values import DeviceMetrics


def test_a_card_has_the_uuid_that_rocm_takes_and_its_values_have_our_units(tmp_path: Path) -> None:
    lay_discrete_amd(tmp_path)
    lay_kfd(tmp_path, 0, 0, "", cpu_cores=16)
    lay_kfd(tmp_path, 1, 128, "0000:03:00.0")
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    assert card == Card(
        key="0000:03:00.0",
        name="AMD Radeon RX 7900 XTX",
        pci_id="0000:03:00.0",
        uuid="GPU-5f0c2a1b3d4e5f60",
        memory_total_bytes=24 * GIB,
        integrated=False,
    )
    assert source.read(card, 3.0) == DeviceMetrics(
        measured_at=3.0,
        memory_total_bytes=24 * GIB,
        memory_used_bytes=6 * GIB,
        memory_free_bytes=18 * GIB,
        utilization_ratio=0.37,
        temperature_celsius=61.0,
        power_watts=287.0,
    )
    source.close()


@pytest.mark.parametrize("told_by", ["kfd", "gpu_metrics"])
def test_an_apu_uses_the_hosts_memory_beside_its_own(told_by: str, tmp_path: Path) -> None:
    files = {"mem_info_vram_total": f"{GIB // 2}\n", "mem_info_vram_used": f"{GIB // 4}\n", "unique_id": "0\n"}
    device = lay_discrete_amd(tmp_path, "card0", "0000:c1:00.0", **files, product_name="\n")
    if told_by == "kfd":
        lay_kfd(tmp_path, 0, 128, "0000:c1:00.0", gfx=110003, cpu_cores=16)
    else:
        device.joinpath("gpu_metrics").write_bytes(bytes([0x78, 0, 2, 1]))  # its size, then version 2.1
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    assert (card.integrated, card.uuid) == (True, None)
    assert card.memory_total_bytes == 32 * GIB + GIB // 2
    reading = source.read(card, 1.0)
    assert (reading.memory_used_bytes, reading.memory_free_bytes) == (GIB + GIB // 4, 31 * GIB + GIB // 4)
    assert card.name == ("AMD gfx1103" if told_by == "kfd" else "AMD")


def test_cards_are_in_the_order_in_which_rocm_numbers_them(tmp_path: Path) -> None:
    for name, pci_id in (("card0", "0000:03:00.0"), ("card1", "0000:43:00.0"), ("card2", "0000:83:00.0")):
        lay_discrete_amd(tmp_path, name, pci_id)
    lay_card(tmp_path, "card0-DP-1", "amdgpu", "0000:03:00.0")  # a connector
    lay_card(tmp_path, "card9", "ast", "0000:05:00.0")
    for node, minor, pci_id in ((10, 129, "0000:03:00.0"), (2, 130, "0000:43:00.0")):
        lay_kfd(tmp_path, node, minor, pci_id)
    cards = AmdgpuCards(tmp_path).cards()
    assert [card.pci_id for card in cards] == ["0000:43:00.0", "0000:03:00.0", "0000:83:00.0"]
    assert cards[2].integrated is None


def test_what_a_card_does_not_have_is_unknown(tmp_path: Path) -> None:
    lay_card(tmp_path, "card0", "amdgpu", "0000:03:00.0", gpu_busy_percent="garbage", hwmon__hwmon0__name="amdgpu")
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    assert (card.uuid, card.memory_total_bytes) == (None, None)
    assert source.read(card, 1.0) == DeviceMetrics(measured_at=1.0)


def test_the_other_names_of_power_and_temperature_are_read_too(tmp_path: Path) -> None:
    files = {"hwmon__hwmon0__power1_input": "31500000\n", "hwmon__hwmon0__temp2_input": "45000\n"}
    lay_card(tmp_path, "card0", "amdgpu", "0000:03:00.0", **files)
    source = AmdgpuCards(tmp_path)
    reading = source.read(source.cards()[0], 1.0)
    assert (reading.power_watts, reading.temperature_celsius) == (31.5, 45.0)


def test_a_card_that_sleeps_is_not_read_and_the_last_reading_keeps_its_time(tmp_path: Path) -> None:
    device = lay_discrete_amd(tmp_path)
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    awake = source.read(card, 1.0)
    device.joinpath("power/runtime_status").write_text("suspended\n")
    device.joinpath("mem_info_vram_used").write_text("0\n")
    assert source.read(card, 100.0) == awake
    assert awake.measured_at == 1.0
    device.joinpath("power/runtime_status").write_text("active\n")
    assert source.read(card, 102.0).memory_used_bytes == 0


def test_a_card_that_has_slept_all_the_time_is_unknown(tmp_path: Path) -> None:
    lay_discrete_amd(tmp_path, power__runtime_status="suspended\n")
    source = AmdgpuCards(tmp_path)
    assert source.read(source.cards()[0], 5.0) == DeviceMetrics(measured_at=5.0)


@pytest.mark.parametrize(
    ("files", "rests"),
    [
        ({"gpu_busy_percent": "0\n", "mem_info_vram_used": "29000000\n"}, True),
        # A server is there, or the card works, or it never sleeps anyway.
        ({"gpu_busy_percent": "0\n"}, False),
        ({"mem_info_vram_used": "29000000\n"}, False),
        ({"gpu_busy_percent": "0\n", "mem_info_vram_used": "29000000\n", "power__control": "on\n"}, False),
    ],
)
def test_an_idle_card_that_may_sleep_is_read_once_a_minute(files: dict[str, str], rests: bool, tmp_path: Path) -> None:
    lay_discrete_amd(tmp_path, **files)
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    times = [source.read(card, now).measured_at for now in (0.0, 2.0, 59.0, 60.0, 62.0)]
    assert times == ([0.0, 0.0, 0.0, 60.0, 60.0] if rests else [0.0, 2.0, 59.0, 60.0, 62.0])


def test_a_card_that_is_gone_is_an_error_and_no_card_is_an_absent_driver(tmp_path: Path) -> None:
    device = lay_discrete_amd(tmp_path)
    source = AmdgpuCards(tmp_path)
    (card,) = source.cards()
    device.joinpath("uevent").unlink()
    with pytest.raises(DriverError, match=r"the card 0000:03:00\.0 is gone"):
        source.read(card, 1.0)
    with pytest.raises(DriverError) as caught:
        AmdgpuCards(tmp_path)
    assert caught.value.absent


def test_a_folder_of_kfd_that_may_not_be_read_costs_the_order_only(tmp_path: Path) -> None:
    lay_discrete_amd(tmp_path)
    lay(tmp_path, "sys/class/kfd/kfd/topology/nodes/1/properties/not-a-file", "")
    assert [card.pci_id for card in AmdgpuCards(tmp_path).cards()] == ["0000:03:00.0"]
