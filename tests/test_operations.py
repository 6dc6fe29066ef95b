"""What operators plug in: health, metrics, logs, and the notifications of systemd."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import Access, Agent, Grant, HubServer, Journal, Refused, TaskFailed, TaskState
from tests.harness import HubHarness
from tests.raw_websocket import WAIT_S, raw_socket
from tests.support import ROOT, hub_process, raw_client

PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
IMPLEMENTATIONS = ["packages", "builtin"]


@pytest.fixture(params=IMPLEMENTATIONS)
def server_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the hub use this implementation of HTTP and WebSocket."""
    if request.param == "packages":
        pytest.importorskip("websockets")
        return "packages"
    builtin = agenthub.WebSockets("built in", agenthub.BuiltinServer, agenthub.BuiltinClient, agenthub.HandshakeFailed)
    monkeypatch.setattr(agenthub, "websockets_used", lambda: builtin)
    return "builtin"


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def http(url: str, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """Return the status, the headers (names in lower case) and the body of the hub's answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    async with raw_socket(url, handshake=False) as one:
        await one.send("\r\n".join(lines).encode())
        head, _, body = (await one.rest()).decode().partition("\r\n\r\n")
    first, *rest = head.split("\r\n")
    pairs = (line.partition(": ") for line in rest)
    return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, body


async def health(hub: HubServer) -> tuple[int, Any]:
    status, headers, body = await http(hub.url, "/healthz")
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    document = json.loads(body)
    return status, (document["status"], document["ready"])


# Health


async def test_health_says_in_one_word_whether_new_tasks_are_accepted_and_why_not(server_of: str) -> None:
    async with HubServer(port=0) as hub:
        assert await health(hub) == (200, ("ok", True))
        hub.hub._is_journaled = hub.hub.is_full = True
        assert await health(hub) == (200, ("journal_full", False))
        hub.hub.is_unlinked = True
        assert await health(hub) == (200, ("journal_gone", False))
        hub.shut_down()
        assert await health(hub) == (503, ("shutting_down", False))
        hub.is_standby = True
        assert await health(hub) == (503, ("standby", False))


async def test_head_is_answered_as_get_without_the_body(server_of: str) -> None:
    async with HubServer(port=0) as hub:
        status, headers, body = await http(hub.url, "/healthz", method="HEAD")
        assert (status, body) == (200, "")
        assert int(headers["content-length"]) > 10


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_answered_with_405(server_of: str, method: str) -> None:
    if server_of == "packages" and int(importlib.import_module("websockets").__version__.partition(".")[0]) < 16:
        pytest.skip("websockets 15 closes the connection without an answer")
    async with HubServer(port=0) as hub:
        status, headers, _ = await http(hub.url, "/healthz", "Content-Length: 0", method=method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")
        handshake = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        status, headers, _ = await http(hub.url, "/elsewhere", *handshake, key, method=method)
        assert (status, headers["allow"]) == (405, "GET")
        assert hub.hub.summary()["connections"] == 0


# Metrics


def samples_of(text: str, *, is_openmetrics: bool = False) -> dict[str, float]:
    """Return the samples of an exposition by name and labels, as the parser of Prometheus' own library reads it."""
    if is_openmetrics:
        parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    else:
        parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) > 20
    assert all(family.documentation and family.type in ("counter", "gauge", "histogram") for family in families)
    samples = [sample for family in families for sample in family.samples]
    named = {one.name + json.dumps(one.labels, sort_keys=True) * bool(one.labels): one.value for one in samples}
    assert len(named) == len(samples)
    return named


async def metrics(hub: HubServer, *headers: str) -> dict[str, float]:
    status, found, body = await http(hub.url, "/metrics", *headers)
    assert (status, found["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return samples_of(body)


async def test_metrics_count_what_has_happened(server_of: str) -> None:
    async with HubServer(port=0) as hub, Agent("worker", url=hub.url, max_tasks=2) as worker:
        go_on = asyncio.Event()

        @worker.capability
        async def work(how: str) -> str:
            if how == "wait":
                await go_on.wait()
            if how == "fail":
                raise TaskFailed("no", code="of its own")
            return how

        async with Agent("requester", url=hub.url) as me:
            await me.delegate("work", {"how": "well"})
            with pytest.raises(TaskFailed):
                await me.delegate("work", {"how": "fail"})
            with pytest.raises(Refused):
                await me.delegate("nobody's")
            held = [await me.submit("work", {"how": "wait"}) for _ in range(3)]
            unserved = await me.submit("later", wait=True)
            await eventually(lambda: hub.hub.tasks.in_progress == 2)
            found = await metrics(hub)
            assert {state: found[f'agenthub_agents{{"state": "{state}"}}'] for state in ("online", "gone")} == {
                "online": 2,
                "gone": 0,
            }
            assert found["agenthub_tasks_accepted_total"] == 6
            assert found['agenthub_tasks_ended_total{"code": "", "state": "completed"}'] == 1
            assert found['agenthub_tasks_ended_total{"code": "other", "state": "failed"}'] == 1
            assert found['agenthub_tasks{"state": "pending"}'] == 2
            assert found['agenthub_queue_tasks{"capability": "work"}'] == 1
            assert found['agenthub_unserved_tasks{"capability": "later"}'] == 1
            assert 'agenthub_unserved_tasks{"capability": "work"}' not in found
            assert found['agenthub_running_tasks{"capability": "work"}'] == 2
            assert found["agenthub_task_wait_seconds_count"] == 4
            assert found["agenthub_task_run_seconds_count"] == 2
            assert found['agenthub_task_run_seconds_bucket{"le": "+Inf"}'] == 2
            assert found['agenthub_refused_total{"code": "no_agent"}'] == 1
            assert found["agenthub_messages_received_total"] >= 2 + 7 + 2
            assert found["agenthub_bytes_received_total"] > 1000
            assert found["agenthub_bytes_sent_total"] > 1000
            assert found['agenthub_ready{"reason": "ok"}'] == 1
            await unserved.cancel()
            go_on.set()
            assert [await one.result() for one in held] == ["wait"] * 3
        await eventually(lambda: hub.hub.summary()["agents"] == 1)
        found = await metrics(hub)
        assert found["agenthub_task_wait_seconds_count"] == 5
        assert found["agenthub_task_run_seconds_count"] == 5
        assert found['agenthub_tasks_ended_total{"code": "cancelled", "state": "failed"}'] == 1
        assert found['agenthub_closed_total{"code": "1000"}'] == 1
        assert not [name for name in found if name.startswith(("agenthub_queue", "agenthub_running", "agenthub_uns"))]


async def test_metrics_are_openmetrics_where_that_is_accepted() -> None:
    async with HubServer(port=0) as hub:
        accepted = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
        status, headers, body = await http(hub.url, "/metrics", accepted)
        assert (status, headers["content-type"]) == (200, agenthub.OPENMETRICS)
        assert samples_of(body, is_openmetrics=True)["agenthub_tasks_accepted_total"] == 0
        for refused in ("Accept: application/openmetrics-text;q=0, */*", "Accept: text/plain", "Accept: */*"):
            assert (await http(hub.url, "/metrics", refused))[1]["content-type"] == agenthub.PROMETHEUS_TEXT


HOSTILE_NAMES = ['a"b', "a\\", "a\nb 1\nevil_total 9", "a{b}", "a,b=c", "\udc00", "é", "#", "<img src=x>"]


async def test_names_of_capabilities_cannot_forge_metrics() -> None:
    async with HubServer(port=0) as hub, Agent("requester", url=hub.url) as me:
        for name in HOSTILE_NAMES:
            with contextlib.suppress(Refused, ValueError):
                await me.submit(name, wait=True)
        waiting = sorted(hub.hub.summary()["queues"])
        assert len(waiting) > 5
        found = await metrics(hub)
        named = {name: number for name, number in found.items() if name.startswith("agenthub_queue_tasks")}
        expected = {"agenthub_queue_tasks" + json.dumps({"capability": name}) for name in waiting}
        assert set(named) == {name.replace("\\udc00", "?") for name in expected}
        assert "evil_total" not in found


async def test_metrics_need_a_token_that_may_observe() -> None:
    token, other, blind = (letter * 43 for letter in "abc")
    grants = [
        Grant("one", agenthub.hash_of(token)),
        Grant("two", agenthub.hash_of(other), namespace="other"),
        Grant("three", agenthub.hash_of(blind), may=frozenset(["delegate"])),
    ]
    async with HubServer(port=0, access=Access(grants)) as hub:
        for headers in ((), ("Authorization: Bearer wrong",), (f"Authorization: Bearer {blind}",)):
            status, answered, body = await http(hub.url, "/metrics", *headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert "agenthub_" not in body
        async with Agent("one", url=hub.url, token=token):
            assert (await metrics(hub, f"Authorization: Bearer {token}"))['agenthub_agents{"state": "online"}'] == 1
            assert (await metrics(hub, f"Authorization: Bearer {other}"))['agenthub_agents{"state": "online"}'] == 0


async def test_message_that_waits_for_its_turn_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agenthub.EXPECTED_COSTS, agenthub.Discover, lambda hub, message: 1)
    waits = agenthub.ServerLink.waits
    waited: list[float] = []

    def wait(link: agenthub.ServerLink, cost: float, handle: Callable[[], None]) -> bool:
        waited.append(cost)
        link.turns.left = 0.0
        return waits(link, cost, handle)

    monkeypatch.setattr(agenthub.ServerLink, "waits", wait)
    async with HubServer(port=0) as hub, raw_client(hub.url) as client:
        await client.register("ann", "work")
        before = hub.messages_in
        assert len((await client.request(type="discover"))["agents"]) == 1
        assert waited == [1]
        assert hub.messages_in == before + 1


async def test_metrics_of_a_journal(tmp_path: Path) -> None:
    async with HubServer(port=0, journal=Journal(tmp_path / "hub.db")) as hub, Agent("one", url=hub.url):
        found = await metrics(hub)
        assert found["agenthub_journal_commit_seconds_count"] > 0
        assert found["agenthub_journal_failures_total"] == 0


def test_histogram_puts_a_bound_into_its_own_bucket() -> None:
    observed = agenthub.Histogram()
    for seconds in (0.0, 0.01, 0.010001, 3600.0, 3600.1):
        observed.add(seconds)
    assert observed.counts == [2, 1, *[0] * 9, 1, 1]
    assert observed.sum_s == pytest.approx(7200.120001)


async def test_wait_of_a_task_is_counted_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    async with HubServer(port=0, journal=Journal(path)) as hub, Agent("me", url=hub.url) as me:
        await me.submit("work", wait=True, task_id="t")
        identity = me.agent_id, me.resume
    async with HubServer(port=0, journal=Journal(path)) as hub, Agent("worker", url=hub.url) as worker:
        worker.capability("work")(lambda: "done")
        me = Agent("me", url=hub.url)
        me.agent_id, me.resume = identity
        async with me:
            await eventually(lambda: hub.hub.tasks.ended[TaskState.COMPLETED] == 1)
        assert sum(hub.hub.tasks.waited_s.counts) == 1
        assert sum(hub.hub.tasks.ran_s.counts) == 1


def test_run_seconds_are_those_of_the_last_attempt_whatever_came_after_its_begin() -> None:
    world = HubHarness()
    requester, worker = world.join("requester"), world.join("worker", "work")
    requester.delegate("t", "work", ttl=100.0, answers=True)
    world.pass_time(2.0)
    for number in range(agenthub.STEPS_MAX + 2):
        worker.ask(agenthub.Status(task_id="t", id=f"q{number}", question=agenthub.Question("?")))
        world.pass_time(1.0)
    worker.succeed("t", "done")
    assert world.hub.tasks.ran_s.counts[-1] == 0
    assert sum(world.hub.tasks.ran_s.counts) == 1


@PROMTOOL
async def test_promtool_finds_nothing_to_blame_in_the_metrics(tmp_path: Path) -> None:
    async with HubServer(port=0, journal=Journal(tmp_path / "hub.db")) as hub, Agent("one", url=hub.url) as one:
        await one.submit("later", wait=True)
        _, _, body = await http(hub.url, "/metrics")
    await asyncio.to_thread(promtool, "check", "metrics", given=body)


def promtool(*args: str, given: str = "") -> None:
    done = subprocess.run(["promtool", *args], input=given, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


# Logs


def record(message: str, *args: Any) -> logging.LogRecord:
    return logging.LogRecord("agenthub.hub", logging.INFO, "", 0, message, args, None)


def test_json_log_has_what_the_message_names_as_fields_of_its_own() -> None:
    written = agenthub.JsonLogFormatter().format(
        record("ended task=%s n=%d s=%.3f code=%r none=%s 100%% %s level=%s", "t", 3, 0.5, "a b", None, "x", "forged")
    )
    fields = json.loads(written)
    assert fields["message"] == "ended task=t n=3 s=0.500 code='a b' none=None 100% x level=forged"
    assert {name: fields[name] for name in ("task", "n", "s", "code", "none", "level")} == {
        "task": "t",
        "n": 3,
        "s": 0.5,
        "code": "a b",
        "none": None,
        "level": "info",
    }
    for other in (record("plain"), record("%(a)s b=%(b)s", {"a": 1, "b": 2}), record("no argument task=%%")):
        assert set(json.loads(agenthub.JsonLogFormatter().format(other))) == {"time", "level", "logger", "message"}


def test_a_line_is_logged_for_each_task_that_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agenthub.tasks")
    world = HubHarness()
    requester, worker = world.join("requester"), world.join("worker", "work state=forged")
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    requester.delegate("t", "work state=forged", ttl=100.0, trace=trace)
    world.pass_time(2.0)
    worker.succeed("t", "done")
    requester.delegate("u", "nobody", ttl=1.0, wait=True, trace={"traceparent": "x\nforged"})
    world.pass_time(2.0)
    first, second = (one for one in caplog.records if one.name == "agenthub.tasks")
    assert first.levelno == logging.INFO
    assert agenthub.LogFormatter().format(first).count("\n") == 0
    fields = agenthub.fields_of(first)
    assert (fields["task"], fields["state"], fields["attempt"]) == ("t", "completed", 1)
    assert (fields["trace"], fields["waited_s"], fields["ran_s"]) == ("ab" * 16, 0.0, 2.0)
    fields = agenthub.fields_of(second)
    assert (fields["code"], fields["agent"], fields["trace"], fields["waited_s"]) == ("timeout", None, None, 1.0)


async def test_option_logs_the_tasks_and_else_they_are_not_logged() -> None:
    for options, lines in (([], 0), (["--log-tasks", "--log-format", "json"], 1)):
        with tempfile.TemporaryFile("w+") as stderr:
            with hub_process(*options, stderr=stderr) as (url, _):
                async with Agent("worker", url=url) as worker, Agent("requester", url=url) as me:
                    worker.capability("work")(lambda: "done")
                    assert await me.delegate("work", wait=True) == "done"
            stderr.seek(0)
            ended = [line for line in stderr if "ended task" in line]
        assert len(ended) == lines
        assert all(json.loads(line)["level"] == "info" for line in ended)


# systemd


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
def test_systemd_hears_of_start_life_and_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(WAIT_S)
        systemd.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        with hub_process(env=environment) as (url, process):
            heard: list[str] = []
            while heard.count("WATCHDOG=1") < 4 or f"READY=1\nSTATUS=listening on {url}" not in heard:
                heard.append(systemd.recv(1000).decode())
            process.terminate()
            while heard[-1] != "STOPPING=1":
                heard.append(systemd.recv(1000).decode())


def test_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert agenthub.watchdog_s() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert agenthub.watchdog_s() is None
    monkeypatch.delenv("WATCHDOG_PID")
    for wrong in ("", "0", "-1", "x"):
        monkeypatch.setenv("WATCHDOG_USEC", wrong)
        assert agenthub.watchdog_s() is None


# The files in examples/deploy

DEPLOY = Path(__file__).parent.parent / "examples" / "deploy"


def queries() -> dict[str, str]:
    """Return every query of the alerts and of the dashboard, by what it is for."""
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    found = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    for panel in json.loads((DEPLOY / "grafana.json").read_text())["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


@PROMTOOL
def test_promtool_understands_the_configuration_and_the_alerts() -> None:
    promtool("check", "config", str(DEPLOY / "prometheus.yml"))
    promtool("check", "rules", "--lint-fatal", str(DEPLOY / "alerts.yml"))


@PROMTOOL
def test_promtool_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    replaced = {"$__rate_interval": "1m", "$instance": ".*"}
    rules = []
    for query in queries().values():
        for name, value in replaced.items():
            query = query.replace(name, value)
        assert "$" not in query
        rules.append({"record": f"one:two:{len(rules)}", "expr": query})
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


async def test_queries_ask_for_metrics_and_labels_that_there_are(tmp_path: Path) -> None:
    async with HubServer(port=0, journal=Journal(tmp_path / "hub.db")) as hub, Agent("one", url=hub.url) as one:
        await one.submit("later", wait=True)
        _, _, body = await http(hub.url, "/metrics")
    there = set(samples_of(body))
    names = {name.partition("{")[0] for name in there} | {"up"}
    names |= {f"agenthub_{name}_total" for name in ("refused", "closed", "rejected")} | {"agenthub_running_tasks"}
    for purpose, query in queries().items():
        asked = set(re.findall(r"\b(?:agenthub|process)_\w+|\bup\b", query))
        assert asked, purpose
        assert asked <= names, purpose


def test_grafana_s_own_types_know_every_field_of_the_dashboard() -> None:
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    written = json.loads((DEPLOY / "grafana.json").read_text())
    read = dashboard.Dashboard.from_json(json.loads((DEPLOY / "grafana.json").read_text()))
    assert {type(target).__module__.rpartition(".")[2] for panel in read.panels for target in panel.targets} == {
        "prometheus"
    }
    assert fields_of(written) <= fields_of(json.loads(json.dumps(read, cls=encoder.JSONEncoder)))


def fields_of(value: Any, path: str = "") -> set[tuple[str, Any]]:
    """Return all numbers, texts and empty containers in a JSON value, each with its path."""
    if not isinstance(value, dict | list) or not value:
        return {(path, repr(value))}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return set().union(*(fields_of(part, f"{path}/{name}") for name, part in parts))


def test_the_dashboard_has_a_place_and_a_number_of_its_own_for_each_panel() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "instance"}


SERIES = {  # Of each, what it is at every minute.
    'up{job="agenthub",instance="a"}': "1 0 0 0 0",
    'agenthub_unserved_tasks{capability="sing",instance="a"}': "3x40",
    'agenthub_closed_total{code="1006",instance="a"}': "0+600x40",
    'agenthub_closed_total{code="1000",instance="b"}': "0+600x40",
    'agenthub_agents{state="online",instance="a"}': "10x40",
    'agenthub_agents{state="online",instance="b"}': "10x40",
    'agenthub_tasks{state="pending",instance="a"}': "200+10x40",
    'agenthub_tasks{state="pending",instance="b"}': "900-1x40",
}
FIRING = [  # At which minute, which alert, and for which hubs.
    ("1m", "AgentHubDown", []),
    ("3m", "AgentHubDown", ["a"]),
    ("4m", "AgentHubNobodyForCapability", []),
    ("6m", "AgentHubNobodyForCapability", ["a"]),
    ("9m", "AgentHubAgentsFlapping", []),
    ("25m", "AgentHubAgentsFlapping", ["a"]),
    ("25m", "AgentHubQueueGrowing", ["a"]),
]


@PROMTOOL
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    firing = 'count by (instance) (ALERTS{alertname="%s",alertstate="firing"})'
    expected = [
        {
            "expr": firing % name,
            "eval_time": minute,
            "exp_samples": [{"labels": f'{{instance="{hub}"}}', "value": 1} for hub in hubs],
        }
        for minute, name, hubs in FIRING
    ]
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": expected}
    path = tmp_path / "tests.yml"
    rules = str(DEPLOY / "alerts.yml")
    path.write_text(json.dumps({"rule_files": [rules], "evaluation_interval": "1m", "tests": [case]}))
    promtool("test", "rules", str(path))


# agenthub top


def snapshot(taken_at: float, ended: int, tasks: int = 30) -> agenthub.Snapshot:
    hub = {
        "version": "1",
        "uptime_s": 5.0,
        "agents": 2,
        "agents_away": 1,
        "tasks": {"pending": 3, "in_progress": tasks},
        "ended": {"completed": ended, "failed": 0},
        "queues": {"sing\x1b[31m": 3},
    }
    agents = [agenthub.AgentInfo(f"a-{load}", f"agent {load}", "", [], load, 9, {}) for load in (1, 7, 3)]
    listed = [
        agenthub.TaskInfo(
            task_id=f"t-{age}",
            state="in_progress",
            requester="r",
            capability=f"c-{age % 7}",
            attempt=1,
            priority=0,
            max_retries=0,
            ttl=100.0 - age,
            age_s=float(age),
        )
        for age in range(tasks)
    ]
    return agenthub.Snapshot(hub, agents, listed, taken_at)


def test_top_shows_rate_queues_and_as_many_rows_as_fit() -> None:
    view = agenthub.TopView()
    lines = agenthub.top_lines(view, snapshot(12.0, 50), snapshot(10.0, 30), 20, 100)
    assert len(lines) == 20
    assert all(len(line) < 100 for line in lines)
    text = "\n".join(lines)
    assert "10.0 tasks/s · 3 pending · 30 in_progress" in text
    assert "2 agents, 1 away" in text
    assert "\x1b" not in text
    assert [line.split()[0] for line in lines[5:8]] == ["t-0", "t-1", "t-2"]
    assert lines[-1].startswith("1-14 of 30, by newest")


def test_keys_of_top_choose_the_table_its_order_and_its_first_row() -> None:
    view, now = agenthub.TopView(), snapshot(1.0, 1)

    def first_after(*keys: str) -> str:
        for key in keys:
            assert view.press(key, 14)
        return agenthub.top_lines(view, now, None, 20, 100)[5].split("  ")[0]

    assert first_after("page down") == "t-14"
    assert first_after(*["page down"] * 9) == "t-16"  # The last page.
    assert first_after("up", "k", "j") == "t-15"
    assert first_after("home") == "t-0"
    assert first_after("r") == "t-29"
    assert first_after("r", "s", "s") == "t-0"  # By capability.
    assert view.order == "capability"
    assert first_after("a") == "agent 7"
    assert first_after("s") == "agent 1"
    assert first_after("t", "?") == "t-0"
    for key in ("q", "\x1b", "\x03"):
        assert not view.press(key, 14)


def test_top_of_an_empty_hub_fits_into_any_terminal() -> None:
    empty = agenthub.Snapshot({}, [], [], 0.0)
    for height, width in ((1, 2), (3, 10), (24, 80)):
        lines = agenthub.top_lines(agenthub.TopView(), empty, None, height, width)
        assert len(lines) <= height
        assert all(len(line) < width for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal and curses")
async def test_top_runs_in_a_terminal_and_ends_with_q() -> None:
    import pty

    async with HubServer(port=0) as hub, Agent("worker-in-sight", url=hub.url):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "agenthub", "top", "--url", hub.url]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        written = b""

        async def read_until(text: bytes) -> None:
            nonlocal written
            async with asyncio.timeout(WAIT_S):
                while text not in written:
                    written += await asyncio.to_thread(os.read, ours, 65_536)

        await read_until(b"tasks/s")
        os.write(ours, b"a")
        await read_until(b"worker-in-sight")
        os.write(ours, b"q")
        assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
        os.close(ours)


async def test_top_prints_the_table_where_there_is_no_terminal() -> None:
    async with HubServer(port=0) as hub, Agent("worker-in-sight", url=hub.url):
        command = [sys.executable, "-m", "agenthub", "top", "--url", hub.url]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            while b"worker-in-sight" not in await process.stdout.readline():
                pass
        process.terminate()
        await process.wait()
