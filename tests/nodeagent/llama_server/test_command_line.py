import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import httpx
import pytest

from nodeagent.config import ModelConfig, NodeConfig, parse_config
from nodeagent.devices.cpu import CpuBackend
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import read_header
from nodeagent.llama_server.command_line import (
    API_KEY_VARIABLE,
    child_spec,
    command,
    describe,
    inherited_env,
    model_arguments,
)
from supervisor.spec import ChildSpec

if TYPE_CHECKING:
    from supervisor.probe import ProcessView

BINARY = Path("/opt/llama-server")


def cpu(index: int = 0, *, threads: int | None = None, cpus: frozenset[int] | None = None) -> DeviceRef:
    return DeviceRef(device_id=f"cpu:{index}", backend="cpu", index=index, name="CPU", threads=threads, cpus=cpus)


CPU = cpu()
GPU = DeviceRef(device_id="gpu:1", backend="cuda", index=1, name="NVIDIA L4")


@dataclass(frozen=True)
class Pins:
    """The part of a backend that `command_line` uses."""

    env: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] = ()

    def child_env(self, device: DeviceRef) -> Mapping[str, str]:
        return self.env

    def child_args(self, device: DeviceRef) -> Sequence[str]:
        return self.args


NO_PINS = Pins()
KV = Path("/state/kv")


class NeverAsked:
    async def check(self, process: "ProcessView") -> str:
        raise AssertionError("a specification is only a value")


def config(model_keys: str = "", more: str = "") -> NodeConfig:
    text = f"models: [{{model_id: planner, path: /m/planner.gguf{model_keys and ', ' + model_keys}}}]\n{more}"
    return parse_config(text, Path("/etc/node/agent.yaml"))


def model(keys: str = "") -> ModelConfig:
    return config(keys).models[0]


def argv(keys: str = "", device: DeviceRef = CPU, pins: Pins = NO_PINS) -> list[str]:
    return list(command(model(keys), device, pins, BINARY, KV).argv)


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of a flag that may stand there once."""
    assert args.count(flag) <= 1
    return args[args.index(flag) + 1] if flag in args else None


def test_a_server_gets_its_own_port_on_the_loopback_and_the_models_id_as_its_name() -> None:
    assert argv() == [
        "/opt/llama-server",
        *("-m", "/m/planner.gguf"),
        *("-a", "planner"),
        *("--host", "127.0.0.1"),
        *("--port", "0"),
        *("-np", "1"),
        *("--threads-http", "5"),
        "--no-webui",
        "--slots",
        "--metrics",
    ]


def test_the_keys_of_a_model_become_flags() -> None:
    keys = (
        "alias: plan, ctx_size: 8192, batch_size: 256, ubatch_size: 128, threads: 3, threads_batch: 4, "
        "gpu_layers: 99, main_gpu: 0, tensor_split: [1, 0], flash_attn: true, parallel: 2"
    )

    args = argv(keys, GPU)

    flags = ("-a", "-c", "-b", "-ub", "-t", "-tb", "-ngl", "-mg", "-ts", "-fa", "-np", "--threads-http")
    assert [value_of(flag, args) for flag in flags] == [
        *("planner", "8192", "256", "128", "3", "4", "99", "0", "1,0", "on", "2", "6"),
    ]


@pytest.mark.parametrize(("said", "word"), [("true", "on"), ("false", "off"), ("on", "on"), ("auto", "auto")])
def test_flash_attention_always_has_a_value(said: str, word: str) -> None:
    assert value_of("-fa", argv(f"flash_attn: {said}")) == word


@pytest.mark.parametrize(
    ("device", "keys", "threads", "threads_batch"),
    [
        (CPU, "", None, None),
        (cpu(threads=2), "", "2", "2"),
        (cpu(threads=2), "threads: 3", "3", "3"),
        (cpu(threads=2), "threads: 3, threads_batch: 4", "3", "4"),
        (cpu(threads=2), "threads_batch: 4", "2", "4"),
        (cpu(threads=2), "server_args: {t: 6}", "6", None),
        (cpu(threads=2), "server_args: {tb: 6}", "2", "6"),
        (cpu(cpus=frozenset({0, 3, 5})), "", "3", "3"),
        (cpu(threads=1, cpus=frozenset({0, 3})), "", "1", "1"),
    ],
)
def test_the_threads_of_the_model_take_precedence_over_those_of_the_device(
    device: DeviceRef, keys: str, threads: str | None, threads_batch: str | None
) -> None:
    args = argv(keys, device)

    assert (value_of("-t", args), value_of("-tb", args)) == (threads, threads_batch)


def test_server_args_come_last_and_replace_the_agents_defaults() -> None:
    args = argv("server_args: {threads_http: 9, no_mmap: true, mlock: false}")

    assert args[-3:] == ["--threads-http", "9", "--no-mmap"]
    assert args.count("--threads-http") == 1


def test_a_models_arguments_are_only_those_of_its_configuration() -> None:
    said = model("ctx_size: 8, threads: 2, flash_attn: false, server_args: {no_mmap: true, np: 3}")

    assert shlex.join(model_arguments(said)) == "-np 3 -c 8 -fa off -t 2 --no-mmap"


def test_with_several_slots_each_conversation_keeps_its_own_by_default() -> None:
    assert value_of("-sps", argv("parallel: 2")) == "0.95"
    assert value_of("-sps", argv()) is None
    assert value_of("-sps", argv("parallel: 2, server_args: {sps: 0.5}")) == "0.5"
    assert value_of("-sps", argv("parallel: 2, server_args: {cache_ram: 0}")) is None


def test_a_model_with_keep_kv_has_a_folder_for_saved_caches() -> None:
    assert value_of("--slot-save-path", argv("keep_kv: true")) == "/state/kv"
    assert value_of("--slot-save-path", argv()) is None
    assert value_of("--slot-save-path", argv("server_args: {slot_save_path: /mine}")) == "/mine"


def test_the_backend_pins_the_device_by_environment_and_flags() -> None:
    pins = Pins(env={"CUDA_VISIBLE_DEVICES": "1"}, args=("--device", "CUDA0"))

    run = command(model(), GPU, pins, BINARY, KV)

    assert run.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert value_of("--device", run.argv) == "CUDA0"


def test_a_cpu_device_offloads_to_no_gpu() -> None:
    assert value_of("--device", command(model("gpu_layers: 99"), CPU, CpuBackend(), BINARY, KV).argv) == "none"


def test_a_server_inherits_neither_llama_servers_settings_nor_the_variables_of_systemd() -> None:
    environ = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/lib",
        "GGML_VK_VISIBLE_DEVICES": "0",
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "mine",
        "LLAMA_SERVER_ROUTER_PORT": "1",
        "NOTIFY_SOCKET": "/run/n",
        "WATCHDOG_USEC": "1",
        "LISTEN_FDS": "1",
    }

    assert inherited_env(environ) == {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/opt/lib",
        "GGML_VK_VISIBLE_DEVICES": "0",
    }


def spec(more: str = "") -> ChildSpec:
    return child_spec(
        model(),
        cpu(1, cpus=frozenset({1})),
        Pins(env={"PIN": "1"}),
        BINARY,
        config=config(more=more),
        probe=NeverAsked(),
        api_key="s3cret",
        environ={"PATH": "/bin", "LLAMA_ARG_PORT": "80"},
    )


def test_a_child_is_in_the_group_of_its_device_and_has_the_configured_times() -> None:
    child = spec(
        "llama_server_startup_limit_s: 50\nllama_server_probe_interval_s: 0.25\nllama_server_stop_grace_s: 3\n"
    )

    assert (child.child_id, child.group) == ("cpu:1/planner", "cpu:1")
    assert child.cpus == frozenset({1})
    assert (child.start_timeout_s, child.probe_interval_s, child.stop.grace_s) == (50.0, 0.25, 3.0)


def test_the_key_is_only_in_the_environment() -> None:
    child = spec()

    assert child.env == {
        "PATH": "/bin",
        "LLAMA_ARG_SSE_PING_INTERVAL": "2",
        "PIN": "1",
        API_KEY_VARIABLE: "s3cret",
    }
    assert not any("s3cret" in part for part in child.argv)


def test_what_would_be_run_is_shown_as_a_shell_command_for_each_model_and_device() -> None:
    two = parse_config(
        "models: [{model_id: a, path: '/m/my model.gguf'}, {model_id: b, path: /m/b.gguf}]", Path("/etc/agent.yaml")
    )
    pinned = cpu(1, cpus=frozenset({2, 0}))

    shown = describe(two, [CPU, pinned], Pins(env={"PIN": "x y"}), BINARY)

    blocks = shown.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "# a on cpu:0 (CPU)",
        "# a on cpu:1 (CPU), on CPUs 0,2",
        "# b on cpu:0 (CPU)",
        "# b on cpu:1 (CPU), on CPUs 0,2",
    ]
    shell_line = blocks[0].splitlines()[1]
    assert " PIN='x y' " in shell_line, "a name in quotes is no assignment to a shell"
    assert shlex.split(shell_line) == [
        "LLAMA_ARG_SSE_PING_INTERVAL=2",
        "PIN=x y",
        "LLAMA_API_KEY=***",
        *command(two.models[0], CPU, Pins(), BINARY, KV).argv,
    ]


# ---- The real server ----


@contextmanager
def running(child: ChildSpec) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The server, and a client of it that has the key and waits until the model is loaded."""
    with subprocess.Popen(
        child.argv, env=dict(child.env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            headers = {"Authorization": f"Bearer {child.env[API_KEY_VARIABLE]}"}
            with httpx.Client(base_url=address(process.stderr), timeout=10, headers=headers) as client:
                wait_loaded(client)
                yield process, client
        finally:
            process.kill()


def address(stderr: IO[str]) -> str:
    said = []
    for line in stderr:
        said.append(line)
        if match := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
            return match[1]
    raise AssertionError("".join(said))


def wait_loaded(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while client.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_real_server_accepts_every_flag_and_only_its_own_name_and_key(tiny_model: Path, llama_server: Path) -> None:
    whole = parse_config(
        f"""
devices: [{{device_id: cpu:0, threads: 1, cpus: [0]}}]
models:
  - model_id: planner
    path: {tiny_model}
    alias: plan
    ctx_size: 1024
    batch_size: 256
    ubatch_size: 128
    threads: 1
    threads_batch: 1
    gpu_layers: 99
    main_gpu: 0
    tensor_split: [1]
    flash_attn: true
    parallel: 2
    server_args: {{no_warmup: true, cache_type_k: f16, fit: off, kvu: true, reasoning: off}}
""",
        Path("/etc/agent.yaml"),
    )
    child = child_spec(
        whole.models[0], CPU, CpuBackend(), llama_server, config=whole, probe=NeverAsked(), api_key="s3cret", environ={}
    )

    with running(child) as (_process, client):
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["planner"]
        assert len(client.get("/slots").json()) == 2
        assert client.get("/metrics").status_code == 200
        assert client.get("/").status_code == 404
        question = {"messages": [{"role": "user", "content": "ba"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=question).status_code == 200
        client.headers["Authorization"] = "Bearer another"
        assert client.post("/v1/chat/completions", json=question).status_code == 401


def test_the_real_server_stops_soon_after_sigterm_even_in_a_stream(slow_model: Path, llama_server: Path) -> None:
    """What the shorter SSE ping is for: by default it goes on for up to 30 s."""
    slow = parse_config(f"models: [{{model_id: slow, path: {slow_model}}}]", Path("/etc/agent.yaml"))
    child = child_spec(
        slow.models[0], CPU, CpuBackend(), llama_server, config=slow, probe=NeverAsked(), api_key="k", environ={}
    )
    body = {"messages": [{"role": "user", "content": "ba"}], "max_tokens": 4000, "stream": True}
    with running(child) as (process, client), client.stream("POST", "/v1/chat/completions", json=body) as stream:
        # Held: an iterator that is dropped hangs up, and a server without a client stops at once.
        chunks = stream.iter_bytes()
        for _ in range(10):
            next(chunks)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=8) == 0


def test_the_file_of_a_model_decides_on_its_flags(embedder_model: Path) -> None:
    header = read_header(embedder_model)
    run = command(model("server_args: {pooling: cls}"), CPU, NO_PINS, BINARY, KV, header=header)
    assert run.argv[-7:] == ("--embeddings", "-b", "4096", "-ub", "4096", "--pooling", "cls")
    assert "--embeddings" in model_arguments(model(), header)
    assert "--embeddings" in describe(config(), [CPU], NO_PINS, BINARY, headers={"planner": header})
