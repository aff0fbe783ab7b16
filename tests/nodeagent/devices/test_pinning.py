"""The variables that keep a child to one device."""

import pytest

from nodeagent.devices.pinning import entries, pin, pin_all


@pytest.mark.parametrize(
    ("backend", "environ", "count", "names"),
    [
        ("vulkan", {}, 2, ["0", "1"]),
        # Vulkan's list is in the order of the mask, and an entry may repeat.
        ("vulkan", {"GGML_VK_VISIBLE_DEVICES": "3,1"}, 2, ["3", "1"]),
        ("vulkan", {"GGML_VK_VISIBLE_DEVICES": "0,0"}, 2, ["0", "0"]),
        ("vulkan", {"GGML_VK_VISIBLE_DEVICES": "0,7"}, 1, None),
        ("rocm", {"ROCR_VISIBLE_DEVICES": "2,1"}, 2, ["2", "1"]),
        ("rocm", {"ROCR_VISIBLE_DEVICES": "GPU-5f0c2a1b3d4e5f60"}, 1, ["GPU-5f0c2a1b3d4e5f60"]),
        # The second mask counts what the first one left.
        ("rocm", {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, 1, ["3"]),
        ("rocm", {"HIP_VISIBLE_DEVICES": "1"}, 1, ["1"]),
        # HIP obeys CUDA's mask where it has none of its own.
        ("rocm", {"CUDA_VISIBLE_DEVICES": "1"}, 1, ["1"]),
        ("rocm", {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, 1, ["0"]),
        ("rocm", {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "5"}, 1, None),
        ("sycl", {"ONEAPI_DEVICE_SELECTOR": "level_zero:1;level_zero:0"}, 2, ["1", "0"]),
        ("sycl", {"ONEAPI_DEVICE_SELECTOR": "level_zero:1,2"}, 2, ["1", "2"]),
        ("sycl", {"ONEAPI_DEVICE_SELECTOR": "*:gpu"}, 1, None),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1"}, 1, ["1"]),
        ("metal", {}, 1, ["0"]),
    ],
)
def test_a_device_is_called_what_the_masks_of_the_agent_call_it(
    backend: str, environ: dict[str, str], count: int, names: list[str] | None
) -> None:
    assert entries(backend, environ, count) == names


@pytest.mark.parametrize(
    ("backend", "listed", "entry", "shown", "args"),
    [
        ("vulkan", "Vulkan1", "1", {"GGML_VK_VISIBLE_DEVICES": "1"}, ("--device", "Vulkan0")),
        (
            "rocm",
            "ROCm2",
            "2",
            {"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"},
            ("--device", "ROCm0"),
        ),
        (
            "sycl",
            "SYCL1",
            "1",
            {
                "ONEAPI_DEVICE_SELECTOR": "level_zero:1",
                "ZES_ENABLE_SYSMAN": "1",
                "UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS": "1",
            },
            ("--device", "SYCL0"),
        ),
        (
            "cuda",
            "CUDA1",
            "GPU-a",
            {"CUDA_VISIBLE_DEVICES": "GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            ("--device", "CUDA0"),
        ),
    ],
)
def test_a_child_sees_its_own_device_and_those_of_no_other_backend(
    backend: str, listed: str, entry: str, shown: dict[str, str], args: tuple[str, ...]
) -> None:
    found = pin(backend, listed, entry)
    drivers = {} if backend == "vulkan" else {"VK_LOADER_DRIVERS_DISABLE": "*"}
    assert {name: value for name, value in found.env.items() if value} == shown | drivers
    hidden = {name for name, value in found.env.items() if not value}
    assert hidden | set(shown) >= {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"}
    assert found.args == args


@pytest.mark.parametrize(
    ("backend", "devices", "shown", "args"),
    [
        (
            "cuda",
            [("CUDA0", "GPU-b"), ("CUDA0", "GPU-a")],
            {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            "CUDA0,CUDA1",
        ),
        (
            "rocm",
            [("ROCm3", "GPU-b"), ("ROCm1", "GPU-a")],
            {"ROCR_VISIBLE_DEVICES": "GPU-b,GPU-a", "HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"},
            "ROCm0,ROCm1",
        ),
        ("vulkan", [("Vulkan2", "4"), ("Vulkan0", "1")], {"GGML_VK_VISIBLE_DEVICES": "4,1"}, "Vulkan0,Vulkan1"),
        ("vulkan", [("Vulkan0", "0"), ("Vulkan1", "0")], {"GGML_VK_VISIBLE_DEVICES": "0,0"}, "Vulkan0,Vulkan1"),
        (
            "sycl",
            [("SYCL2", "2"), ("SYCL0", "0")],
            {
                "ONEAPI_DEVICE_SELECTOR": "level_zero:0,2",
                "ZES_ENABLE_SYSMAN": "1",
                "UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS": "1",
            },
            "SYCL1,SYCL0",
        ),
    ],
)
def test_a_child_that_spans_devices_sees_all_of_them_in_their_order(
    backend: str, devices: list[tuple[str, str | None]], shown: dict[str, str], args: str
) -> None:
    found = pin_all(backend, devices)
    drivers = {} if backend == "vulkan" else {"VK_LOADER_DRIVERS_DISABLE": "*"}
    assert {name: value for name, value in found.env.items() if value} == shown | drivers
    assert found.args == ("--device", args)


def test_devices_that_the_vendor_does_not_number_are_spanned_by_their_names() -> None:
    assert pin_all("vulkan", [("Vulkan1", None), ("Vulkan0", "0")]).args == ("--device", "Vulkan1,Vulkan0")


def test_without_a_number_of_the_vendors_only_the_list_pins() -> None:
    assert pin("vulkan", "Vulkan1", None).args == ("--device", "Vulkan1")
    assert pin("vulkan", "Vulkan1", None).env == {}
    assert pin("sycl", "SYCL1", None).env == {
        "ZES_ENABLE_SYSMAN": "1",
        "UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS": "1",
    }
    # An inherited mask stays as it is: the list was made with it.
    assert "HIP_VISIBLE_DEVICES" not in pin("rocm", "ROCm1", None).env


def test_there_is_nothing_to_hide_from_metal() -> None:
    assert pin("metal", "MTL0", "0").args == ("--device", "MTL0")
    assert pin("metal", "Metal", "0").args == ("--device", "Metal")
    assert pin("metal", "MTL0", "0").env == {}
