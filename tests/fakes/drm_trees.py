"""sys below a folder, with graphics cards as the kernel's drivers show them."""

from pathlib import Path

from fakes.cgroup_trees import lay

GIB = 1 << 30


def lay_card(root: Path, name: str, driver: str, pci_id: str, **files: str) -> Path:
    """/sys/class/drm/`name` with these files of its device, `__` for a slash in their names; return the device."""
    device = f"sys/class/drm/{name}/device"
    lay(root, f"{device}/uevent", f"DRIVER={driver}\nPCI_CLASS=30000\nPCI_ID=1002:744C\nPCI_SLOT_NAME={pci_id}\n")
    for file, text in files.items():
        lay(root, f"{device}/{file.replace('__', '/')}", text)
    return root / device


def lay_discrete_amd(root: Path, name: str = "card1", pci_id: str = "0000:03:00.0", **files: str) -> Path:
    """A Radeon RX 7900 XTX with a model on it. The values' forms are those of the kernel's documents."""
    values = {
        "power__runtime_status": "active\n",
        "power__control": "auto\n",
        "vendor": "0x1002\n",
        "product_name": "AMD Radeon RX 7900 XTX\n",
        "unique_id": "5f0c2a1b3d4e5f60\n",
        "mem_info_vram_total": f"{24 * GIB}\n",
        "mem_info_vram_used": f"{6 * GIB}\n",
        "mem_info_gtt_total": f"{32 * GIB}\n",
        "mem_info_gtt_used": f"{GIB}\n",
        "gpu_busy_percent": "37\n",
        "hwmon__hwmon3__power1_average": "287000000\n",
        "hwmon__hwmon3__temp1_input": "61000\n",
        "hwmon__hwmon3__temp1_label": "edge\n",
        "hwmon__hwmon3__temp2_input": "78000\n",
        "hwmon__hwmon3__temp2_label": "junction\n",
    }
    return lay_card(root, name, "amdgpu", pci_id, **values | files)


def lay_kfd(root: Path, node: int, minor: int, pci_id: str, *, gfx: int = 110000, cpu_cores: int = 0) -> None:
    """A GPU in the topology of KFD, and its render node."""
    lay(
        root,
        f"sys/class/kfd/kfd/topology/nodes/{node}/properties",
        f"cpu_cores_count {cpu_cores}\nsimd_count 192\ngfx_target_version {gfx}\ndrm_render_minor {minor}\n"
        "unique_id 6849028358385852256\n",
    )
    lay(root, f"sys/class/drm/renderD{minor}/device/uevent", f"DRIVER=amdgpu\nPCI_SLOT_NAME={pci_id}\n")
