"""Intel's and Apple's GPUs, with trees as the kernel's documents describe them, and with text as `ioreg` prints it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.cgroup_trees import lay
from fakes.drm_trees import lay_card
from nodeagent.devices.apple import AppleCards, run_ioreg
from nodeagent.devices.backend import DriverError
from nodeagent.devices.cards import Card
from nodeagent.devices.intel import IntelCards
from nodeagent.devices.values import DeviceMetrics

XE = "0000:03:00.0"
IDLE = "tile0__gt{}__gtidle__idle_residency_ms"


def lay_xe(root: Path, microjoules: int, *idle_ms: int) -> Path:
    """An Arc card with a graphics and a media part."""
    files = {IDLE.format(part): f"{idle}\n" for part, idle in enumerate(idle_ms)}
    files["hwmon__hwmon5__energy1_input"] = f"{microjoules}\n"
    files |= {"hwmon__hwmon5__energy2_input": "7\n", "hwmon__hwmon5__temp2_input": "52000\n", "power__control": "on\n"}
    return lay_card(root, "card1", "xe", XE, **files)


def test_power_and_utilisation_of_an_xe_card_are_differences_between_readings(tmp_path: Path) -> None:
    lay_xe(tmp_path, 5_000_000, 1000, 1000)
    source = IntelCards(tmp_path)
    (card,) = source.cards()
    assert card == Card(key=XE, name="", pci_id=XE, integrated=False)
    assert source.read(card, 10.0) == DeviceMetrics(measured_at=10.0, temperature_celsius=52.0)
    # In 2 s it took 240 J; its graphics part idled for half a second, the media part all the time.
    lay_xe(tmp_path, 245_000_000, 1500, 3000)
    assert source.read(card, 12.0) == DeviceMetrics(
        measured_at=12.0, utilization_ratio=0.75, temperature_celsius=52.0, power_watts=120.0
    )
    lay_xe(tmp_path, 1, 0, 0)  # the driver was loaded again
    reading = source.read(card, 14.0)
    assert (reading.utilization_ratio, reading.power_watts) == (None, None)
    source.close()


def test_an_i915_card_has_other_files_and_the_address_says_that_it_is_integrated(tmp_path: Path) -> None:
    def lay_i915(microjoules: int, idle_ms: int) -> None:
        files = {"hwmon__hwmon0__energy1_input": f"{microjoules}\n", "hwmon__hwmon0__temp1_input": "40000\n"}
        lay_card(tmp_path, "card0", "i915", "0000:00:02.0", **files)
        lay(tmp_path, "sys/class/drm/card0/gt/gt0/rc6_residency_ms", f"{idle_ms}\n")

    lay_i915(0, 0)
    source = IntelCards(tmp_path)
    (card,) = source.cards()
    assert card.integrated
    assert source.read(card, 0.0).power_watts is None
    lay_i915(15_000_000, 900)
    reading = source.read(card, 1.0)
    assert (reading.power_watts, reading.temperature_celsius) == (15.0, 40.0)
    assert reading.utilization_ratio == pytest.approx(0.1)


def test_an_intel_card_without_counters_or_that_sleeps_is_unknown(tmp_path: Path) -> None:
    device = lay_card(tmp_path, "card0", "xe", XE, power__runtime_status="active\n")
    source = IntelCards(tmp_path)
    (card,) = source.cards()
    assert [source.read(card, now) for now in (1.0, 2.0)] == [DeviceMetrics(measured_at=now) for now in (1.0, 2.0)]
    device.joinpath("power/runtime_status").write_text("suspended\n")
    assert source.read(card, 3.0).measured_at == 2.0


def test_a_host_without_intels_cards_has_no_driver(tmp_path: Path) -> None:
    lay_card(tmp_path, "card0", "amdgpu", XE)
    with pytest.raises(DriverError) as caught:
        IntelCards(tmp_path)
    assert caught.value.absent


# In the form of `ioreg -r -c IOGPU -d 1 -f` on an M2 Max.
IOREG = """+-o AGXAcceleratorG14X  <class AGXAcceleratorG14X, id 0x1000003d6, registered, matched, active, busy 0 (12 ms), retain 151>
    {
      "IOClass" = "AGXAcceleratorG14X"
      "gpu-core-count" = 38
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Alloc system memory"=9512304640,"Tiler Utilization %"=11,"Device Utilization %"=23,"In use system memory"=4294967296,"Renderer Utilization %"=22}
      "model" = "Apple M2 Max"
    }

"""  # noqa: E501


def test_apples_gpu_is_read_from_ioreg() -> None:
    source = AppleCards(lambda _command: IOREG)
    (card,) = source.cards()
    assert card == Card(key="Apple M2 Max", name="Apple M2 Max", integrated=True)
    assert source.read(card, 4.0) == DeviceMetrics(measured_at=4.0, memory_used_bytes=4 << 30, utilization_ratio=0.23)
    source.close()


def test_values_that_ioreg_does_not_print_are_unknown() -> None:
    source = AppleCards(lambda _command: '"model" = "Apple M9"')
    assert source.read(source.cards()[0], 4.0) == DeviceMetrics(measured_at=4.0)


def test_without_a_gpu_or_without_ioreg_the_driver_is_absent() -> None:
    def missing(_command: Sequence[str]) -> str:
        raise DriverError("ioreg: not found", absent=True)

    for run in (missing, lambda _command: ""):
        with pytest.raises(DriverError) as caught:
            AppleCards(run)
        assert caught.value.absent


@pytest.mark.real
def test_the_command_is_run_and_its_failures_are_told() -> None:
    assert run_ioreg(["echo", "a", "b"]) == "a b\n"
    with pytest.raises(DriverError, match="no-such-ioreg: not found"):
        run_ioreg(["no-such-ioreg"])
    with pytest.raises(DriverError, match=r"sh: broken \(exit 3\)"):
        run_ioreg(["sh", "-c", "echo broken >&2; exit 3"])
    with pytest.raises(DriverError, match="Permission denied"):
        run_ioreg(["/"])
