"""Check the pages against the code: run their examples, compare their tables and diagrams."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agenthub import (
    AGENT_TRANSITIONS,
    FINAL_STATES,
    LEFT_STATES,
    TRANSITIONS,
    AgentState,
    Code,
    HubSettings,
    TaskState,
    argument_parser,
    decoder_from_agent,
    decoder_from_hub,
    encode,
    json_schema,
)
from tests.pages import CLI, cli_page
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
    assert len(blocks(GUIDE, "python")) == 2
    for block in blocks(GUIDE, "python"):
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT, timeout=WAIT_S)


def test_each_command_of_the_pages_is_understood() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "sh"))
    lines = re.findall(r"^(?:python -m )?agenthub (\w.*)$", text, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        argument_parser().parse_args(shlex.split(line))


def test_the_page_of_the_command_line_is_made_from_its_parser() -> None:
    assert CLI.read_text(encoding="utf-8") == cli_page(), "stale: python -m tests.stubs"


def test_the_readme_fits_on_few_screens() -> None:
    assert len(README.splitlines()) <= 150


def test_the_first_two_commands_of_the_readme_are_the_main_job_and_the_tests() -> None:
    first, second = blocks(README, "sh")[:2]
    assert first == "python3 -m examples.review_folder .\n"
    assert second == "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox\n"


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
    assert len(pages) == 11
    for page in pages:
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}#{anchor}"


def test_the_map_in_the_module_names_its_sections() -> None:
    source = (ROOT / "agenthub.py").read_text(encoding="utf-8")
    banners = re.findall(r"^# =+\n# (\d) (.+)$", source, re.MULTILINE)
    assert banners
    for number, name in banners:
        assert re.search(rf"^    {number} {name} ", source, re.MULTILINE), name
