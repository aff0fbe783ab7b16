"""The examples are accepted by the programs that they are written for."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from nodeagent.config import NodeConfig, parse_config
from nodeagent.self_watch import ROUND_MAX_S

EXAMPLES = Path(__file__).parent.parent / "examples"
UNIT = EXAMPLES / "systemd" / "rolemesh-node-agent.service"
HAPROXY = EXAMPLES / "haproxy" / "haproxy.cfg"
GRAFANA = EXAMPLES / "grafana"


def program(name: str) -> str:
    """A program of the test's host; CI installs it."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert found is not None, f"{name} is missing: install its package"
    return found


def systemd_version() -> int:
    shown = subprocess.run([program("systemd-analyze"), "--version"], capture_output=True, text=True, timeout=60)
    return int(shown.stdout.split()[1])


def settings_of_unit() -> dict[str, str]:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Za-z]+=", line))


def defaults() -> NodeConfig:
    return parse_config("models: [{model_id: a, path: a.gguf}]", Path("/a.yaml"))


@pytest.mark.real
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # verify looks for the program itself, which is not installed under /opt here.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if systemd_version() < 253:  # as the unit says
        text = re.sub(r"^Type=notify-reload\n#Type=notify\n#Exec", "Type=notify\nExec", text, flags=re.MULTILINE)
    unit = tmp_path / UNIT.name
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_unit_signals_the_agent_alone_and_waits_for_its_drain() -> None:
    settings, config = settings_of_unit(), defaults()
    needed_s = config.drain_grace_s + config.shutdown_timeout_s + config.llama_server_stop_grace_s
    assert settings["KillMode"] == "mixed"
    assert settings["Type"] == "notify-reload"
    assert float(settings["WatchdogSec"]) > 2 * ROUND_MAX_S
    assert float(settings["TimeoutStopSec"]) > needed_s
    assert settings["RestartPreventExitStatus"] == "78"


@pytest.mark.real
def test_haproxy_accepts_its_configuration() -> None:
    done = subprocess.run([program("haproxy"), "-c", "-f", str(HAPROXY)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


@pytest.mark.real
def test_promtool_accepts_the_alerts_and_they_fire_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([program("promtool"), *command], cwd=GRAFANA, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    tests = yaml.safe_load((GRAFANA / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
    for fires, test in zip((True, False), tests, strict=True):
        tested = {one["alertname"]: bool(one["exp_alerts"]) for one in test["alert_rule_test"]}
        assert tested == {rule["alert"]: fires for rule in rules}


def test_the_dashboard_is_laid_out_without_overlaps_and_each_panel_explains_itself() -> None:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 15
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["datasource"]["uid"] == "${datasource}"
            assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])


def test_haproxy_waits_longer_than_a_request_may() -> None:
    config = defaults()
    longest_s = config.queue_timeout_s + config.llama_server_startup_timeout_s
    timeouts = re.findall(r"timeout (?:client|server) (\d+)m", HAPROXY.read_text(encoding="utf-8"))
    assert [60 * float(minutes) > longest_s for minutes in timeouts] == [True, True]


def test_the_time_outs_that_the_readme_names_are_longer_than_a_request_may_be_silent_before_it_generates() -> None:
    config = defaults()
    longest_s = config.queue_timeout_s + config.llama_server_startup_timeout_s
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("### Behind a proxy")[2].partition("\n## ")[0]
    settings = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    named = [float(number) * (60 if unit == "m" else 1) for it in settings for number, unit in numbers(it)]
    assert len(named) >= 6
    assert min(named) > longest_s
    assert f"({longest_s:g} s and the generation by default)" in section
    assert f"`stream_ping_s` ({config.stream_ping_s:g} s)" in section


def numbers(text: str) -> list[tuple[str, str]]:
    return re.findall(r"\b(\d+)(m?)", text)
