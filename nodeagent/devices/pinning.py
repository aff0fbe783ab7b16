"""How a child is kept to its devices, for each backend: variables of its environment, and `--device`. Pure.

The variables hide the other devices, so that the child does not even open them (each costs memory there). They name
devices by the number that the vendor's own software gives them, or by UUID. If the agent was started with such a
variable, the child's is one entry of it. Then the device that is left has the number 0; several devices that a model
spans are numbered from 0 in their order.

    cuda     CUDA_VISIBLE_DEVICES        "CUDA Environment Variables", NVIDIA's programming guide
    rocm     ROCR_VISIBLE_DEVICES        then HIP_VISIBLE_DEVICES, else CUDA_VISIBLE_DEVICES, number what is left anew
    sycl     ONEAPI_DEVICE_SELECTOR      "Environment Variables", Intel's oneAPI DPC++ compiler
    vulkan   GGML_VK_VISIBLE_DEVICES     llama.cpp's own; in the order of the Vulkan loader; an entry may repeat
    metal    -                           there is one GPU
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

# What hides all devices of a backend. There is nothing of the kind for SYCL's ONEAPI_DEVICE_SELECTOR. A Vulkan build
# loads every driver of the host to count the devices, though it may see none: that takes 20 ms where the drivers are in
# the page cache, and 500 ms where they are not. The last variable keeps the loader from it ("Driver Filtering" in the
# Vulkan loader's LoaderDriverInterface.md; loaders before 1.3.234 ignore it).
_HIDES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "cuda": {"CUDA_VISIBLE_DEVICES": ""},
        "rocm": {"HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""},
        "vulkan": {"GGML_VK_VISIBLE_DEVICES": "", "VK_LOADER_DRIVERS_DISABLE": "*"},
    }
)


class Rule(msgspec.Struct, frozen=True):
    """`masks` are applied one after the other, each to what the one before left; the first pins, by `entry`.

    `fixed` are the variables that each child of this backend gets besides; `{}` in them stands for the numbers of the
    devices that are left. With `by_number` these are in the order of the vendor's numbers, whatever the mask's order.
    """

    masks: tuple[str, ...] = ()
    entry: str = "{}"
    fixed: Mapping[str, str] = msgspec.field(default_factory=dict)
    by_number: bool = False


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "cuda": Rule(("CUDA_VISIBLE_DEVICES",), fixed={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        # What ROCR leaves is numbered from 0, and both of the others are obeyed after it: 0 undoes an inherited mask.
        "rocm": Rule(
            ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
            fixed={"HIP_VISIBLE_DEVICES": "{}", "CUDA_VISIBLE_DEVICES": "{}"},
        ),
        # Without the first, free memory is reported as the total; without the second, no buffer exceeds 4 GiB.
        "sycl": Rule(
            ("ONEAPI_DEVICE_SELECTOR",),
            "level_zero:{}",
            {"ZES_ENABLE_SYSMAN": "1", "UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS": "1"},
            by_number=True,
        ),
        "vulkan": Rule(("GGML_VK_VISIBLE_DEVICES",)),
        "metal": Rule(),
    }
)


_MASKS: Final = frozenset(mask for rule in RULES.values() for mask in rule.masks)


class Pin(msgspec.Struct, frozen=True):
    env: Mapping[str, str]
    args: tuple[str, ...] = ()


def entries(backend: str, environ: Mapping[str, str], count: int) -> list[str] | None:
    """How the vendor's software names each of the `count` devices that the masks in this environment leave, in order.

    None if the masks name others than these: then they can't be told apart by number.
    """
    masks = [environ.get(name) for name in RULES[backend].masks]
    if backend == "rocm" and masks[1] is None:
        masks[1] = environ.get("CUDA_VISIBLE_DEVICES")
    names: Sequence[str] | None = None
    for mask in masks:
        if mask is not None and (names := _chosen(mask, names)) is None:
            return None
    if names is None:
        return [str(number) for number in range(count)]
    return list(names) if len(names) == count else None


def others_hidden(backend: str) -> dict[str, str]:
    """The variables that hide the devices of all backends but this one."""
    return {name: value for other, hides in _HIDES.items() if other != backend for name, value in hides.items()}


def pin(backend: str, listed_name: str, entry: str | None) -> Pin:
    """Keep a child to the device that the binary lists by that name, and that the vendor's software calls `entry`.

    Where `entry` is None, only `--device` does it.
    """
    return pin_all(backend, [(listed_name, entry)])


def pin_all(backend: str, devices: Sequence[tuple[str, str | None]]) -> Pin:
    """Keep a child to these devices, each with its listed name and its entry, in this order."""
    rule = RULES[backend]
    entries = [entry for _name, entry in devices if entry is not None]
    if len(entries) < len(devices) or not rule.masks:
        inherited = {name: rule.fixed[name] for name in rule.fixed if name not in _MASKS}
        return Pin(inherited, ("--device", ",".join(name for name, _entry in devices)))
    shown = sorted(entries, key=int) if rule.by_number and all(map(str.isdecimal, entries)) else entries
    # An entry may repeat; each stands for a device of its own, and either will do.
    numbers = range(len(devices)) if shown == entries else map(shown.index, entries)
    names = [re.sub(r"\d+$", str(number), name) for number, (name, _entry) in zip(numbers, devices, strict=True)]
    fixed = {name: text.format(",".join(map(str, range(len(devices))))) for name, text in rule.fixed.items()}
    return Pin(
        {**others_hidden(backend), **fixed, rule.masks[0]: rule.entry.format(",".join(shown))},
        ("--device", ",".join(names)),
    )


def _chosen(mask: str, names: Sequence[str] | None) -> list[str] | None:
    """The entries of a mask, or the names that they number; None if one of them is neither a number nor a UUID."""
    chosen = []
    for entry in re.sub(r"level_zero:", "", mask.replace(";", ",")).split(",") if mask.strip() else []:
        text = entry.strip()
        if text.isdecimal() and names is not None and int(text) < len(names):
            chosen.append(names[int(text)])
        elif names is None and (text.isdecimal() or re.fullmatch(r"GPU-[0-9a-zA-Z-]+", text)):
            chosen.append(text)
        else:
            return None
    return chosen
