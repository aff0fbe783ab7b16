"""The real llama-server with wrong values of its flags: operators are told which value is wrong."""

import os
from pathlib import Path

import pytest
import trio

from fakes.one_device import Files, Hooks, Readings
from nodeagent.config import ModelConfig, NodeConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import BackendUnavailable, with_last_lines
from nodeagent.llama_server.command_line import child_spec
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.probe import LlamaServerProbe
from supervisor.supervisor import Supervisor

DEVICE = DeviceRef(device_id="cpu:0", backend="cpu", index=0, name="CPU", memory_total_bytes=2**40)


class NotPinned:
    def child_env(self, _device: DeviceRef) -> dict[str, str]:
        return {}

    def child_args(self, _device: DeviceRef) -> list[str]:
        return []


async def reason_of_a_start(model: ModelConfig, llama_server: Path, state_dir: Path) -> tuple[str, str]:
    """Why the server did not start, for operators: as the refused load has it, and the inventory."""
    config = NodeConfig(models=(model,), state_dir=state_dir)
    probe = LlamaServerProbe(model.model_id, "key")
    child = child_spec(
        model, DEVICE, NotPinned(), llama_server, config=config, probe=probe, api_key="key", environ=os.environ
    )
    supervisor = Supervisor(on_event=lambda event: servers.handle(event))
    servers = DeviceServers(
        DEVICE,
        {"m": model},
        {"m": child},
        "key",
        supervisor=supervisor,
        catalogue=Files(),
        monitor=Readings(),
        hooks=Hooks(),
        patience_s=1000,
    )
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            with pytest.raises(BackendUnavailable) as refused:
                await servers.ensure("m")
            [view] = servers.views()
            nursery.cancel_scope.cancel()
    assert view.reason is not None
    return refused.value.for_operators().reason, with_last_lines(view.reason, view.last_lines)


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("cache-type-k", "foo", '"--cache-type-k": Unsupported cache type: foo'),
        ("flash-attn", "maybe", "unknown value for --flash-attn: 'maybe'"),
        ("ctx-size", "abc", "(given: --ctx-size abc)"),
        ("split-mode", "x", "(given: --split-mode x)"),
        ("rope-scaling", "y", "(given: --rope-scaling y)"),
        ("pooling", "z", "(given: --pooling z)"),
        ("n-gpu-layers", "q", "(given: --n-gpu-layers q)"),
        ("chat-template-file", "/missing/file", "failed to open file '/missing/file'"),
        ("threads", "", "(given: --threads '')"),
        ("no-such-flag", "w", "--no-such-flag"),
    ],
)
async def test_the_reason_names_the_wrong_value_and_has_no_help_text(
    flag: str, value: str, named: str, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = ModelConfig(model_id="m", path=tiny_model, server_args={flag: value})
    for reason in await reason_of_a_start(model, llama_server, tmp_path):
        first = reason.partition("it last printed: ")[2].partition(" | ")[0]
        assert named in first
        assert first.startswith("error")
        for help_text in ("usage", "LLAMA_ARG_", "  "):
            assert help_text not in reason


async def test_the_reason_of_a_file_that_is_no_model_is_the_server_s_error(llama_server: Path, tmp_path: Path) -> None:
    """The server's log is written by a thread, which it does not wait for: on a busy machine it may exit without it."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(2000))
    for _ in range(5):
        reasons = await reason_of_a_start(ModelConfig(model_id="m", path=path), llama_server, tmp_path)
        if all("it last printed: " in reason for reason in reasons):
            break
    for reason in reasons:
        first = reason.partition("it last printed: ")[2].partition(" | ")[0]
        assert "error" in first or "failed" in first
