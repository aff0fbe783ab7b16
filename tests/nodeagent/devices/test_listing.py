"""What a llama-server binary says of its devices, as text."""

import pytest

from nodeagent.devices.listing import ListedDevice, parse_addresses, parse_listing, pci_address

MIB = 1 << 20

# The format of llama.cpp's `--list-devices` (common/arg.cpp) with names that drivers give; the llvmpipe rows are those
# of build b10434 on Mesa 22.3.
LISTED = """load_backend: loaded CPU backend from /opt/libggml-cpu.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23680 MiB free)
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24512 MiB free)
  SYCL1: Intel(R) Arc(TM) A770 Graphics (15473 MiB, 15473 MiB free)
  Vulkan10: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)
  MTL0: Apple M2 Max (21845 MiB, 21845 MiB free)
  Metal: Apple M1 (10922 MiB, 10922 MiB free)
  RPC0[10.0.0.9:50052]: 10.0.0.9:50052 (8192 MiB, 8000 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  Future0: Something (1 MiB, 0 MiB free)
"""


def test_each_row_is_a_device_of_a_backend_but_those_without_memory() -> None:
    found = parse_listing(LISTED)
    assert [(device.name, device.backend) for device in found] == [
        ("CUDA0", "cuda"),
        ("ROCm0", "rocm"),
        ("SYCL1", "sycl"),
        ("Vulkan10", "vulkan"),
        ("MTL0", "metal"),
        ("Metal", "metal"),
        ("RPC0[10.0.0.9:50052]", None),
        ("Future0", None),
    ]
    assert found[0] == ListedDevice(
        name="CUDA0",
        backend="cuda",
        description="NVIDIA GeForce RTX 4090",
        memory_total_bytes=24080 * MIB,
        memory_free_bytes=23680 * MIB,
    )
    assert found[3].description == "llvmpipe (LLVM 15.0.6, 256 bits)"


@pytest.mark.parametrize("text", ["", "Available devices:\n", "Available devices:\n  (none)\n"])
def test_a_list_may_be_empty(text: str) -> None:
    assert parse_listing(text) == []


def test_vulkans_own_lines_say_which_device_shares_the_hosts_memory() -> None:
    # ggml-vulkan.cpp prints them as it starts.
    stderr = (
        "ggml_vulkan: Found 2 Vulkan devices:\n"
        "ggml_vulkan: 0 = AMD Radeon 780M (RADV PHOENIX) (radv) | uma: 1 | fp16: 1 | bf16: 0 | warp size: 64\n"
        "ggml_vulkan: 1 = NVIDIA L4 (NVIDIA) | uma: 0 | fp16: 1 | bf16: 1 | warp size: 32\n"
    )
    rows = "\n".join(f"  Vulkan{number}: card (9 MiB, 9 MiB free)" for number in range(3))
    found = parse_listing(f"Available devices:\n{rows}\n", stderr)
    assert [device.integrated for device in found] == [True, False, None]


def test_addresses_are_read_from_the_log_where_it_names_them() -> None:
    # src/llama.cpp; an id that the backend does not know is "unknown id".
    log = (
        "0.00.1 I llama_prepare_model_devices: using device CUDA0 (NVIDIA L4) (0000:01:00.0) - 22544 MiB free\n"
        "0.00.1 I llama_prepare_model_devices: using device Vulkan1 (llvmpipe (LLVM 15.0.6, 256 bits)) (unknown id)\n"
        "0.00.1 I llama_prepare_model_devices: using device ROCm0 (AMD (R) X) (0000:C3:00.0) - 2048 MiB free\n"
    )
    assert parse_addresses(log) == {"CUDA0": "0000:01:00.0", "ROCm0": "0000:c3:00.0"}


@pytest.mark.parametrize("written", ["0000:C1:00.0", "00000000:C1:00.0", "0:c1:00.0"])
def test_an_address_is_written_as_sysfs_does(written: str) -> None:
    assert pci_address(written) == "0000:c1:00.0"
