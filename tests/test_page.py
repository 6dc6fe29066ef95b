"""The page at a hub's address: what the server sends, and what a real browser makes of it.

The tests with a browser need Debian's `chromium` and the package `playwright`, whose own browser is not used:
`tox -e page`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

import agenthub
from agenthub import Access, Agent, HubServer, HubSettings, Task
from examples import demo
from tests.raw_websocket import WAIT_S, raw_socket
from tests.test_operations import eventually, http

TOKEN, WRONG = "right-" * 8, "wrong-" * 8
CHROMIUM = os.environ.get("AGENTHUB_TEST_CHROMIUM") or shutil.which("chromium")
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
HANDSHAKE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", KEY)


# The answer to GET /


async def test_page_comes_with_the_hashes_of_all_that_may_run_on_it() -> None:
    async with HubServer(port=0) as hub:
        status, headers, body = await http(hub.url, "/?x=1")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "data:"
        assert policy.pop("connect-src") == "'self'"
        for tag in ("script", "style"):
            [text] = re.findall(f"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
        assert policy.pop("require-trusted-types-for") == "'script'"
        nothing = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
        assert policy == dict.fromkeys(nothing, "'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_page_loads_nothing_and_writes_no_html() -> None:
    page = HubServer.page
    assert not re.findall(
        r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|innerHTML|insertAdjacent|document\.write|eval\(", page
    )
    (icon,) = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert icon.startswith("data:image/svg+xml,")
    assert not re.findall(r'\son\w+="|\sstyle="', page)


async def test_handshake_at_the_path_of_the_page_opens_a_websocket() -> None:
    async with HubServer(port=0) as hub, raw_socket(hub.url, handshake=False) as one:
        await one.send("\r\n".join(["GET / HTTP/1.1", "Host: localhost", *HANDSHAKE, "", ""]).encode())
        assert (await one.reader.readline()).startswith(b"HTTP/1.1 101 ")


async def test_hub_without_a_page_answers_as_before() -> None:
    async with HubServer(port=0, has_page=False) as hub:
        assert (await http(hub.url, "/"))[0] == 426
        assert (await http(hub.url, "/healthz"))[0] == 200


async def status_of(hub: HubServer, host: str, origin: str) -> int:
    lines = ["GET / HTTP/1.1", f"Host: {host}", f"Origin: {origin}", *HANDSHAKE, "", ""]
    async with raw_socket(f"ws://127.0.0.1:{hub.port}", handshake=False) as one:
        await one.send("\r\n".join(lines).encode())
        return int((await one.reader.readline()).split()[1])


async def test_page_works_under_any_address_of_a_hub_that_needs_a_token() -> None:
    async with HubServer(host="0.0.0.0", port=0, access=Access.of_token(TOKEN)) as hub:
        own = f"192.168.1.5:{hub.port}"
        assert await status_of(hub, own, f"http://{own}") == 101
        assert await status_of(hub, "hub.example", "https://hub.example") == 101  # Behind a proxy with TLS.
        for origin in ("http://evil.example", f"http://192.168.1.5:{hub.port + 1}", "null", own, f"ftp://{own}"):
            assert await status_of(hub, own, origin) == 403, origin


async def test_origins_stay_a_list_on_loopback_and_without_a_token() -> None:
    async with HubServer(port=0, access=Access.of_token(TOKEN), allow_hosts=["hub.example"]) as hub:
        assert await status_of(hub, f"localhost:{hub.port}", f"http://localhost:{hub.port}") == 101
        assert await status_of(hub, "hub.example", "http://hub.example") == 403
    async with HubServer(host="0.0.0.0", port=0, insecure=True) as hub:
        assert await status_of(hub, f"evil.example:{hub.port}", f"http://evil.example:{hub.port}") == 403


# In a browser


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    """Start Chromium; skip the test where it, or its driver, is missing."""
    playwright = pytest.importorskip("playwright.async_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    async with playwright.async_playwright() as driver:
        found = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield found
        finally:
            await found.close()


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Any]:
    """Open the page; fail if it logged an error, or a dialog came up."""
    async with browser() as found:
        page = await found.new_page(**options)
        blamed: list[str] = []
        page.on("pageerror", lambda error: blamed.append(str(error)))
        page.on("dialog", lambda dialog: blamed.append(dialog.message))
        # That a server does not answer is logged by the browser itself.
        page.on("console", lambda one: blamed.append(one.text) if "WebSocket connection to" not in one.text else None)
        page.set_default_timeout(WAIT_S * 1000)
        await page.goto(url.replace("ws://", "http://"))
        yield page
        assert blamed == []


async def shown(page: Any, selector: str, text: str) -> None:
    await page.locator(selector, has_text=text).first.wait_for()


async def until(page: Any, expression: str, poll_s: float = 0.05) -> None:
    """Return when an expression of JavaScript is true, which the page's policy lets only the driver evaluate."""
    async with asyncio.timeout(WAIT_S):
        while not await page.evaluate(expression):
            await asyncio.sleep(poll_s)


async def width_overflow(page: Any) -> int:
    found: int = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return found


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
async def test_page_shows_agents_tasks_and_the_life_of_a_task(scheme: str, width: int) -> None:
    demo.LOTS.seed(1)
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    async with HubServer(port=0) as hub, demo.at_work(hub, 5.0), opened(hub.url, **options) as page:
        await shown(page, "#link", "live")
        await shown(page, "#agents tr", "planner")
        await shown(page, "#queues tr", "compose-music")
        await shown(page, "#queues tr:has-text('compose-music')", "none")
        await shown(page, "#tasks tr", "in progress")
        assert await width_overflow(page) <= 0
        assigned = page.locator("#tasks tr", has=page.locator(".in_progress")).locator("a", has_text="plan-article")
        await assigned.first.press("Enter")
        await shown(page, "#subject", "Task plan-article")
        for text in ("accepted", "assigned"):
            await shown(page, "#life tr", text)
        await shown(page, "#family tr", "research")
        assert await page.evaluate("document.activeElement.id") == "close"
        await page.locator("#life a", has_text="planner").first.click()
        await shown(page, "#subject", "Agent planner")
        await shown(page, "#facts tr", "Splits a piece of work")
        await shown(page, "#capabilities tr", "plan-article")
        await shown(page, "#involved tr", "research")
        assert await width_overflow(page) <= 0
        await page.go_back()
        await shown(page, "#subject", "Task plan-article")
        await page.keyboard.press("Escape")
        await until(page, "!document.getElementById('detail').open && !location.hash")
        await page.locator("#filter").fill("no such thing")
        await until(page, "getComputedStyle(document.querySelector('#tasks tbody'), '::after').content === '\"None.\"'")
        await page.locator("#filter").fill("")
        await page.locator("#state").select_option("completed")
        await until(
            page, "[...document.querySelectorAll('#tasks .badge')].every(one => one.textContent === 'completed')"
        )


@pytest.mark.long
async def test_names_that_agents_choose_are_shown_as_text_only() -> None:
    async with (
        HubServer(port=0) as hub,
        Agent(HOSTILE, url=hub.url, description=HOSTILE, metadata={HOSTILE: HOSTILE}) as one,
    ):

        @one.capability(HOSTILE, description=HOSTILE)
        async def work(task: Task) -> str:
            raise agenthub.TaskFailed(HOSTILE, code="javascript:alert(1)")

        await one.submit("javascript:alert(4)", wait=True)
        async with Agent("me", url=hub.url) as me:
            with contextlib.suppress(agenthub.TaskFailed):
                await me.delegate(HOSTILE, HOSTILE, wait=True)
            async with opened(hub.url) as page:
                await shown(page, "#agents", HOSTILE)
                for row in ("#tasks a", "#agents a"):
                    await page.locator(row, has_text=HOSTILE).first.click()
                    await shown(page, "#subject", HOSTILE)
                    rounds = await page.evaluate("serial")
                    await until(page, f"serial > {rounds + 6}")
                    await page.keyboard.press("Escape")
                assert await page.title() == "AgentHub"
                assert await page.locator("img, iframe, object, body script + script").count() == 0
                links = await page.evaluate("[...document.links].map(one => one.getAttribute('href'))")
                assert len(links) > 4
                assert all(re.fullmatch(r"#(task|agent)/[\w.:-]+", one) for one in links)


@pytest.mark.long
async def test_dialog_that_is_closed_during_a_refresh_stays_closed_and_is_no_wider_than_the_page() -> None:
    name = "n" * 128
    async with HubServer(port=0) as hub, Agent(name, url=hub.url) as one:
        await one.submit(name, wait=True)
        async with opened(hub.url, viewport={"width": 400, "height": 800}) as page:
            for row in ("#agents a", "#tasks th a"):
                await page.locator(row).first.click()
                await shown(page, "#subject", name)
                assert await page.evaluate(
                    "[...document.querySelectorAll('#detail, #subject')].every(one => "
                    "one.scrollWidth <= one.clientWidth)"
                )
                if row == "#agents a":
                    await page.keyboard.press("Escape")
                    await until(page, "!$('detail').open && !location.hash")
            await page.evaluate("openings = 0, $('detail').showModal = () => { openings++; }, 0")
            await page.evaluate(
                "send = socket.send.bind(socket), release = undefined,"
                "socket.send = text => { text.includes('task_id') ? release = () => send(text) : send(text); }, 0"
            )
            await until(page, "release !== undefined")
            await page.keyboard.press("Escape")
            await until(page, "!$('detail').open && !location.hash")
            rounds = await page.evaluate("release(), serial")
            await until(page, f"serial > {rounds + 3}")
            assert await page.evaluate("openings") == 0


@pytest.mark.long
async def test_page_says_when_the_hub_is_gone_and_comes_back_by_itself() -> None:
    async with HubServer(port=0) as hub:
        port = hub.port
        async with opened(hub.url) as page:
            await shown(page, "#link", "live")
            await hub.stop()
            await shown(page, "#link", "the hub is gone; trying again")
            async with HubServer(port=port):
                await shown(page, "#link", "live")
                assert await page.locator("body.live #main").count() == 1


@pytest.mark.long
async def test_token_is_asked_for_and_stays_in_this_tab_and_out_of_the_url() -> None:
    async with HubServer(port=0, access=Access.of_token(TOKEN)) as hub, opened(hub.url) as page:
        await page.locator("#token").fill(WRONG)
        await page.keyboard.press("Enter")
        await shown(page, "#refusal", "invalid token")
        assert await page.locator("#main").is_hidden()
        await page.locator("#token").fill(TOKEN)
        await page.keyboard.press("Enter")
        await shown(page, "#link", "live")
        assert await page.evaluate("[localStorage.length, document.cookie, location.href]") == [
            0,
            "",
            hub.url.replace("ws:", "http:") + "/",
        ]
        await page.reload()
        await shown(page, "#link", "live")
        assert TOKEN not in await page.content()


@pytest.mark.long
async def test_page_of_another_origin_cannot_connect() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<title>elsewhere</title>")
        writer.close()

    elsewhere = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with elsewhere, HubServer(port=0) as hub, browser() as found:
        page = await found.new_page()
        await page.goto(f"http://127.0.0.1:{elsewhere.sockets[0].getsockname()[1]}/")
        code = await page.evaluate(
            "url => new Promise(done => { const one = new WebSocket(url); one.onopen = () => done('open');"
            " one.onclose = event => done(event.code); })",
            hub.url,
        )
        assert code == 1006
        await eventually(lambda: hub.rejected == {"origin": 1})


CONTRAST = """
() => {
  // Colours are computed as rgb(), or after mixing as color(srgb), whose numbers go to 1.
  const parse = text => text.match(/[\\d.]+/g).map((one, at) => at < 3 && text.startsWith("color") ? 255 * one : +one);
  const linear = one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
  const bright = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = node => {
    if (!node) return [255, 255, 255];
    const found = parse(getComputedStyle(node).backgroundColor), alpha = found[3] ?? 1;
    return alpha === 1 ? found : behind(node.parentElement).map((one, at) => alpha * found[at] + (1 - alpha) * one);
  };
  const low = [];
  for (const node of document.querySelectorAll("body *:not(script, style)")) {
    const has = [...node.childNodes].some(one => one.nodeType === 3 && one.textContent.trim());
    if (!has || !node.checkVisibility()) continue;
    const [one, other] = [bright(parse(getComputedStyle(node).color)), bright(behind(node))].sort((a, b) => b - a);
    if ((one + 0.05) / (other + 0.05) < 4.5) low.push(node.outerHTML.slice(0, 80));
  }
  return low;
}
"""


UNNAMED = """
() => [...document.querySelectorAll("button, input, select, progress, [role=region]")].filter(
  one => !one.textContent.trim() && !one.ariaLabel && !one.labels?.length && !one.getAttribute("aria-labelledby")
).map(one => one.outerHTML)
"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_has_enough_contrast_and_every_control_a_name(scheme: str) -> None:
    demo.LOTS.seed(1)
    async with HubServer(port=0) as hub, demo.at_work(hub, 8.0), opened(hub.url, color_scheme=scheme) as page:
        await shown(page, "#tasks tr", "completed")
        assert await page.evaluate(CONTRAST) == []
        await page.locator("#tasks a").first.click()
        await shown(page, "#life", "accepted")
        assert await page.evaluate(CONTRAST) == []
        assert await page.evaluate(UNNAMED) == []


@pytest.mark.long
async def test_refreshes_keep_focus_scroll_and_selection() -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me:
        for number in range(100):
            await me.submit(f"later-{number}", wait=True)
        async with opened(hub.url) as page:
            await shown(page, "#tasks tr", "later-50")
            await page.locator("#tasks a", has_text="later-50").focus()
            before = await page.evaluate("scrollY")
            assert before > 0
            for number in range(100, 103):
                await me.submit(f"later-{number}", wait=True)
            await shown(page, "#tasks tr", "later-102")
            assert await page.evaluate("document.activeElement.textContent") == "later-50"
            assert await page.evaluate("scrollY") >= before
            await page.evaluate("getSelection().selectAllChildren(document.querySelector('#tasks tbody th'))")
            selected = await page.evaluate("getSelection().toString()")
            await me.submit("later-103", wait=True)
            rounds = await page.evaluate("serial")
            await until(page, f"serial > {rounds + 6}")
            assert await page.evaluate("getSelection().toString()") == selected


@pytest.mark.long
async def test_heap_does_not_grow_with_a_thousand_tasks() -> None:
    """Two hundred refreshes of tasks that all change; ten minutes of it were watched by hand."""
    settings = HubSettings(retention_s=5.0)
    async with HubServer(settings, port=0) as hub, Agent("worker", url=hub.url, max_tasks=50) as worker:
        worker.capability("work")(lambda: "done")
        async with Agent("me", url=hub.url) as me, opened(hub.url) as page:
            held = [await me.submit(f"later-{number}", wait=True) for number in range(1000)]
            await shown(page, "#h-tasks", "200 of 1,000")
            session = await page.context.new_cdp_session(page)

            async def heap_bytes() -> int:
                await session.send("HeapProfiler.collectGarbage")
                return int((await session.send("Runtime.getHeapUsage"))["usedSize"])

            async def rounds(number: int) -> None:
                for _ in range(number):
                    await asyncio.gather(*(me.delegate("work") for _ in range(20)))
                    serial = await page.evaluate("wake(isDue = true), serial")
                    await until(page, f"serial > {serial + 2}", poll_s=0.0)

            await rounds(100)
            early = await heap_bytes()
            await rounds(200)
            assert await page.locator("#tasks tbody tr").count() == 200
            assert await heap_bytes() < early + 1_000_000
            for one in held:
                one.cancel_soon()


async def test_refresh_costs_the_hub_little_and_asks_for_few_rows() -> None:
    """What the page asks for once a second, of a hub with 1,000 tasks and 100 agents, is bounded."""
    assert re.search(r"REFRESH_MS = 1000, .*LISTED = 200,", HubServer.page)
    assert set(re.findall(r"\{type: '(\w+)'", HubServer.page)) == {"status", "discover"}  # Nothing that acts.
