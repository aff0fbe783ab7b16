"""The keys that keep a model to devices, and split it across them."""

from pathlib import Path

import pytest

from nodeagent.config import ModelConfig, parse_config
from nodeagent.errors import ConfigError


def configured(keys: str, top: str = "") -> ModelConfig:
    return parse_config(
        f"node_id: box\n{top}\nmodels: [{{model_id: a, path: a.gguf, {keys}}}]", Path("node.yaml")
    ).models[0]


def complaint(keys: str, top: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        configured(keys, top)
    return str(caught.value)


def test_a_model_may_span_devices_with_a_share_for_each() -> None:
    model = configured("devices: [gpu:0, gpu:1], tensor_split: [3, 1], main_gpu: 1, split_mode: row")
    assert model.devices == ("gpu:0", "gpu:1")
    assert (model.tensor_split, model.main_gpu, model.split_mode) == ((3.0, 1.0), 1, "row")
    assert configured("devices: [gpu:0, gpu:1], tensor_split: '0,1'").tensor_split == (0.0, 1.0)
    assert configured("devices: [gpu:0, gpu:1], server_args: {ts: '2,1'}").server_args == {"ts": "2,1"}


def test_a_model_may_be_kept_to_one_device_of_any_kind() -> None:
    assert configured("devices: [cpu:0]").devices == ("cpu:0",)
    assert configured("devices: [gpu:1], tensor_split: [1], main_gpu: 0").devices == ("gpu:1",)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("devices: gpu:0", "models[0].devices: must be a list, found 'gpu:0'"),
        ("devices: [gpu:0, gpu:0]", "models[0].devices[1]: 'gpu:0' is named twice"),
        ("devices: [cpu:0, cpu:1]", "models[0].devices[0]: a model can't span 'cpu:0'"),
        ("devices: [cuda:0, vulkan:0]", "models[0].devices[1]: a model can't span 'cuda:0' and 'vulkan:0'"),
        (
            "devices: [gpu:0, gpu:1], tensor_split: [1]",
            "models[0].tensor_split: must have 2 shares, one for each of `devices`, found [1]",
        ),
        (
            "devices: [gpu:0, gpu:1], tensor_split: [0, 0]",
            "models[0].tensor_split: must have shares from 0 on, one of them above 0, found [0, 0]",
        ),
        (
            "devices: [gpu:0, gpu:1], tensor_split: [-1, 1]",
            "models[0].tensor_split: must have shares from 0 on, one of them above 0, found [-1, 1]",
        ),
        (
            "devices: [gpu:0, gpu:1], main_gpu: 2",
            "models[0].main_gpu: must be from 0 to 1, a place in `devices`, found 2",
        ),
        ("devices: [gpu:1], main_gpu: 1", "models[0].main_gpu: must be 0, found 1: a server sees one device only"),
        ("devices: [gpu:0, gpu:1], main_gpu: -1", "models[0].main_gpu: must be at least 0, found -1"),
        ("devices: [gpu:0, gpu:1], server_args: {mg: 2}", "models[0].server_args.mg: must be from 0 to 1"),
        ("devices: [gpu:0, gpu:1], server_args: {ts: '1,2,3'}", "models[0].server_args.ts: must have 2 shares"),
        ("split_mode: half", "models[0].split_mode: must be 'none', 'layer', 'row' or 'tensor', found 'half'"),
    ],
)
def test_what_is_wrong_is_named(keys: str, said: str) -> None:
    assert said in complaint(keys)


def test_only_declared_devices_can_be_named() -> None:
    said = complaint("devices: [gpu:2]", "devices: [{device_id: gpu:0}, {device_id: gpu:1}]")
    assert "models[0].devices[0]: must be one of the declared `devices` (gpu:0, gpu:1), found 'gpu:2'" in said
