"""JupyterLab in headless Chromium, for tests: run cells, press Stop, use menus, read outputs.

``async with lab_page(lab.url) as page: text = await page.run("x + 1")``. Everything waits on the page's own
state; a condition that does not come within ``TIMEOUT_MS`` raises Playwright's TimeoutError.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, Locator, Page, async_playwright, expect

CHROMIUM = "/usr/bin/chromium"
TIMEOUT_MS = 20_000
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class LabPage:
    """The notebook of one Lab page. ``page`` is Playwright's, for what is not here."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._fresh = True

    async def ready(self) -> None:
        """Until the notebook has its kernel and the kernel is idle."""
        name = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Toolbar-kernelName")
        await expect(name).not_to_have_text("No Kernel")
        await expect(name).to_be_visible()
        await self.idle()

    async def idle(self) -> None:
        """Until Lab shows the kernel as idle."""
        await expect(self._indicator).to_have_attribute("data-status", "idle")

    async def busy(self) -> None:
        """Until Lab shows the kernel as busy, whoever keeps it so."""
        await expect(self._indicator).to_have_attribute("data-status", "busy")

    @property
    def _indicator(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator")

    @property
    def cell(self) -> Locator:
        """The active cell: the one :meth:`start` ran last."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell.jp-mod-active")

    async def start(self, code: str) -> None:
        """Run code in a new cell and return once the cell runs or waits for its turn."""
        # A cell of its own: its prompt is "[ ]" first, so that "[1]" cannot be an earlier run's.
        last = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").last
        await last.click()
        await self.page.keyboard.press("Escape")
        await self.page.keyboard.press("b")
        editor = self.cell.locator(".cm-content")
        await expect(editor).to_have_text("")
        await editor.fill(code)
        await self.page.keyboard.press("Control+Enter")
        await expect(self.prompt).not_to_have_text("[ ]:")

    async def run(self, code: str) -> str:
        """Run code in a new cell, wait for its end, and return the text of all its outputs."""
        await self.start(code)
        return await self.finished()

    async def finished(self) -> str:
        """Wait for the end of the cell that was started last; the text of its outputs."""
        await expect(self.prompt).to_have_text(re.compile(r"\[\d+\]:"))
        await self.idle()
        return await self.output()

    async def output(self) -> str:
        """What the active cell shows so far."""
        return "\n".join(await self.cell.locator(".jp-OutputArea-output").all_inner_texts()).strip()

    @property
    def prompt(self) -> Locator:
        """The active cell's ``[n]:``."""
        return self.cell.locator(".jp-InputArea .jp-InputPrompt")

    async def stop(self) -> None:
        """Press the Stop button."""
        await self.page.locator('[data-command="notebook:interrupt-kernel"]').first.click()

    async def menu(self, menu: str, item: str, *, confirm: bool = False) -> None:
        """Choose a menu's item, and accept the dialog it opens if ``confirm``."""
        await self.page.locator(".lm-MenuBar-item", has_text=menu).first.click()
        await self.page.locator(".lm-Menu-item", has_text=item).first.click()
        if confirm:
            await self.page.locator(".jp-Dialog .jp-mod-accept").click()
            await expect(self.page.locator(".jp-Dialog")).to_have_count(0)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A headless Chromium, to be shared by the pages of a test module."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def lab_page(url: str, browser: Browser | None = None) -> AsyncIterator[LabPage]:
    """Lab's page at ``url`` with its notebook open and its kernel idle; in a Chromium of its own if none is given."""
    if browser is None:
        async with chromium() as own, lab_page(url, own) as page:
            yield page
        return
    context = await browser.new_context(viewport={"width": 1400, "height": 1000})
    try:
        inner = await context.new_page()
        inner.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        await inner.goto(url)
        page = LabPage(inner)
        await page.ready()
        yield page
    finally:
        await context.close()
