"""Make the pictures of the page from a seeded demo: `python -m docs.make_page_pictures`.

Needs Debian's `chromium` and the package `playwright`, as the tests of the page do.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

from agenthub import HubServer
from examples import demo

FOLDER = Path(__file__).parent
WORKING_S = 45.0  # Until the lines of the tiles have something to show.
SIZES = {"page-light": ("light", 1200, 760), "page-dark": ("dark", 1200, 760), "page-narrow": ("dark", 400, 760)}


async def main() -> int:
    from playwright.async_api import async_playwright

    demo.LOTS.seed(7)
    async with HubServer(port=0) as hub, demo.at_work(hub), async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        pages: dict[str, Any] = {}
        for name, (scheme, width, height) in SIZES.items():
            size = {"width": width, "height": height}
            pages[name] = await browser.new_page(viewport=size, color_scheme=scheme)
            await pages[name].goto(f"http://127.0.0.1:{hub.port}/")
        await asyncio.sleep(WORKING_S)
        articles = [one for one in hub.hub.tasks.open.values() if one.children]
        if articles:  # The dark one shows the life of a task that has parts.
            await pages["page-dark"].evaluate(f"location.hash = 'task={articles[0].task_id}'")
            await pages["page-dark"].locator("#panel .dim").first.wait_for()
        for name, page in pages.items():
            await page.screenshot(path=FOLDER / f"{name}.png")
            print(FOLDER / f"{name}.png")
        await browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
