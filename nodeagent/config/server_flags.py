"""What `server_args` may hold: llama-server's flags, which of them the agent reserves, and how they become argv. Pure.

The table is the `--help` of builds b10068 and b10434 (a test compares it with the installed server). A flag that is not
in the table is used as it is, since other builds have other flags.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

FlagValue = bool | int | float | str | tuple[int | float | str, ...] | None

# The spellings of one flag side by side, flags separated by "|"; a leading dash for "-", none for "--".
_WITH_VALUE = """
-t threads | -tb threads-batch | -C cpu-mask | -Cr cpu-range | cpu-strict | prio | poll | -Cb cpu-mask-batch |
-Crb cpu-range-batch | cpu-strict-batch | prio-batch | poll-batch | -c ctx-size | -n predict n-predict |
-b batch-size | -ub ubatch-size | keep | -fa flash-attn | rope-scaling | rope-scale | rope-freq-base |
rope-freq-scale | yarn-orig-ctx | yarn-ext-factor | yarn-attn-factor | yarn-beta-slow | yarn-beta-fast |
-ctk cache-type-k | -ctv cache-type-v | -dt defrag-thold | rpc | -lm load-mode | numa | -dev device |
-ot override-tensor | -ncmoe n-cpu-moe | -ngl gpu-layers n-gpu-layers | -sm split-mode | -ts tensor-split |
-mg main-gpu | -fit fit | -fitt fit-target | -fitc fit-ctx | override-kv | lora | lora-scaled | control-vector |
control-vector-scaled | control-vector-layer-range | -m model | -mu model-url | -dr docker-repo |
-hf -hfr hf-repo | -hff hf-file | -hft hf-token |
-hfv -hfrv hf-repo-v | -hffv hf-file-v | -mv model-vocoder | log-file | log-colors | -lv verbosity log-verbosity |
spec-draft-type-k -ctkd cache-type-k-draft | spec-draft-type-v -ctvd cache-type-v-draft | samplers | -s seed |
sampler-seq sampling-seq | temp temperature | top-k | top-p | min-p | top-nsigma top-n-sigma | xtc-probability |
xtc-threshold | typical typical-p | repeat-last-n | repeat-penalty | presence-penalty | frequency-penalty |
dry-multiplier | dry-base | dry-allowed-length | dry-penalty-last-n | dry-sequence-breaker | adaptive-target |
adaptive-decay | dynatemp-range | dynatemp-exp | mirostat | mirostat-lr | mirostat-ent | -l logit-bias | grammar |
grammar-file | -j json-schema | -jf json-schema-file | spec-draft-hf -hfd -hfrd hf-repo-draft |
spec-draft-threads -td threads-draft | spec-draft-threads-batch -tbd threads-batch-draft |
spec-draft-cpu-mask -Cd cpu-mask-draft | spec-draft-cpu-range -Crd cpu-range-draft |
spec-draft-cpu-strict cpu-strict-draft | spec-draft-prio prio-draft | spec-draft-poll poll-draft |
spec-draft-cpu-mask-batch -Cbd cpu-mask-batch-draft | spec-draft-cpu-strict-batch cpu-strict-batch-draft |
spec-draft-prio-batch prio-batch-draft | spec-draft-poll-batch poll-batch-draft |
spec-draft-override-tensor -otd override-tensor-draft |
spec-draft-n-cpu-moe spec-draft-ncmoe -ncmoed n-cpu-moe-draft | spec-draft-n-max | spec-draft-n-min |
spec-draft-p-split draft-p-split | spec-draft-p-min draft-p-min | spec-draft-device -devd device-draft |
spec-draft-ngl -ngld gpu-layers-draft n-gpu-layers-draft | spec-draft-model -md model-draft | spec-type |
spec-ngram-mod-n-min | spec-ngram-mod-n-max | spec-ngram-mod-n-match | spec-ngram-simple-size-n |
spec-ngram-simple-size-m | spec-ngram-simple-min-hits | spec-ngram-map-k-size-n | spec-ngram-map-k-size-m |
spec-ngram-map-k-min-hits | spec-ngram-map-k4v-size-n | spec-ngram-map-k4v-size-m | spec-ngram-map-k4v-min-hits |
draft draft-n draft-max | draft-min draft-n-min | spec-ngram-size-n | spec-ngram-size-m | spec-ngram-min-hits |
-lcs lookup-cache-static | -lcd lookup-cache-dynamic | -ctxcp ctx-checkpoints swa-checkpoints |
-cms checkpoint-min-step | -cram cache-ram | -r reverse-prompt | pooling | -np parallel | -mm mmproj |
-mmu mmproj-url | image-min-tokens | image-max-tokens | mtmd-batch-max-tokens | -a alias | tags | embd-normalize |
host | port | path | cors-origins | cors-methods | cors-headers | api-prefix | ui-config webui-config |
ui-config-file webui-config-file | tools | tools-runtime | mcp-servers-config | mcp-servers-json | api-key |
api-key-file | ssl-key-file | ssl-cert-file | chat-template-kwargs | -to timeout | sse-ping-interval |
threads-http | cache-reuse | slot-save-path | media-path | models-dir | models-preset | models-max |
reasoning-format | -rea reasoning | reasoning-effort | reasoning-budget | reasoning-budget-message |
chat-template | chat-template-file | -sps slot-prompt-similarity | sleep-idle-seconds | log-prompts-dir
"""

_BARE = """
-h help usage | version | -cl cache-list | completion-bash | swa-full | perf no-perf | -e escape no-escape |
-kvo kv-offload -nkvo no-kv-offload | repack -nr no-repack | no-host | mlock | mmap no-mmap |
-dio direct-io -ndio no-direct-io | list-devices | -cmoe cpu-moe | check-tensors | op-offload no-op-offload |
log-disable | -v verbose log-verbose | offline | tts-use-guide-tokens | log-prefix no-log-prefix |
log-timestamps no-log-timestamps |
ignore-eos | -bs backend-sampling | spec-draft-cpu-moe -cmoed cpu-moe-draft |
spec-draft-backend-sampling no-spec-draft-backend-sampling | -kvu kv-unified -no-kvu no-kv-unified |
cache-idle-slots no-cache-idle-slots | context-shift no-context-shift | -sp special | warmup no-warmup |
spm-infill | -cb cont-batching -nocb no-cont-batching | mmproj-auto no-mmproj no-mmproj-auto |
mmproj-offload no-mmproj-offload | reuse-port | cors-credentials no-cors-credentials |
ui-mcp-proxy webui-mcp-proxy no-ui-mcp-proxy no-webui-mcp-proxy | -ag agent -no-ag no-agent |
ui webui no-ui no-webui | embedding embeddings | rerank reranking | cache-prompt no-cache-prompt | metrics |
props | slots no-slots | models-autoload no-models-autoload | jinja no-jinja |
reasoning-preserve no-reasoning-preserve | skip-chat-parsing no-skip-chat-parsing |
prefill-assistant no-prefill-assistant | lora-init-without-apply | embd-gemma-default | fim-qwen-1.5b-default |
fim-qwen-3b-default | fim-qwen-7b-default | fim-qwen-7b-spec | fim-qwen-14b-spec | fim-qwen-30b-default |
gpt-oss-20b-default | gpt-oss-120b-default | vision-gemma-4b-default | vision-gemma-12b-default | spec-default
"""

# The only flag that takes two values; both are written in one text ("0 31").
_TWO_VALUES = "control-vector-layer-range"

# The flags that the agent sets itself or can't allow, with the reason. Some belong to other builds than the table.
_OWNED = {
    "host port reuse-port": "the agent binds each server to a port of its own on 127.0.0.1",
    "model model-url docker-repo hf-repo hf-file hf-token hf-repo-v hf-file-v models-dir models-preset models-max "
    "models-autoload embd-gemma-default fim-qwen-1.5b-default fim-qwen-3b-default fim-qwen-7b-default "
    "fim-qwen-7b-spec fim-qwen-14b-spec fim-qwen-30b-default gpt-oss-20b-default gpt-oss-120b-default "
    "vision-gemma-4b-default vision-gemma-12b-default tts-oute-default": "the model is the file that `path` names",
    "alias": "the agent knows its server by this name; use the key `alias`",
    "device spec-draft-device rpc": "the agent pins each server to its device",
    "cpu-mask cpu-range cpu-strict cpu-mask-batch cpu-range-batch cpu-strict-batch spec-draft-cpu-mask "
    "spec-draft-cpu-range spec-draft-cpu-strict spec-draft-cpu-mask-batch spec-draft-cpu-strict-batch": (
        "the agent pins each server to its CPUs; use `cpus` of the device"
    ),
    "api-key api-key-file": "the agent gives each server a random key of its own",
    "ssl-key-file ssl-cert-file": "the agent speaks plain HTTP to its server on the loopback",
    "path api-prefix ui": "the server has no user but the agent",
    "slots": "the agent asks the server for its slots",
    "log-disable log-file": "the agent reads the server's output",
    "tools tools-runtime agent ui-mcp-proxy mcp-servers-config mcp-servers-json": (
        "it lets clients run commands on this host, or reach others through it"
    ),
    "media-path": "it lets clients read files of this host",
    "props": "it lets clients change the server's settings for all others",
    "cors-origins cors-methods cors-headers cors-credentials": "no web page reaches the server directly",
    "log-prompts-dir": "it writes every client's prompts to files",
    "sleep-idle-seconds": (
        "it has known vulnerabilities (CVE-2026-43631, CVE-2026-43632); use the key `idle_unload_s`"
    ),
    "help version license cache-list completion-bash list-devices": "the server would print something and exit",
}

# The flags whose value is a file that the server reads when it starts.
_READS_FILE = frozenset(
    {
        "chat-template-file",
        "control-vector",
        "control-vector-scaled",
        "grammar-file",
        "json-schema-file",
        "lookup-cache-static",
        "lora",
        "lora-scaled",
        "mmproj",
        "model-vocoder",
        "spec-draft-model",
        "ui-config-file",
    }
)
# And one that it writes: the file need not exist.
_WRITES_FILE = frozenset({"lookup-cache-dynamic"})
# Comma-separated files, and files that are followed by a number: FILE:SCALE.
_SEVERAL_FILES = frozenset({"control-vector", "control-vector-scaled", "lora", "lora-scaled"})
_SCALED_FILES = frozenset({"control-vector-scaled", "lora-scaled"})

# The flags that have a key of their own in `models[]`.
_STRUCTURED = {
    "ctx-size": "ctx_size",
    "batch-size": "batch_size",
    "ubatch-size": "ubatch_size",
    "threads": "threads",
    "threads-batch": "threads_batch",
    "gpu-layers": "gpu_layers",
    "main-gpu": "main_gpu",
    "tensor-split": "tensor_split",
    "split-mode": "split_mode",
    "flash-attn": "flash_attn",
    "parallel": "parallel",
    "mmproj": "mmproj",
    "spec-draft-model": "draft_model",
    "lora": "loras",
    "lora-scaled": "loras",
}

_FLAG_NAME = re.compile(r"-{0,2}[A-Za-z0-9][A-Za-z0-9._-]*")


class Flag(msgspec.Struct, frozen=True):
    """One flag with all its spellings as on a command line. `name` is one of them without dashes."""

    name: str
    spellings: frozenset[str]
    takes_value: bool
    owner: str | None = None
    """Why the agent reserves this flag, None if it doesn't."""
    key: str | None = None
    """The key of `models[]` with the same meaning."""


def _read_table() -> dict[str, tuple[Flag, str]]:
    """Every spelling without its dashes, to its flag and its form on a command line."""
    owners = {name: why for names, why in _OWNED.items() for name in names.split()}
    table: dict[str, tuple[Flag, str]] = {}
    for takes_value, text in ((True, _WITH_VALUE), (False, _BARE)):
        for entry in text.replace("\n", " ").split("|"):
            spellings = [word if word.startswith("-") else f"--{word}" for word in entry.split()]
            names = [spelling.lstrip("-") for spelling in spellings]
            first_long = next(word for word in (*entry.split(), *names) if not word.startswith("-"))
            name = next((name for name in names if name in owners or name in _STRUCTURED), first_long)
            flag = Flag(name, frozenset(spellings), takes_value, owners.get(name), _STRUCTURED.get(name))
            table.update({known: (flag, spelling) for known, spelling in zip(names, spellings, strict=True)})
    for name in owners.keys() - table.keys():
        table[name] = (Flag(name, frozenset({f"--{name}"}), False, owners[name]), f"--{name}")
    return table


_FLAGS = _read_table()


def find_flag(name: str) -> Flag | None:
    """The flag of that name, written with `-` or `_`, with or without dashes; None if the table has none."""
    known = _FLAGS.get(_plain(name))
    return known[0] if known else None


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _spelled(name: str) -> str:
    """The flag as on a command line."""
    plain = _plain(name)
    if plain in _FLAGS:
        return _FLAGS[plain][1]
    dashes = name[: len(name) - len(name.lstrip("-"))]
    return (dashes or ("-" if len(plain) == 1 else "--")) + plain


def flags_argv(server_args: Mapping[str, FlagValue]) -> list[str]:
    """`server_args` as a part of a command line, in the same order.

    True gives a bare flag, False and None omit it, a sequence repeats it.
    """
    argv: list[str] = []
    for name, value in server_args.items():
        spelling = _spelled(name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is None or one is False:
                continue
            argv.append(spelling)
            if one is not True:
                argv.extend(str(one).split() if _plain(name) == _TWO_VALUES else [str(one)])
    return argv


def sets_flag(server_args: Mapping[str, FlagValue], name: str) -> bool:
    """Whether `server_args` sets the flag of that name in any of its spellings."""
    flag = find_flag(name)
    return any(
        value is not None and value is not False and find_flag(key) == flag for key, value in server_args.items()
    )


class FileArg(msgspec.Struct, frozen=True):
    """A file in a flag's value; `scale` is what follows it in the value (":0.5"), "" if nothing does."""

    path: str
    scale: str = ""


def file_args(name: str, value: FlagValue) -> list[FileArg]:
    """The files that this flag's value names, in order; none if the flag takes no file."""
    flag = find_flag(name)
    if flag is None or flag.name not in _READS_FILE | _WRITES_FILE:
        return []
    texts = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str) and item]
    if flag.name in _SEVERAL_FILES:
        texts = [part for text in texts for part in text.split(",") if part]
    if flag.name not in _SCALED_FILES:
        return [FileArg(text) for text in texts]
    parts = [text.rpartition(":") for text in texts]
    return [FileArg(path, f":{scale}") if colon else FileArg(scale) for path, colon, scale in parts]


def must_exist(name: str) -> bool:
    """Whether the files of this flag must exist when the server starts."""
    flag = find_flag(name)
    return flag is not None and flag.name in _READS_FILE


def with_files(name: str, value: FlagValue, resolve: Callable[[str], Path]) -> FlagValue:
    """The value with its files resolved; as it is if the flag takes no file."""
    files = file_args(name, value)
    if not files:
        return value
    resolved = tuple(f"{resolve(file.path)}{file.scale}" for file in files)
    return resolved if isinstance(value, tuple) else ",".join(resolved)


def check_server_args(server_args: Mapping[str, object], model: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What is wrong with one model's flags: pairs of the flag as written and a message.

    `model` holds the structured keys beside them. Both are as they came from the file: nothing is known of their types.
    """
    seen: dict[Flag, str] = {}
    for name, value in server_args.items():
        if not _FLAG_NAME.fullmatch(name):
            yield name, f"{name!r} is not a valid name of a flag; write it like `cache_type_k` or `no-mmap`"
        if (flag := find_flag(name)) is None or value is None or value is False:
            continue
        if flag.owner:
            yield name, f"is reserved for the agent: {flag.owner}"
        elif flag in seen:
            yield name, f"is the same flag as `{seen[flag]}` above; remove one"
        elif flag.takes_value and value is True:
            yield name, f"needs a value, found true{_value_hint(flag)}"
        elif not flag.takes_value and _would_follow(value):
            # Most of all `mlock: on`, which is a word here: a server that gets `--mlock on` exits with an error.
            yield name, f"takes no value, found {value!r}; write true to set the flag, false to omit it"
        elif flag.key and flag.key != "parallel" and model.get(flag.key) not in (None, [], ()):
            yield name, f"repeats the key `{flag.key}` of this model; remove one"
        seen.setdefault(flag, name)


def _would_follow(value: object) -> bool:
    """Whether this would follow its flag on a command line; values that can't have their own message."""
    return value is not True and isinstance(value, str | int | float | list) and value != []


def _value_hint(flag: Flag) -> str:
    return " (on, off or auto)" if flag.name in ("flash-attn", "reasoning") else ""
