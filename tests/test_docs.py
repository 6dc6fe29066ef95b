"""Check the pages against the code: run their examples, compare their tables and diagrams."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import agenthub
from agenthub import (
    AGENT_TRANSITIONS,
    FINAL_STATES,
    LEFT_STATES,
    TRANSITIONS,
    Agent,
    AgentState,
    Code,
    HubSettings,
    LocalHub,
    TaskState,
    argument_parser,
    decoder_from_agent,
    decoder_from_hub,
    encode,
    json_schema,
)
from docs import make_picture
from tests.pages import API, CLI, api_page, cli_page
from tests.support import ROOT, WAIT_S, hub_process, running

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page with that info string."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def table_after(page: str, heading: str) -> dict[str, str]:
    """Return the first two columns of the tables under a heading."""
    section = page.partition(f"\n{heading}\n")[2]
    section = re.split(r"\n#+ ", section)[0]
    rows = re.findall(r"^\| *(.+?) *\| *(.*?) *(?:\|.*)?\|?$", section, re.MULTILINE)
    return {name: value for name, value in rows if not name.startswith("--")}


@pytest.mark.parametrize("example", blocks(PROTOCOL, "json agent"))
def test_each_example_from_an_agent_is_a_message(example: str) -> None:
    document = json.loads(example)
    message = decoder_from_agent()(example.encode())
    written = json.loads(encode(message))
    assert {name: written[name] for name in document if name != "capabilities"} == {
        name: value for name, value in document.items() if name != "capabilities"
    }


@pytest.mark.parametrize("example", blocks(PROTOCOL, "json hub"))
def test_each_example_from_the_hub_is_written_as_the_hub_writes_it(example: str) -> None:
    assert json.loads(encode(decoder_from_hub()(example.encode()))) == json.loads(example)


def test_the_protocol_page_shows_every_message_in_each_direction() -> None:
    definitions = json_schema()["$defs"]
    schema_types = {one["properties"]["type"]["const"] for one in definitions.values() if "type" in one["properties"]}
    shown = {json.loads(example)["type"] for example in blocks(PROTOCOL, "json agent") + blocks(PROTOCOL, "json hub")}
    assert shown == schema_types
    assert len(shown) == 10


def test_the_protocol_page_names_every_code() -> None:
    assert {code.value for code in Code} <= set(re.findall(r"`([a-z_]+)`", PROTOCOL))


def number_in(text: str) -> float:
    return float(re.sub(r"[^0-9.]", "", text))


def test_the_limits_on_the_protocol_page_are_those_of_the_hub() -> None:
    limits = table_after(PROTOCOL, "## Limits")
    settings = HubSettings()
    assert number_in(limits["open tasks of one requester"]) == settings.open_tasks_max
    assert number_in(limits["tasks waiting at the hub"]) == settings.pending_tasks_max
    assert number_in(limits["agents"]) == settings.agents_max
    properties = json_schema()["$defs"]["Register"]["properties"]
    assert number_in(limits["`capabilities`"]) == properties["capabilities"]["maxItems"]
    assert number_in(limits["`description`"]) == properties["description"]["maxLength"]


def diagram(table: Mapping[Any, Mapping[Any, Any]], first: str, final: frozenset[Any]) -> str:
    """Return the diagram of a table of transitions."""
    steps = [f"    {state} --> {after}: {event}" for state, row in table.items() for event, after in row.items()]
    ends = [f"    {state} --> [*]" for state in table if state in final]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {first}", *steps, *ends]) + "\n"


def test_the_diagrams_in_the_guide_are_the_tables_of_the_states_of_tasks_and_agents() -> None:
    assert blocks(GUIDE, "mermaid") == [
        diagram(TRANSITIONS, TaskState.PENDING, FINAL_STATES),
        diagram(AGENT_TRANSITIONS, AgentState.ONLINE, LEFT_STATES),
    ]


def test_the_readme_example_greets_ada(tmp_path: Any) -> None:
    greeter, caller, *_ = blocks(README, "python")
    (tmp_path / "greeter.py").write_text(greeter)
    (tmp_path / "caller.py").write_text(caller)
    with hub_process() as (url, _):
        environment = {"AGENTHUB_URL": url}
        with running(str(tmp_path / "greeter.py"), env=environment) as agent:
            assert agent.stderr is not None
            wait_for_capability(url, "greet")
            call = ["-m", "agenthub", "call", "greet", '{"name": "Ada"}']
            assert output_of(*call, env=environment) == '"Hello, Ada!"\n'
            assert output_of(str(tmp_path / "caller.py"), env=environment) == "Hello, ADA!\n"


def output_of(*args: str, env: dict[str, str]) -> str:
    with running(*args, env=env) as process:
        output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    return output


def wait_for_capability(url: str, capability: str) -> None:
    """Wait until an online agent offers a capability, without delegating to it."""
    program = (
        "import asyncio, agenthub\n"
        "async def main():\n"
        f"    async with agenthub.Agent('probe', url={url!r}) as me:\n"
        f"        while not await me.discover({capability!r}):\n"
        "            await asyncio.sleep(0.02)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=WAIT_S)


def test_the_python_of_the_guide_runs() -> None:
    found = blocks(GUIDE, "python")
    assert len(found) == 7
    for block in found:
        if "agenthub_otel" not in block or importlib.util.find_spec("opentelemetry") is not None:
            subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT, timeout=WAIT_S)


async def test_the_agents_of_the_guide_stream_and_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {}
    for block in blocks(GUIDE, "python"):
        if "yield word" in block or "task.ask" in block or "on_question=lambda" in block:
            exec(block, scope)
    monkeypatch.setattr("builtins.input", lambda text: "develop" if text == "main or develop?" else "")
    async with asyncio.timeout(WAIT_S), LocalHub() as hub:
        for name in ("writer", "reviewer"):
            scope[name].use_hub(hub)
        async with scope["writer"], scope["reviewer"], Agent("me", hub=hub) as me:
            assert "".join([piece async for piece in me.stream("write", {"about": "hubs"})]) == "Once upon a time"
            await scope["main"](me)
    assert capsys.readouterr().out == "reviewed a.py on develop\nreviewed a.py on main\n"


def test_each_command_of_the_pages_is_understood() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "sh"))
    lines = re.findall(r"^(?:python -m )?agenthub (\w.*)$", text, re.MULTILINE)
    assert len(lines) == 14
    for line in lines:
        argument_parser().parse_args(shlex.split(line))


def test_each_command_within_the_text_is_understood() -> None:
    pages = [*PAGES, ROOT / "SECURITY.md", ROOT / "examples" / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page not in (API, CLI))
    lines = re.findall(r"`(?:python3? (?:-m )?)?agenthub(?:\.py)? ([^`\n]+)`", text)
    assert len(lines) >= 15
    missing = {
        "call": "call x",
        "call --no-wait": "call x --no-wait",
        "bridge --http": "bridge --http 0",
        "bridge --http PORT": "bridge --http 0",
    }
    for line in lines:
        argument_parser().parse_args(shlex.split(missing.get(line, line)))


def test_the_access_file_of_the_page_on_access_is_one(tmp_path: Path) -> None:
    (block,) = blocks((ROOT / "docs" / "access.md").read_text(encoding="utf-8"), "toml")
    (tmp_path / "access.toml").write_text(block)
    (tmp_path / "access.toml").chmod(0o600)
    agenthub.Access.of_file(str(tmp_path / "access.toml"))


def test_the_page_of_the_command_line_is_made_from_its_parser() -> None:
    assert CLI.read_text(encoding="utf-8") == cli_page(), "stale: python -m tests.stubs"


def test_the_page_of_the_api_is_made_from_docstrings() -> None:
    page = API.read_text(encoding="utf-8")
    assert page == api_page(), "stale: python -m tests.stubs"
    assert re.findall(r"^### (\w+)", page, re.MULTILINE) == agenthub.__all__


def test_the_readme_fits_on_few_screens() -> None:
    assert len(README.splitlines()) <= 150


def test_the_first_two_commands_of_the_readme_are_the_main_job_and_the_tests() -> None:
    first, second = blocks(README, "sh")[:2]
    assert first == "python3 -m examples.review_folder .\n"
    assert second == "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_the_picture_of_the_readme_shows_what_the_first_command_prints() -> None:
    """The port and the seconds are not compared."""

    def compared(picture: str) -> str:
        return re.sub(r"127\.0\.0\.1:\d+|\d+\.\d s", "N", picture)

    assert "](docs/review.svg)" in README.partition("## ")[0]
    made = compared(make_picture.made_picture())
    assert made == compared(make_picture.PICTURE.read_text(encoding="utf-8")), "stale: python -m docs.make_picture"
    assert ElementTree.fromstring(made).tag.endswith("svg")


def test_the_mcp_json_of_the_guide_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "claude_code" / ".mcp.json").read_text(encoding="utf-8")
    assert [json.loads(block) for block in blocks(GUIDE, "json")] == [json.loads(example)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_within_the_project_leads_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")]
    pages += [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")]
    assert len(pages) >= 16
    for page in pages:
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}#{anchor}"


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)", README.partition("\n## Pages\n")[2]))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_map_in_the_module_names_its_sections() -> None:
    source = (ROOT / "agenthub.py").read_text(encoding="utf-8")
    banners = re.findall(r"^# =+\n# (\d) (.+)$", source, re.MULTILINE)
    assert banners
    for number, name in banners:
        assert re.search(rf"^    {number} {name} ", source, re.MULTILINE), name


# docs/operations.md

DEPLOY = ROOT / "examples" / "deploy"


def test_the_page_of_operations_names_every_file_to_deploy() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"examples/deploy/([\w.]+)", page)) == {path.name for path in DEPLOY.iterdir()}


@pytest.mark.skipif(os.name != "posix" or shutil.which("install") is None, reason="needs the command install")
def test_the_commands_of_the_page_of_operations_put_the_files_where_the_unit_has_them(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    *commands, last = blocks(page, "sh")[0].splitlines()
    assert last == "sudo systemctl enable --now agenthub"
    (tmp_path / "etc" / "systemd" / "system").mkdir(parents=True)
    script = "\n".join(["set -e", *commands]).replace("sudo python3", sys.executable).replace("sudo ", "")
    script = re.sub(r" /(opt|etc)/", rf" {tmp_path}/\1/", script)
    subprocess.run(["sh", "-c", script], check=True, cwd=ROOT, timeout=WAIT_S)
    unit = (tmp_path / "etc" / "systemd" / "system" / "agenthub.service").read_text(encoding="utf-8")
    for path in ("opt/agenthub/agenthub.py", "etc/agenthub/token"):
        assert (tmp_path / path).exists()
        assert f"/{path}" in unit


def test_the_commands_of_the_files_to_deploy_are_understood() -> None:
    unit = (DEPLOY / "agenthub.service").read_text(encoding="utf-8")
    argument_parser().parse_args(shlex.split(re.findall(r"^ExecStart=\S+ \S+ (.+)$", unit, re.MULTILINE)[0]))
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    argument_parser().parse_args(json.loads(re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)[0]))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit() -> None:
    command = ["systemd-analyze", "verify", str(DEPLOY / "agenthub.service")]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if "agenthub.service" in line]) == (
        0,
        [],
    )


def test_the_compose_file_builds_the_dockerfile() -> None:
    yaml = pytest.importorskip("yaml")
    hub = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["hub"]
    assert (DEPLOY / hub["build"]["context"] / hub["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert hub["volumes"] == ["hub:/data"]


NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_agents_reach_the_hub_through_nginx(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proxies = "10.0.0.0/8,127.0.0.1"
    options = ["--allow-host", "example.org", "--trusted-proxy", proxies, "--log-level", "warning"]
    token = {"AGENTHUB_TOKEN": "right-" * 8}
    log = tmp_path / "hub.log"
    with log.open("w") as stderr, hub_process(*options, env=token, stderr=stderr) as (url, _):
        block = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        block = block.replace("127.0.0.1:8765", url.removeprefix("ws://")).replace(
            "listen 80;", f"listen 127.0.0.1:{port};"
        )
        with nginx(tmp_path, block):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/agents/healthz", headers={"Host": "example.org"})
            with until_open(request) as response:
                assert json.load(response)["status"] == "ok"
            through = {"AGENTHUB_URL": f"ws://127.0.0.1:{port}/agents/"}
            assert json.loads(output_of("-m", "agenthub", "status", "--json", env={**through, **token}))
            # Nginx appends the address of this client, which is a trusted proxy's too: as if another one stood before.
            request.add_header("X-Forwarded-For", "1.1.1.1, 203.0.113.7")
            request.add_header("Authorization", "Bearer wrong")
            with until_open(request):
                assert log.read_text().endswith("rejected reason=unauthorized address=203.0.113.7\n")


@contextlib.contextmanager
def nginx(folder: Path, block: str) -> Iterator[None]:
    """Run nginx in the foreground, with its files in a folder, and a block of configuration."""
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{ access_log off; {paths}\n{block}}}\n", encoding="utf-8")
    command = [str(NGINX), "-p", str(folder), "-c", "nginx.conf", "-e", f"{folder}/log"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(WAIT_S)


def until_open(request: urllib.request.Request) -> Any:
    """Return the response to a request; a refused connection means that the server is still starting."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return urllib.request.urlopen(request, timeout=WAIT_S)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


# docs/faq.md


@pytest.mark.parametrize(
    "message", re.findall(r"^### (.+)$", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.MULTILINE)
)
def test_each_message_of_the_faq_exists(message: str) -> None:
    assert message in (ROOT / "agenthub.py").read_text(encoding="utf-8").replace('\\"', '"')
