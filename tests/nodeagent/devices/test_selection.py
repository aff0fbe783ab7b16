"""Which backend is selected, by what the llama-server binary lists and what the drivers say."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pynvml
import pytest

from fakes.declared import Declared
from fakes.nvml import FakeGpu, FakeNvml
from nodeagent.devices.backend import Backend, Build, DriverError
from nodeagent.devices.cpu import CpuBackend
from nodeagent.devices.cuda import CudaBackend
from nodeagent.devices.listing import ListedDevice, parse_listing
from nodeagent.devices.nvml_driver import NvmlDriver
from nodeagent.devices.selection import BACKENDS, Listing, Open, select
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import ConfigError, StartupError

BUILD = Build(Path("/opt/llama-server"))
CUDA = "  CUDA0: NVIDIA L4 (23034 MiB, 22544 MiB free)\n"
VULKAN = "  Vulkan0: NVIDIA L4 (23034 MiB, 22544 MiB free)\n"
NO_LIBRARY = DriverError("no library", absent=True)


class FakeVulkan(CpuBackend):
    """Any backend with a device does; what differs is how it was opened."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build


def cuda_on(nvml: FakeNvml, mask: str | None = None) -> Open:
    return lambda _build: CudaBackend(NvmlDriver(nvml), {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})


def failing(error: DriverError) -> Open:
    def open_it(_build: Build) -> Backend:
        raise error

    return open_it


def listing(rows: str) -> Listing:
    return lambda _build, _environ: parse_listing("Available devices:\n" + rows)


def no_listing(_build: Build, _environ: Mapping[str, str]) -> list[ListedDevice]:
    raise DriverError("/opt/llama-server --list-devices: invalid argument (exit 1)")


def chosen(rows: str | Listing, name: str = "auto", declared: Sequence[Declared] = (), **opens: Open) -> Backend:
    said = rows if callable(rows) else listing(rows)
    return select(name, declared, BUILD, backends={**BACKENDS, **opens}, listing=said, cards=list)


def one_gpu() -> FakeNvml:
    return FakeNvml(gpus=[FakeGpu(uuid="GPU-a")])


def test_auto_selects_the_backend_whose_devices_the_binary_lists() -> None:
    assert chosen(CUDA, cuda=cuda_on(one_gpu())).name == "cuda"
    backend = chosen(VULKAN, cuda=cuda_on(one_gpu()), vulkan=FakeVulkan)
    assert isinstance(backend, FakeVulkan), "a Vulkan build can't use CUDA, although the host has an NVIDIA GPU"
    assert backend.build == BUILD


def test_auto_prefers_the_vendors_own_backend_where_one_binary_has_both() -> None:
    assert chosen(VULKAN + CUDA, cuda=cuda_on(one_gpu()), vulkan=FakeVulkan).name == "cuda"


def test_auto_goes_on_to_vulkan_if_the_vendors_backend_fails(caplog: pytest.LogCaptureFixture) -> None:
    mismatch = DriverError("Failed to initialize NVML: Driver/library version mismatch")
    assert isinstance(chosen(VULKAN + CUDA, cuda=failing(mismatch), vulkan=FakeVulkan), FakeVulkan)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "version mismatch" in caplog.text


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("", "/opt/llama-server lists no GPU here"),
        ("  Future0: A card (100 MiB, 100 MiB free)\n", "/opt/llama-server lists only Future0 here"),
        ("  BLAS: OpenBLAS (0 MiB, 0 MiB free)\n", "/opt/llama-server lists no GPU here"),
    ],
)
def test_auto_selects_the_cpu_if_the_binary_can_use_no_gpu_and_says_why(
    rows: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert chosen(rows, cuda=cuda_on(one_gpu())).name == "cpu"
    assert caplog.messages == [f"using the CPU: {why}"]


def test_auto_warns_of_cards_that_the_binary_can_not_use(caplog: pytest.LogCaptureFixture) -> None:
    backend = select("auto", (), BUILD, listing=listing(""), cards=lambda: ["NVIDIA L4", "NVIDIA L4"])
    assert backend.name == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    why = "/opt/llama-server lists no GPU here, although this host has NVIDIA L4, NVIDIA L4"
    assert caplog.messages == [f"using the CPU: {why}"]


def test_auto_asks_nvidias_driver_if_the_binary_does_not_list_its_devices(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(no_listing, cuda=cuda_on(one_gpu())).name == "cuda"
    assert "--list-devices: invalid argument" in caplog.text
    caplog.set_level(logging.INFO)
    assert chosen(no_listing, cuda=failing(NO_LIBRARY)).name == "cpu"
    assert caplog.messages[-1] == "using the CPU: backend cuda can't be used: no library"


def test_auto_selects_the_cpu_if_the_driver_fails_to_list_its_gpus(caplog: pytest.LogCaptureFixture) -> None:
    nvml = one_gpu()
    driver = NvmlDriver(nvml)
    nvml.error = pynvml.NVML_ERROR_UNKNOWN
    assert chosen(CUDA, cuda=lambda _build: CudaBackend(driver, {})).name == "cpu"
    assert "Unknown Error" in caplog.text


def test_auto_selects_the_cpu_and_releases_the_driver_if_the_mask_hides_every_gpu() -> None:
    nvml = one_gpu()
    assert chosen(CUDA, cuda=cuda_on(nvml, mask="")).name == "cpu"
    assert nvml.initialised == 0


def test_auto_selects_the_backend_of_the_declared_devices() -> None:
    gpu, cpu = [Declared("gpu:0")], [Declared("cpu:0")]
    assert chosen(CUDA, declared=cpu, cuda=cuda_on(one_gpu())).name == "cpu"
    assert chosen(CUDA, declared=gpu, cuda=cuda_on(one_gpu())).name == "cuda"
    with pytest.raises(StartupError, match="no library"):
        chosen(CUDA, declared=gpu, cuda=failing(NO_LIBRARY))
    with pytest.raises(StartupError, match="lists no GPU here"):
        chosen("", declared=gpu, cuda=cuda_on(one_gpu()))


def test_a_backend_that_is_configured_by_name_is_never_replaced() -> None:
    with pytest.raises(StartupError, match="backend cuda can't be used: no library"):
        chosen("", "cuda", cuda=failing(NO_LIBRARY))


def test_devices_of_several_backends_are_each_handled_by_their_own(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(gpus=[FakeGpu(uuid="GPU-a", bus_id="00000000:01:00.0")])

    def cuda(build: Build) -> Backend:
        return CudaBackend(NvmlDriver(nvml), {}, id_prefix=build.id_prefix)

    declared = [Declared("cpu:1", threads=2), Declared("gpu:0", env={"A": "b"}), Declared("cpu:0"), Declared("cuda:0")]
    backend = chosen(CUDA, declared=declared, cuda=cuda)
    devices = backend.devices(declared)
    assert [device.device_id for device in devices] == ["cpu:1", "gpu:0", "cpu:0", "cuda:0"]
    assert (devices[0].threads, devices[1].env, devices[1].pci_id) == (2, {"A": "b"}, "0000:01:00.0")
    assert backend.child_args(devices[0]) == ["--device", "none"]
    assert backend.child_env(devices[1])["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert backend.child_env(devices[2])["CUDA_VISIBLE_DEVICES"] == ""
    assert backend.read(devices[1], 1.0).power_watts == 16.54
    assert caplog.messages == ["gpu:0, cuda:0 are one card (0000:01:00.0): their servers share its memory"]
    assert {device.device_id for device in backend.discover()} == {"cpu:0", "gpu:0", "cuda:0"}
    assert nvml.initialised == 2
    backend.close()
    assert nvml.initialised == 0


def test_a_device_with_a_build_of_its_own_is_looked_for_with_that_build() -> None:
    opened: list[Build] = []

    def vulkan(build: Build) -> Backend:
        opened.append(build)
        return FakeVulkan(build)

    mine = Declared("vulkan:0", llama_server_bin="/opt/vulkan/llama-server", env={"A": "b"})
    chosen("", declared=[mine, Declared("vulkan:1")], vulkan=vulkan)
    assert opened == [
        Build(Path("/opt/vulkan/llama-server"), {"A": "b"}, "vulkan"),
        Build(BUILD.binary, {}, "vulkan"),
    ]


def test_a_device_that_one_of_several_backends_lacks_is_named_by_its_place() -> None:
    declared = [Declared("cpu:0"), Declared("cuda:0"), Declared("cuda:5"), Declared("cpu:1")]
    backend = chosen(
        "", declared=declared, cuda=lambda _build: CudaBackend(NvmlDriver(one_gpu()), {}, id_prefix="cuda")
    )
    with pytest.raises(ConfigError) as caught:
        backend.devices(declared)
    assert [str(problem) for problem in caught.value.problems] == [
        "devices[2].device_id: the backend cuda has no 'cuda:5' here; it has cuda:0"
    ]


def test_if_one_of_several_backends_fails_the_others_are_closed() -> None:
    nvml = one_gpu()
    with pytest.raises(StartupError, match="backend rocm can't be used: no library"):
        chosen("", declared=[Declared("cuda:0"), Declared("rocm:0")], cuda=cuda_on(nvml), rocm=failing(NO_LIBRARY))
    assert nvml.initialised == 0


@pytest.mark.real
def test_without_nvidias_driver_cuda_is_what_the_binary_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a Jetson."""
    monkeypatch.setattr(pynvml, "nvmlInit", failing_init)
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi; the script needs built-in commands only
    binary = tmp_path / "llama-server"
    binary.write_text(f"#!/bin/sh\necho 'Available devices:'\necho '{CUDA.rstrip()}'\n")
    binary.chmod(0o755)
    backend = select("cuda", [Declared("cuda:0")], Build(binary))
    (device,) = backend.devices([Declared("cuda:0")])
    assert (device.device_id, device.name, device.uuid) == ("cuda:0", "NVIDIA L4", None)
    assert backend.child_env(device)["CUDA_VISIBLE_DEVICES"] == "0"
    assert backend.child_args(device) == ["--device", "CUDA0"]
    assert caplog.messages[-1].startswith("the GPUs can't be measured: NVML: ")
    backend.close()
    binary.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(StartupError, match="backend cuda can't be used: NVML"):
        select("cuda", [], Build(binary))


def failing_init() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.mark.real
def test_auto_finds_a_device_that_can_be_read_on_this_host(llama_server: Path) -> None:
    backend = select("auto", [], Build(llama_server))
    try:
        device, *_ = backend.devices([])
        assert isinstance(device, DeviceRef)
        assert backend.read(device, 1.0).measured_at == 1.0
    finally:
        backend.close()
