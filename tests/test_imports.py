"""The rooms of the code: one table says what each may import, and each import is checked against it."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nodeagent", "supervisor")

# Plain values, which nearly every room uses.
VALUES = {"nodeagent.devices.values", "nodeagent.errors"}

# Module or package -> our modules that it may import, besides itself. A package includes all its modules; the longest
# name that fits a module counts.
MAY_IMPORT: dict[str, set[str]] = {
    # Generic: could be a project of its own.
    "supervisor": set(),
    # Leaves.
    "nodeagent.errors": set(),
    "nodeagent.devices.values": set(),
    "nodeagent.timestamps": set(),
    "nodeagent.logs": {"nodeagent.timestamps"},
    "nodeagent.containment": {"supervisor.containment"},
    "nodeagent.descriptors": set(),
    "nodeagent.host_names": set(),
    "nodeagent.whole_files": set(),
    "nodeagent.releases": set(),
    "nodeagent.llama_server.server_id": set(),
    "nodeagent.events": {"nodeagent.llama_server.server_id", "nodeagent.timestamps", "supervisor.lifecycle"},
    "nodeagent.state_dir": {"nodeagent.errors", "nodeagent.whole_files"},
    "nodeagent.gguf": {"nodeagent.errors"},
    # The configuration: nothing that runs.
    "nodeagent.config": {"nodeagent.errors", "nodeagent.gguf", "nodeagent.whole_files"},
    # Who may use the node: no HTTP.
    "nodeagent.access": {
        "nodeagent.config",
        "nodeagent.containment",
        "nodeagent.errors",
        "nodeagent.releases",
        "nodeagent.whole_files",
    },
    # Vendors: no HTTP, no children.
    "nodeagent.devices": {"nodeagent.containment", "supervisor.cgroups", *VALUES},
    # Policy: no vendor, no process, no HTTP.
    "nodeagent.scheduling": VALUES,
    "nodeagent.status": {"nodeagent.scheduling", *VALUES},
    "nodeagent.device_fit": {
        "nodeagent.llama_server.fit",
        "nodeagent.llama_server.reason_codes",
        "nodeagent.scheduling.seam",
        "nodeagent.status",
    },
    # llama-server: its command line, its HTTP, which one runs where.
    "nodeagent.llama_server": {
        "nodeagent.config",
        "nodeagent.containment",
        "nodeagent.devices",
        "nodeagent.gguf",
        "nodeagent.scheduling.seam",
        "nodeagent.state_dir",
        "nodeagent.whole_files",
        "supervisor",
        *VALUES,
    },
    "nodeagent.llama_server.relay": {
        "nodeagent.errors",
        "nodeagent.llama_server.headers",
        "nodeagent.llama_server.sse",
    },
    "nodeagent.llama_server.command_line": {
        "nodeagent.config",
        "nodeagent.devices.values",
        "nodeagent.gguf",
        "nodeagent.llama_server.server_id",
        "nodeagent.llama_server.spans",
        "nodeagent.llama_server.tasks",
        "nodeagent.state_dir",
        "supervisor.probe",
        "supervisor.restart",
        "supervisor.spec",
    },
    # The two faces: no process, no GPU, no configuration file.
    "nodeagent.front": {
        "nodeagent.access",
        "nodeagent.containment",
        "nodeagent.descriptors",
        "nodeagent.events",
        "nodeagent.histogram",
        "nodeagent.llama_server.headers",
        "nodeagent.llama_server.relay",
        "nodeagent.logs",
        "nodeagent.releases",
        "nodeagent.scheduling",
        "nodeagent.status",
        "nodeagent.timestamps",
        *VALUES,
    },
    "nodeagent.dispatcher": {
        "nodeagent.containment",
        "nodeagent.scheduling.seam",
        "nodeagent.status",
        "nodeagent.timestamps",
        *VALUES,
    },
    # The node: what runs on each device, and the operations on all of it.
    "nodeagent.reload": {"nodeagent.config", "nodeagent.errors", "nodeagent.front.seam", "nodeagent.state_dir"},
    "nodeagent.managed_device": {
        "nodeagent.config",
        "nodeagent.device_fit",
        "nodeagent.devices",
        "nodeagent.events",
        "nodeagent.llama_server",
        "nodeagent.scheduling",
        "nodeagent.status",
        "supervisor.lifecycle",
        "supervisor.spec",
    },
    "nodeagent.node": {
        "nodeagent",
        "nodeagent.access",
        "nodeagent.config",
        "nodeagent.containment",
        "nodeagent.devices.monitor",
        "nodeagent.dispatcher",
        "nodeagent.errors",
        "nodeagent.events",
        "nodeagent.front.parameters",
        "nodeagent.front.seam",
        "nodeagent.llama_server",
        "nodeagent.managed_device",
        "nodeagent.scheduling",
        "nodeagent.status",
        "supervisor.lifecycle",
    },
    "nodeagent.service_manager": set(),
    "nodeagent.self_watch": {"nodeagent.service_manager"},
    "nodeagent.histogram": set(),
    "nodeagent.loop_lag": {"nodeagent.containment", "nodeagent.histogram"},
    "nodeagent.shutdown": {"nodeagent.config"},
    "nodeagent.signals": {"nodeagent.errors", "nodeagent.shutdown"},
    # The shell.
    "nodeagent.agent": {"nodeagent", "supervisor"},
    "nodeagent.cli": {"nodeagent"},
    "nodeagent.cli.demo": {"nodeagent.config", "nodeagent.errors", "nodeagent.state_dir"},
    "nodeagent.cli.operations": {"nodeagent.cli", "nodeagent.errors", "nodeagent.logs", "nodeagent.state_dir"},
    "nodeagent.cli.discovery": {"nodeagent.cli.demo", "nodeagent.config", "nodeagent.errors"},
    "nodeagent.cli.events_table": {"nodeagent.logs"},
    "nodeagent.__main__": {"nodeagent.cli"},
}

# Rooms that need only these packages and the standard library.
ONLY_NEEDS: dict[str, set[str]] = {
    "supervisor": {"psutil", "trio"},
    "nodeagent.scheduling": {"msgspec", "trio"},
    "nodeagent.errors": {"msgspec"},
    "nodeagent.devices.values": {"msgspec"},
    "nodeagent.status": {"msgspec", "trio"},
    "nodeagent.logs": {"msgspec"},
    "nodeagent.timestamps": set(),
    "nodeagent.containment": set(),
    "nodeagent.descriptors": set(),
    "nodeagent.host_names": {"trio"},
    "nodeagent.service_manager": set(),
    "nodeagent.self_watch": {"trio"},
    "nodeagent.loop_lag": {"trio"},
    "nodeagent.histogram": set(),
    "nodeagent.gguf": {"msgspec"},
}

HTTP = {"h11", "hypercorn", "http", "httptools", "httpx", "quart", "quart_trio", "urllib.request"}
PROCESSES = {"multiprocessing", "psutil", "subprocess"}
GPUS = {"pynvml"}
NEVER: dict[str, set[str]] = {
    "nodeagent.access": HTTP | PROCESSES | GPUS,
    "nodeagent.devices": HTTP,
    "nodeagent.scheduling": HTTP | PROCESSES | GPUS,
    "nodeagent.front": PROCESSES | GPUS | {"httpx"},
    "nodeagent.dispatcher": PROCESSES | GPUS,
    "nodeagent.config": HTTP | PROCESSES | GPUS,
    "nodeagent.node": HTTP | PROCESSES | GPUS,
    "nodeagent.managed_device": HTTP | PROCESSES | GPUS,
    "nodeagent.llama_server.command_line": HTTP | PROCESSES | GPUS,
    "nodeagent.llama_server.relay": PROCESSES | GPUS | {"httpx"},
    "nodeagent.llama_server.device_servers": HTTP | PROCESSES | GPUS,
}

# supervisord installs its modules under the same import name: in one environment pip merges the two folders.
# fmt: off
SUPERVISORD = {
    "childutils", "compat", "confecho", "datatypes", "dispatchers", "events", "http", "http_client", "loggers",
    "medusa", "options", "pidproxy", "poller", "process", "rpcinterface", "scripts", "skel", "socket_manager", "states",
    "supervisorctl", "supervisord", "templating", "tests", "ui", "web", "xmlrpc",
}
# fmt: on


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    def imports(self) -> Iterator[tuple[str, int]]:
        """Each module that it imports, anywhere in it, with the line."""
        return imports_of(self.path.read_text(encoding="utf-8"))


def imports_of(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if is_module(inner) else module, node.lineno


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.split(".")[0] in PACKAGES and (path.with_suffix(".py").is_file() or path.is_dir())


def all_modules() -> list[Module]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = all_modules()


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_in(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def room_of(module: str, rooms: dict[str, set[str]]) -> str | None:
    """The longest key that the module is in."""
    return max((room for room in rooms if is_in(module, room)), key=len, default=None)


def wrong_direction(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None if it may."""
    top = imported.split(".")[0]
    if not top:
        return "imports are absolute here"
    if top in PACKAGES:
        room = room_of(module, MAY_IMPORT)
        if room is not None and not any(is_in(imported, place) for place in {room, *MAY_IMPORT[room]}):
            return f"of ours, {room} may import only {sorted(MAY_IMPORT[room]) or 'nothing'}"
        return None
    room = room_of(module, NEVER)
    if room is not None and any(is_in(imported, place) for place in NEVER[room]):
        return f"{room} must not use {top}"
    room = room_of(module, ONLY_NEEDS)
    if room is not None and top not in sys.stdlib_module_names and top not in ONLY_NEEDS[room]:
        return f"besides the standard library, {room} needs only {sorted(ONLY_NEEDS[room]) or 'nothing'}"
    return None


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_a_module_imports_only_what_its_room_may_know(module: Module) -> None:
    if module.name == "nodeagent":
        assert list(module.imports()) == [], "importing any part of the package would import these too"
        return
    assert room_of(module.name, MAY_IMPORT), f"{module.name} is in no room: say in MAY_IMPORT what it may import"
    wrong = [
        f"{module.path.relative_to(ROOT)}:{line}: imports {imported}: {reason}"
        for imported, line in module.imports()
        if (reason := wrong_direction(module.name, imported))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("supervisor.child", "nodeagent.errors"),
        ("supervisor.child", "httpx"),
        ("nodeagent.scheduling.lane", "nodeagent.devices.cuda"),
        ("nodeagent.scheduling.lane", "supervisor.supervisor"),
        ("nodeagent.front.app", "nodeagent.llama_server.command_line"),
        ("nodeagent.front.app", "subprocess"),
        ("nodeagent.devices.cpu", "http.client"),
        ("nodeagent.dispatcher.client", "nodeagent.config"),
        ("nodeagent.config", "nodeagent.agent"),
        ("nodeagent.config", ".errors"),
    ],
)
def test_an_import_against_the_directions_is_found(module: str, imported: str) -> None:
    assert wrong_direction(module, imported)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("nodeagent.scheduling.lane", "nodeagent.scheduling.queueing"),
        ("nodeagent.scheduling.lane", "logging"),
        ("nodeagent.front.app", "nodeagent.errors"),
        ("nodeagent.agent", "supervisor.supervisor"),
        ("supervisor.spawn", "trio.lowlevel"),
    ],
)
def test_an_import_along_the_directions_is_allowed(module: str, imported: str) -> None:
    assert wrong_direction(module, imported) is None


def top_level(module: str) -> str:
    """The package or module of the top level that a module is in: what a stranger sees first."""
    parts = module.split(".")
    return parts[0] if parts[0] == "supervisor" else ".".join(parts[:2])


def imports_between_rooms() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports, for type checking alone too. The version in `nodeagent` is no room."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        imported = {top_level(name) for name, _ in module.imports() if name.split(".")[0] in PACKAGES}
        graph.setdefault(top_level(module.name), set()).update(imported - {top_level(module.name), "nodeagent"})
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return None


def test_no_circle_runs_through_the_rooms() -> None:
    graph = imports_between_rooms()
    assert len(graph) > 15
    assert circle_in(graph) is None


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_are_found_wherever_and_however_they_are_written() -> None:
    source = "import a.b\ndef f():\n    from nodeagent import errors\n    from nodeagent.errors import ConfigError\n"
    assert list(imports_of(source)) == [("a.b", 1), ("nodeagent.errors", 3), ("nodeagent.errors", 4)]


def test_no_module_of_supervisor_has_a_name_of_supervisords() -> None:
    ours = {part for module in MODULES if is_in(module.name, "supervisor") for part in module.name.split(".")[1:]}
    assert not ours & SUPERVISORD


def test_the_package_supervisor_is_empty_itself() -> None:
    """Merged with supervisord's folder, one of the two __init__.py is lost: ours must hold nothing."""
    assert (ROOT / "supervisor" / "__init__.py").read_text() == ""


def only_re_exports(source: str) -> bool:
    """True if it holds only a docstring, imports and `__all__`."""

    def is_plain(statement: ast.stmt) -> bool:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
                return True
            case ast.Assign([ast.Name("__all__")]):
                return True
        return False

    return all(is_plain(statement) for statement in ast.parse(source).body)


@pytest.mark.parametrize(
    "path", sorted({path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}), ids=relative
)
def test_a_package_itself_only_re_exports(path: Path) -> None:
    assert only_re_exports(path.read_text(encoding="utf-8")), f"{path.relative_to(ROOT)} holds code of its own"


def test_code_in_a_package_itself_is_found() -> None:
    assert only_re_exports('"""Doc."""\nfrom a import b\n__all__ = ["b"]\n')
    assert not only_re_exports("BACKENDS = {}\n")
    assert not only_re_exports("def select() -> None: ...\n")


# Code that measures durations. `records` compares the start times of processes, which are wall-clock times.
MONOTONIC = ("supervisor", "nodeagent/scheduling", "nodeagent/llama_server")
NOT_MONOTONIC = {"supervisor/records.py"}
WALL_CLOCK = {"time.time", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def test_nothing_that_restarts_or_schedules_reads_the_wall_clock() -> None:
    """So that setting the clock, back or forth, restarts nothing."""
    paths = [
        path
        for place in MONOTONIC
        for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    asked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        if str(path.relative_to(ROOT)) not in NOT_MONOTONIC
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK
    ]
    assert len(paths) > 15
    assert asked == []


def fixtures_with_the_autojumping_clock(source: str) -> Iterator[tuple[str, int]]:
    """Each fixture that requests it, by name and line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            fixture = any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
            if fixture and "autojump_clock" in {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}:
                yield node.name, node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=relative)
def test_only_tests_themselves_request_the_autojumping_clock(path: Path) -> None:
    """Requested by a fixture alone it does not jump, and the test silently waits in real time."""
    assert list(fixtures_with_the_autojumping_clock(path.read_text(encoding="utf-8"))) == []


def test_a_fixture_that_requests_the_autojumping_clock_is_found() -> None:
    fixture = "@pytest.fixture\nasync def lane(autojump_clock): ...\n"
    assert list(fixtures_with_the_autojumping_clock(fixture)) == [("lane", 2)]
    assert list(fixtures_with_the_autojumping_clock("async def test_x(autojump_clock): ...\n")) == []
