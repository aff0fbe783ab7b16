import json
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fakes import tiny_models
from nodeagent.config import (
    NodeConfig,
    check_config,
    find_llama_server,
    host_checks,
    host_problems,
    load_config,
    missing_models,
    parse_config,
    read_token,
    require_extras,
)
from nodeagent.config.server_flags import flags_argv
from nodeagent.errors import ConfigError

FILE = Path("/etc/node/agent.yaml")

MINIMAL = "models: [{model_id: planner, path: planner.gguf}]\n"


def parse(text: str) -> NodeConfig:
    return parse_config(textwrap.dedent(text), FILE)


def complaints(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return [str(problem) for problem in caught.value.problems]


def the_complaint(text: str) -> str:
    found = complaints(text)
    assert len(found) == 1, found
    return found[0]


def model(**keys: str) -> str:
    """A configuration of one model with these keys, the values as YAML."""
    return "models: [{model_id: planner, path: planner.gguf" + "".join(f", {k}: {v}" for k, v in keys.items()) + "}]\n"


def test_a_model_alone_is_a_configuration_and_the_rest_has_the_designs_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/op/state")

    config = parse(f"node_id: box\n{MINIMAL}")

    assert config.model_dump() == {
        "listen_host": "127.0.0.1",
        "listen_port": 8081,
        "agent_check_port": None,
        "node_id": "box",
        "node_name": "box",
        "state_dir": config.state_dir,
        "dispatcher_base_url": None,
        "dispatcher_token_file": None,
        "advertise_url": None,
        "heartbeat_interval_s": 10.0,
        "llama_server_bin": None,
        "llama_server_startup_timeout_s": 30.0,
        "llama_server_startup_limit_s": 300.0,
        "llama_server_probe_interval_s": 0.5,
        "llama_server_stop_grace_s": 5.0,
        "restart": {
            "max_restarts": 3,
            "period_s": 60.0,
            "backoff_initial_s": 1.0,
            "backoff_max_s": 60.0,
            "reset_after_s": 300.0,
            "cooldown_s": 60.0,
        },
        "stall_timeout_s": 120.0,
        "memory_settle_timeout_s": 5.0,
        "memory_reserve_bytes": 0,
        "max_pending_requests_per_device": 2,
        "queue_timeout_s": 300.0,
        "stream_ping_s": 15,
        "scheduling": "swap_aware",
        "swap_fairness_s": 30.0,
        "min_residency_s": 2.0,
        "max_models_per_device": 1,
        "concurrent_models": False,
        "abandoned_load_grace_s": 30.0,
        "max_request_bytes": 64 * 1024 * 1024,
        "api_keys": (),
        "allow_unauthenticated": False,
        "tls_cert": None,
        "tls_key": None,
        "tls_client_ca": None,
        "allow_remote_media": False,
        "cors_origins": (),
        "allowed_hosts": (),
        "otlp_endpoint": None,
        "activity": {
            "max_records": 1000,
            "path": None,
            "bodies": False,
            "max_body_bytes": 64 * 1024,
            "max_bodies_bytes": 16 * 1024 * 1024,
        },
        "page": True,
        "preload_ready_timeout_s": 300.0,
        "drain_grace_s": 5.0,
        "shutdown_timeout_s": 30.0,
        "backend": "auto",
        "devices": (),
        "models": (
            {
                "model_id": "planner",
                "path": Path("/etc/node/planner.gguf"),
                "roles": (),
                "ctx_size": None,
                "batch_size": None,
                "ubatch_size": None,
                "threads": None,
                "threads_batch": None,
                "gpu_layers": None,
                "devices": (),
                "split_mode": None,
                "main_gpu": None,
                "tensor_split": None,
                "flash_attn": None,
                "mmproj": None,
                "draft_model": None,
                "loras": (),
                "alias": None,
                "aliases": (),
                "fallback": (),
                "defaults": {},
                "overrides": {},
                "max_request_bytes": None,
                "queue_timeout_s": None,
                "task": None,
                "default": False,
                "preload": False,
                "parallel": 1,
                "restart": None,
                "stall_timeout_s": None,
                "idle_unload_s": None,
                "pinned": False,
                "keep_kv": False,
                "llama_server_bin": None,
                "env": {},
                "server_args": {},
            },
        ),
    }
    assert config.state_dir.parts[-2:] == ("rolemesh-node-agent", "box")


def test_the_startup_limit_follows_the_timeout() -> None:
    assert parse(f"llama_server_startup_timeout_s: 7\n{MINIMAL}").llama_server_startup_limit_s == 70.0


def test_the_node_is_called_after_its_host_and_its_name_after_its_id() -> None:
    config = parse(MINIMAL)

    assert config.node_id
    assert config.node_name == config.node_id


def test_systemds_state_directory_wins_over_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/agent:/var/lib/other")

    assert parse(MINIMAL).state_dir == Path("/var/lib/agent")


def test_relative_paths_start_in_the_files_folder_and_a_tilde_is_the_users_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/op")

    config = parse(
        """
        state_dir: ../state
        dispatcher_token_file: token
        llama_server_bin: ./bin/llama-server
        models:
          - {model_id: a, path: ~/models/a.gguf}
          - {model_id: b, path: /srv/b.gguf}
        """
    )

    assert config.state_dir == Path("/etc/state")
    assert config.dispatcher_token_file == Path("/etc/node/token")
    assert config.llama_server_bin == "/etc/node/bin/llama-server"
    assert [model.path for model in config.models] == [Path("/home/op/models/a.gguf"), Path("/srv/b.gguf")]


def test_a_model_is_found_by_its_id_and_by_its_alias() -> None:
    config = parse("models: [{model_id: a, path: a, alias: b}, {model_id: c, path: c}]")

    assert config.model("a") is config.model("b") is config.models[0]
    assert config.model("c") is config.models[1]
    assert config.model("d") is None


def test_everything_that_is_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    assert complaints(
        """
        listen_hots: 127.0.0.1
        listen_port: "8081"
        queue_timeout_s: 0
        devices:
          - {device_id: cpu:0, thread: 1}
          - {device_id: cpu:0}
        models:
          - model_id: a
            path: a.gguf
            ctx_size: 4096.5
            server_args: {port: 1}
          - model_id: a
        """
    ) == [
        f"{FILE}:2: listen_hots: is not a known key; did you mean listen_host?",
        f"{FILE}:3: listen_port: must be a whole number, found '8081'; remove the quotes",
        f"{FILE}:4: queue_timeout_s: must be more than 0, found 0",
        f"{FILE}:6: devices[0].thread: is not a known key; did you mean threads?",
        f"{FILE}:7: devices[1].device_id: 'cpu:0' is declared twice; the first is devices[0]",
        f"{FILE}:11: models[0].ctx_size: must be a whole number, found 4096.5",
        f"{FILE}:12: models[0].server_args.port: is reserved for the agent: "
        "the agent binds each server to a port of its own on 127.0.0.1",
        f"{FILE}:13: models[1].model_id: 'a' is already the model_id of models[0]; each name must belong to one model",
        f"{FILE}:13: models[1].path: is missing and has no default",
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("listen_port", "65536", "must be at most 65535, found 65536"),
        ("listen_port", "-1", "must be at least 0, found -1"),
        ("listen_port", "true", "must be a whole number, found true"),
        ("listen_port", "", "must be a whole number, found null"),
        ("listen_host", "8", "must be text, found 8; put it in quotes"),
        ("listen_host", "'[::1]'", "must be an IP address without brackets"),
        ("listen_host", "'*'", "must be an IP address without brackets"),
        ("listen_host", "'0'", "must be an IP address without brackets"),
        ("node_id", "a/b", "must be a name of letters, digits and . _ -"),
        ("node_id", "..", "must be a name of letters, digits and . _ -"),
        ("node_name", '"a\\nb"', "must be one line of printable text"),
        ("state_dir", "5", "must be a path, found 5"),
        ("state_dir", "''", "must be a path, found ''"),
        ("dispatcher_base_url", "example.org:80", "must be a URL like"),
        ("dispatcher_base_url", "ftp://example.org", "must be a URL like"),
        ("dispatcher_base_url", "http://", "must be a URL like"),
        ("dispatcher_base_url", "http://a:99999", "must be a URL like"),
        ("dispatcher_base_url", "http://a b", "must be a URL like"),
        ("dispatcher_base_url", "http://a/?x=1", "must end before any ? or #"),
        ("heartbeat_interval_s", "0.5", "must be at least 1, found 0.5"),
        ("heartbeat_interval_s", "301", "must be at most 300, found 301"),
        ("heartbeat_interval_s", "10s", "must be a number, found '10s'"),
        ("heartbeat_interval_s", "[10]", "must be a number, found [10]"),
        ("llama_server_startup_timeout_s", "0", "must be more than 0, found 0"),
        ("llama_server_startup_timeout_s", ".inf", "must be a finite number, found inf"),
        ("llama_server_startup_timeout_s", ".nan", "must be a finite number, found nan"),
        ("llama_server_startup_limit_s", "29", "must be at least llama_server_startup_timeout_s (30), found 29"),
        ("llama_server_probe_interval_s", "0", "must be at least 0.01, found 0"),
        ("llama_server_stop_grace_s", "-1", "must be at least 0, found -1"),
        ("max_pending_requests_per_device", "0", "must be at least 1, found 0"),
        ("max_request_bytes", "64 MiB", "must be a whole number, found '64 MiB'"),
        ("drain_grace_s", "no", "must be a number, found 'no'"),
        ("shutdown_timeout_s", "-0.1", "must be at least 0, found -0.1"),
        ("backend", "tpu", "must be 'auto', 'cpu', 'cuda', 'rocm', 'sycl', 'vulkan' or 'metal', found 'tpu'"),
        ("devices", "cpu:0", "must be a list, found 'cpu:0'"),
        ("devices", "[cpu]", "devices[0]: must be a mapping of keys to values, found 'cpu'"),
        ("devices", "[{device_id: gpu0}]", "must be cpu:0, cpu:1, ... or gpu:0, gpu:1, ... (or of one backend"),
        ("devices", "[{device_id: cpu:0, threads: 0}]", "devices[0].threads: must be at least 1, found 0"),
        ("devices", "[{device_id: cpu:0, cpus: 1}]", "must be a list of CPU numbers like [0, 1], found 1"),
        ("devices", "[{device_id: cpu:0, cpus: []}]", "must be a list of CPU numbers like [0, 1], found []"),
        ("devices", "[{device_id: cpu:0, cpus: [true]}]", "must be a list of CPU numbers like [0, 1], found [True]"),
        ("devices", "[{device_id: cpu:0, cpus: [1, 1]}]", "names a CPU twice, found [1, 1]"),
        ("devices", "[{device_id: gpu:0, env: {A: 1}}]", "must be text, found 1; put it in quotes"),
        ("devices", "[{device_id: gpu:0, env: {A-B: x}}]", "must hold names of environment variables, found 'A-B'"),
        ("devices", "[{device_id: gpu:0, env: {LLAMA_ARG_X: x}}]", "must not set LLAMA_ARG_X: put flags"),
        ("devices", '[{device_id: gpu:0, env: {A: "x\\0"}}]', "must not hold a NUL character, found one in A"),
        ("scheduling", "lifo", "'swap_aware' or 'fifo'"),
        ("agent_check_port", "65536", "must be at most 65535, found 65536"),
        ("agent_check_port", "8081", "must be another port than listen_port, found 8081"),
        ("swap_fairness_s", "0", "must be more than 0, found 0"),
        ("no_such_key", "30", "is not a known key"),
        ("ctx_size", "30", "is not a known key"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_found_and_what_would_be_right(key: str, value: str, said: str) -> None:
    complaint = the_complaint(f"{MINIMAL}{key}: {value}\n")

    assert complaint.startswith(f"{FILE}:2: {key}")
    assert said in complaint


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_id2", "x", "is not a known key; did you mean model_id?"),
        ("cache_type_k", "q8_0", "is not a known key; put flags of llama-server under server_args"),
        ("alias", "'a,b'", "must be a name of letters"),
        ("alias", "planner", "'planner' is already the model_id of models[0]"),
        ("roles", "planner", "must be a list, found 'planner'"),
        ("roles", "[1]", "models[0].roles[0]: must be text, found 1; put it in quotes"),
        ("ctx_size", "-1", "must be at least 0, found -1"),
        ("ctx_size", "'8192'", "must be a whole number, found '8192'; remove the quotes"),
        ("ctx_size", "8192.0", "must be a whole number, found 8192.0"),
        ("ctx_size", "99999999999", "must be at most 2147483647, found 99999999999"),
        ("batch_size", "0", "must be at least 1, found 0"),
        ("ubatch_size", "0", "must be at least 1, found 0"),
        ("threads", "-2", "must be a whole number from 1 to 4096, or -1 for all cores, found -2"),
        ("threads_batch", "0", "must be a whole number from 1 to 4096, or -1 for all cores, found 0"),
        ("gpu_layers", "-2", "must be a whole number from -1 on, all or auto, found -2"),
        ("gpu_layers", "some", "must be a whole number from -1 on, all or auto, found 'some'"),
        ("main_gpu", "1", "must be 0, found 1: a server sees one device only"),
        ("main_gpu", "'0'", "must be a whole number, found '0'"),
        ("tensor_split", "[1, 1]", "must give everything to one device, like [1], found [1, 1]"),
        ("tensor_split", "'3,1'", "must give everything to one device, like [1], found '3,1'"),
        ("tensor_split", "[0, 1]", "must give everything to one device, like [1], found [0, 1]"),
        ("tensor_split", "[]", "must give everything to one device, like [1], found []"),
        ("tensor_split", "[x]", "must be a list of shares like [1], found ['x']"),
        ("tensor_split", "['1']", "must be a list of shares like [1], found ['1']"),
        ("tensor_split", "[true]", "must be a list of shares like [1], found [True]"),
        ("tensor_split", "{}", "must be a list of shares like [1], found a mapping"),
        ("flash_attn", "yes", "must be true, false, on, off or auto, found 'yes'"),
        ("flash_attn", "1", "must be true, false, on, off or auto, found 1"),
        ("preload", "on", "must be true or false, found 'on'"),
        ("preload", "1", "must be true or false, found 1"),
        ("parallel", "0", "must be at least 1, found 0"),
        ("parallel", "1025", "must be at most 1024, found 1025"),
        ("server_args", "[a]", "must be a mapping of keys to values, found ['a']"),
    ],
)
def test_a_wrong_key_of_a_model_is_refused(key: str, value: str, said: str) -> None:
    complaint = the_complaint(model(**{key: value}))

    assert complaint.startswith(f"{FILE}:1: models[0].{key}")
    assert said in complaint


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        *((name, "1", "is reserved for the agent") for name in ("port", "host", "--host", "reuse_port")),
        *(
            (name, "x", "the model is the file")
            for name in ("m", "-m", "model", "mu", "model_url", "hf", "hfr", "hf_repo")
        ),
        *(
            (name, "x", "the model is the file")
            for name in ("dr", "docker-repo", "hff", "hf-file", "hft", "models_dir")
        ),
        *((name, "true", "the model is the file") for name in ("no-models-autoload", "fim_qwen_1.5b_default")),
        *((name, "x", "pins each server to its device") for name in ("dev", "device", "devd", "rpc")),
        *(
            (name, "x", "pins each server to its CPUs")
            for name in ("C", "cpu_mask", "Cr", "cpu-range", "cpu-strict-draft")
        ),
        *((name, "x", "use the key `alias`") for name in ("a", "alias")),
        *((name, "x", "a random key of its own") for name in ("api-key", "api_key", "api_key_file")),
        *((name, "x", "speaks plain HTTP") for name in ("ssl-key-file", "ssl_cert_file")),
        *((name, "x", "has no user but the agent") for name in ("path", "api_prefix", "ui", "no-webui")),
        *((name, "true", "asks the server for its slots") for name in ("slots", "no-slots")),
        *((name, "true", "would print something and exit") for name in ("h", "help", "version", "list_devices", "cl")),
        ("log_disable", "true", "reads the server's output"),
        *((name, "true", "needs a value, found true") for name in ("fa", "ctk", "cache_type_k", "temp", "fit", "np")),
        ("flash-attn", "true", "needs a value, found true (on, off or auto)"),
        *((name, "on", "takes no value, found 'on'; write true") for name in ("mlock", "no_mmap", "kvu", "embeddings")),
        ("mlock", "'true'", "takes no value, found 'true'"),
        ("no-warmup", "1", "takes no value, found 1"),
        ("jinja", "[a, b]", "takes no value, found ['a', 'b']"),
        ("main_gpu", "1", "must be 0, found 1"),
        ("mg", "'1'", "must be 0, found '1'"),
        ("ts", "'3,1'", "must give everything to one device, like [1], found '3,1'"),
        ("tensor_split", "0.5/0.5", "must give everything to one device, like [1], found '0.5/0.5'"),
        ("np", "'4'", "must be a whole number from 1 to 1024, found '4'"),
        ("parallel", "0", "must be a whole number from 1 to 1024, found 0"),
        ("parallel", "[1, 2]", "must be a whole number from 1 to 1024, found [1, 2]"),
        (
            "mlock",
            "{a: 1}",
            "must be text, a number, true, false, null, or a list of texts and numbers, found a mapping",
        ),
        ("lora", "[a, true]", "or a list of texts and numbers, found true"),
        ("host=0.0.0.0", "true", "is not a valid name of a flag"),
        ("no mmap", "true", "is not a valid name of a flag"),
    ],
)
def test_a_flag_that_the_agent_can_not_pass_on_is_refused(flag: str, value: str, said: str) -> None:
    complaint = the_complaint(model(server_args=f"{{'{flag}': {value}}}"))

    assert complaint.startswith(f"{FILE}:1: models[0].server_args.{flag}: ")
    assert said in complaint


@pytest.mark.parametrize("value", ["true", "false", "null", "[]"])
def test_a_flag_without_a_value_is_given_or_left_out(value: str) -> None:
    assert parse_config(model(server_args=f"{{mlock: {value}}}"), FILE).models[0].model_id


@pytest.mark.parametrize("value", ["false", "null"])
def test_an_owned_flag_that_is_left_out_does_no_harm(value: str) -> None:
    assert parse(model(server_args=f"{{port: {value}}}")).models[0].server_args == {
        "port": None if value == "null" else False
    }


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("ctx_size", "1", "c"),
        ("batch_size", "1", "batch-size"),
        ("ubatch_size", "1", "ub"),
        ("threads", "1", "t"),
        ("threads_batch", "1", "threads_batch"),
        ("gpu_layers", "1", "n-gpu-layers"),
        ("flash_attn", "on", "fa"),
        ("main_gpu", "0", "mg"),
        ("split_mode", "none", "sm"),
        ("tensor_split", "[1]", "ts"),
    ],
)
def test_a_flag_that_repeats_a_key_is_refused_but_can_stand_for_it(key: str, value: str, flag: str) -> None:
    flag_value = "1" if key == "tensor_split" else value
    doubled = model(**{key: value, "server_args": f"{{{flag}: {flag_value}}}"})

    assert f"server_args.{flag}: repeats the key `{key}` of this model; remove one" in the_complaint(doubled)
    assert list(parse(model(server_args=f"{{{flag}: {flag_value}}}")).models[0].server_args) == [flag]


def test_two_spellings_of_one_flag_are_refused() -> None:
    assert "server_args.no-mmap: is the same flag as `mmap` above" in the_complaint(
        model(server_args="{mmap: true, no-mmap: true}")
    )


@pytest.mark.parametrize("name", ["np", "parallel", "-np", "--parallel"])
def test_parallel_as_a_flag_means_the_key(name: str) -> None:
    for text in (model(server_args=f"{{{name}: 4}}"), model(parallel="4", server_args=f"{{{name}: 4}}")):
        found = parse(text).models[0]
        assert (found.parallel, found.server_args) == (4, {})


def test_two_different_values_of_parallel_are_refused() -> None:
    assert "server_args.np: is 4, but the key `parallel` of this model is 2" in the_complaint(
        model(parallel="2", server_args="{np: 4}")
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [("true", "on"), ("false", "off"), ("on", "on"), ("off", "off"), ("auto", "auto"), ("", None)],
)
def test_flash_attn_is_a_boolean_or_a_word(written: str, meant: str | None) -> None:
    assert parse(model(flash_attn=written)).models[0].flash_attn == meant


@pytest.mark.parametrize("written", ["[1]", "[1, 0]", "'1,0'", "'1'"])
def test_a_split_that_gives_all_to_one_device_is_taken(written: str) -> None:
    split = parse(model(tensor_split=written)).models[0].tensor_split
    assert split is not None
    assert split[0] == 1.0


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "'0:0:0:0:0:0:0:0'"])
def test_a_dispatcher_has_to_be_told_where_the_node_is(host: str) -> None:
    text = f"{MINIMAL}listen_host: {host}\ndispatcher_base_url: http://d\n"

    assert f"{FILE}:2: listen_host: " in the_complaint(text)
    assert "set advertise_url as well" in the_complaint(text)
    assert parse(f"{text}advertise_url: http://me:1\n").advertise_url == "http://me:1"


def test_a_gpu_is_no_device_of_the_backend_cpu() -> None:
    text = f"{MINIMAL}backend: cpu\ndevices: [{{device_id: gpu:0}}]\n"
    assert "'gpu:0' is not a device of the backend 'cpu'" in the_complaint(text)


def test_devices_of_several_backends_are_taken() -> None:
    text = (
        "backend: cuda\ndevices: [{device_id: gpu:0}, {device_id: vulkan:1, llama_server_bin: v}, {device_id: cpu:0}]\n"
    )
    assert [device.device_id for device in parse(MINIMAL + text).devices] == ["gpu:0", "vulkan:1", "cpu:0"]


def test_an_alias_may_not_be_another_models_name() -> None:
    said = complaints("models: [{model_id: a, path: a, alias: b}, {model_id: b, path: b, alias: a}]")

    assert [line.partition(": ")[2] for line in said] == [
        "models[1].model_id: 'b' is already the alias of models[0]; each name must belong to one model",
        "models[1].alias: 'a' is already the model_id of models[0]; each name must belong to one model",
    ]


def test_a_password_in_a_url_is_refused_without_being_shown() -> None:
    said = the_complaint(f"{MINIMAL}dispatcher_base_url: https://me:hunter2@example.org\n")

    assert "must not hold a user name or password" in said
    assert "hunter2" not in said


def test_a_url_is_held_without_its_last_slash() -> None:
    assert parse(f"{MINIMAL}dispatcher_base_url: https://d.example/mesh/\n").dispatcher_base_url == (
        "https://d.example/mesh"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"{FILE}: must be a mapping of keys to values, found nothing"),
        ("- a\n", f"{FILE}: must be a mapping of keys to values, found ['a']"),
        ("models: []\n", f"{FILE}:1: models: must not be empty, found []"),
        ("node_id: a\n", f"{FILE}: models: is missing and has no default"),
    ],
)
def test_a_file_without_models_is_refused(text: str, said: str) -> None:
    assert the_complaint(text) == said


def test_a_file_that_can_not_be_read_is_one_clear_line(tmp_path: Path) -> None:
    not_text = tmp_path / "latin.yaml"
    not_text.write_bytes("node_name: Köln\n".encode("latin-1"))

    for path, said in (
        (tmp_path / "none.yaml", "can't be read: No such file or directory"),
        (tmp_path, "can't be read: Is a directory"),
        (not_text, "is not UTF-8 text (byte 12)"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert [str(problem) for problem in caught.value.problems] == [f"{path}: {said}"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([*NodeConfig.model_fields, "nothing"]),
    st.sampled_from(["ctx_size", "server_args", "path", "model_id", "alias", "parallel"]),
)
def test_whatever_a_file_says_the_answer_is_a_configuration_or_problems(
    value: object, key: str, model_key: str
) -> None:
    document: Mapping[str, object] = {
        "models": [{"model_id": "a", "path": "a", model_key: value}],
        "devices": [{"device_id": value}],
        key: value,
    }
    problems = []
    try:
        parse_config(yaml.safe_dump(document), FILE)
    except ConfigError as error:
        problems = error.problems
    assert all("\n" not in str(problem) for problem in problems)


def test_the_named_server_is_looked_for_by_path_or_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "my-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    for name in ("my-server", "./my-server", str(binary)):
        config = parse_config(f"{MINIMAL}llama_server_bin: {name}\n", tmp_path / "agent.yaml")
        assert find_llama_server(config) == binary


@pytest.mark.parametrize("name", ["no-such-program", "./missing", "./not-executable"])
def test_a_named_server_that_can_not_be_run_is_a_problem_with_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "not-executable").write_text("")
    config = parse_config(f"{MINIMAL}llama_server_bin: {name}\n", tmp_path / "agent.yaml")

    with pytest.raises(ConfigError) as caught:
        find_llama_server(config)
    [problem] = caught.value.problems
    assert (problem.line, problem.where) == (2, "llama_server_bin")
    assert "must be a program that can be run, found" in problem.message


def test_without_a_name_the_server_is_the_one_on_path_else_the_demo_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_server: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = parse(MINIMAL)
    assert find_llama_server(config) == llama_server

    on_path = tmp_path / "llama-server"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert find_llama_server(config) == on_path


def test_the_token_is_read_without_its_newline(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    text = f"{MINIMAL}dispatcher_token_file: token\n"

    assert read_token(parse_config(text, tmp_path / "agent.yaml")) == "s3cret"
    assert read_token(parse(MINIMAL)) is None


@pytest.mark.parametrize("content", [None, b"", b"a\nb\n", b"a b", "ä".encode(), b"\xff"])
def test_a_token_that_no_header_can_carry_is_a_problem_that_does_not_show_it(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    config = parse_config(f"{MINIMAL}dispatcher_token_file: token\n", tmp_path / "agent.yaml")

    with pytest.raises(ConfigError) as caught:
        read_token(config)
    [problem] = caught.value.problems
    assert (problem.line, problem.where) == (2, "dispatcher_token_file")
    assert "a b" not in problem.message


def test_a_missing_or_broken_model_is_no_fault_of_the_file_but_is_reported_of_the_host(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(100))
    file = tmp_path / "agent.yaml"
    file.write_text(
        f"""\
models:
  - {{model_id: good, path: {tiny_model}}}
  - {{model_id: gone, path: gone.gguf}}
  - {{model_id: broken, path: broken.gguf}}
"""
    )

    config = load_config(file)
    assert [(problem.line, problem.where) for problem in missing_models(config)] == [
        (3, "models[1].path"),
        (4, "models[2].path"),
    ]
    assert [problem.where for problem in check_config(file)[1]] == ["models[1].path", "models[2].path"]


def test_check_config_reports_missing_models_beside_the_files_own_faults(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("listen_port: x\nmodels:\n  - {model_id: gone, path: gone.gguf}\n  - {model_id: bad, path: 5}\n")

    config, problems = check_config(file)

    assert config is None
    assert [(problem.line, problem.where) for problem in problems] == [
        (1, "listen_port"),
        (3, "models[0].path"),
        (4, "models[1].path"),
    ]


def test_check_config_of_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    config, [problem] = check_config(tmp_path / "none.yaml")

    assert config is None
    assert "can't be read" in problem.message


def test_a_cpu_that_this_host_lacks_is_reported_of_the_host(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"devices: [{{device_id: cpu:0, cpus: [4095]}}]\nmodels: [{{model_id: a, path: {tiny_model}}}]\n")

    [problem] = host_problems(load_config(file))

    assert problem.where == "devices[0].cpus"
    assert "names [4095]" in problem.message


def test_the_same_model_in_two_readings_is_equal_and_a_changed_one_is_not() -> None:
    """A reload has to tell which models changed."""
    first, again, changed = (parse(model(ctx_size=size)).models[0] for size in ("1", "1", "2"))

    assert first == again
    assert first != changed


def test_tiny_models_are_good_models(models_dir: Path) -> None:
    path = tiny_models.write_model(tiny_models.TINY, models_dir)

    assert missing_models(parse(f"models: [{{model_id: a, path: {path}}}]")) == []


@pytest.mark.parametrize(
    ("key", "value", "held"),
    [
        ("gpu_layers", "-1", -1),
        ("gpu_layers", "all", "all"),
        ("gpu_layers", "AUTO", "auto"),
        ("gpu_layers", "99999999", 99_999_999),
        ("threads", "-1", -1),
        ("flash_attn", "On", "on"),
    ],
)
def test_what_a_flag_takes_its_key_takes(key: str, value: str, held: object) -> None:
    assert getattr(parse(f"models: [{{model_id: a, path: a, {key}: {value}}}]").models[0], key) == held


@pytest.mark.parametrize("host", ["a..b", ".a", f"{'a' * 64}.example", ".".join(["a" * 50] * 6)])
@pytest.mark.parametrize("key", ["listen_host", "dispatcher_base_url", "advertise_url"])
def test_a_host_name_that_dns_can_not_carry_is_refused(key: str, host: str) -> None:
    value = host if key == "listen_host" else f"http://{host}:8080"
    assert f"{key}: must be" in the_complaint(f"{key}: {value}\n{MINIMAL}")


@given(text=st.text(max_size=40), name=st.from_regex(r"[a-z][a-z-]{0,12}", fullmatch=True))
def test_whatever_text_a_flag_has_the_command_line_can_be_encoded(text: str, name: str) -> None:
    document = json.dumps({"models": [{"model_id": "a", "path": "a.gguf", "server_args": {name: text}}]})
    arguments: list[str] = []
    with suppress(ConfigError):
        config = parse_config(document, Path("/etc/node/agent.yaml"))
        arguments = flags_argv(config.models[0].server_args)
    assert all(b"\0" not in argument.encode() for argument in arguments)


@pytest.mark.parametrize(
    ("origin", "held"),
    [
        ("https://chat.example", "https://chat.example"),
        ("https://Chat.Example:443/", "https://chat.example"),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_an_origin_is_held_as_browsers_send_it(origin: str, held: str) -> None:
    assert parse(f"cors_origins: ['{origin}']\n{MINIMAL}").cors_origins == (held,)


def test_an_allowed_host_is_held_as_browsers_send_it() -> None:
    assert parse(f"allowed_hosts: [Models.Example., box]\n{MINIMAL}").allowed_hosts == ("models.example", "box")


@pytest.mark.parametrize("host", ["*", "*.example", "https://a.example", "a.example:80", "a/b", ""])
def test_what_is_no_host_name_is_refused(host: str) -> None:
    assert "must be a host name like models.example" in the_complaint(f"allowed_hosts: ['{host}']\n{MINIMAL}")


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "ftp://chat.example", "https://a/path", "https://a?q", "https://u@a", "https://a:x"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    assert "must be the origin of a web page like" in the_complaint(f"cors_origins: ['{origin}']\n{MINIMAL}")


def test_a_pinned_model_is_not_unloaded_when_idle() -> None:
    text = "models: [{model_id: a, path: a, pinned: true, idle_unload_s: 60}]"
    assert "models[0].idle_unload_s: contradicts `pinned: true`; remove one of them" in the_complaint(text)


def test_only_one_model_can_be_the_default() -> None:
    text = "models: [{model_id: a, path: a, default: true}, {model_id: b, path: b, default: true}]"
    assert "models[1].default: is true for models[0] already" in the_complaint(text)


def test_traces_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(f"otlp_endpoint: http://127.0.0.1:4318\n{MINIMAL}")
    require_extras(config)
    monkeypatch.setattr(host_checks, "_EXPORTER", "opentelemetry.exporter.no_such.module")
    with pytest.raises(ConfigError) as caught:
        require_extras(config)
    [problem] = caught.value.problems
    assert problem.where == "otlp_endpoint"
    assert "rolemesh-node-agent[otel]" in str(problem)
    assert problem in host_problems(config)
    require_extras(parse(MINIMAL))
