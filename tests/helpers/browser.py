"""A real browser that opens a page of this machine, and what a person would notice there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")

# Text whose colour is too close to what lies behind it: WCAG 2.2, 4.5 to 1, 3 to 1 for large text.
FAINT = """
() => {
  const parse = (text) => {
    const numbers = (text.match(/[\\d.]+/g) || []).map(Number);
    return text.startsWith('rgb') ? {rgb: numbers.slice(0, 3), alpha: numbers.length > 3 ? numbers[3] : 1} : null;
  };
  const over = (top, below) => top.rgb.map((value, at) => value * top.alpha + below[at] * (1 - top.alpha));
  const luminance = (rgb) => {
    const linear = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (element) => {
    const chain = [];
    for (let one = element; one; one = one.parentElement) {
      const style = getComputedStyle(one);
      if (style.backgroundImage !== 'none' || one.tagName === 'svg') return null;  // a picture, whose colours vary
      chain.push(parse(style.backgroundColor));
    }
    const dark = matchMedia('(prefers-color-scheme: dark)').matches;
    return chain.reverse().reduce((below, top) => (top ? over(top, below) : below), dark ? [18, 18, 18] : [255, 255, 255]);
  };
  const faint = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || ['SCRIPT', 'STYLE'].includes(element.tagName) || !element.checkVisibility({checkOpacity: true})) continue;
    const back = behind(element), style = getComputedStyle(element), front = parse(style.color);
    if (!back || !front) continue;
    seen += 1;
    const [a, b] = [luminance(over(front, back)), luminance(back)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)} (${style.color})`);
  }
  return {faint, seen};
}
"""


@dataclass
class Look:
    """What a page did when it was opened, and how it lies in the window.

    Attributes:
        messages: errors and warnings of the console, and exceptions.
        requests: addresses that were asked for beside the page itself and what it holds.
        overflow: pixels by which the page is wider than the window.
        broken: sources of pictures that did not load.
        pictures: number of pictures.
        faint: texts with too little contrast.
        texts: number of texts whose contrast was measured.
    """

    messages: list[str]
    requests: list[str]
    overflow: int
    broken: list[str]
    pictures: int
    faint: list[str]
    texts: int


@contextmanager
def browser() -> Iterator[Any]:
    """Start the installed Chromium; skip the test where it or Playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, which needs rights that root in a container lacks: pages of this repository alone are opened.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


def look_at(opened: Any, file: Path, size: str, scheme: str, screenshot: Path | None = None) -> Look:
    """Open a file in a window of a size and colour scheme, its folded parts unfolded; returns what was seen."""
    width, height = SIZES[size]
    context = opened.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    address = file.resolve().as_uri()
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda one: messages.append(one.text) if one.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda one: requests.append(one.url))
    try:
        page.goto(address, wait_until="load")
        page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        root = "document.documentElement"
        overflow = page.evaluate(f"() => {root}.scrollWidth - {root}.clientWidth")
        pictures = page.evaluate(
            "async () => Promise.all([...document.images].map(async (one) => {"
            " try { await one.decode(); } catch { } return [one.src.slice(0, 80), one.naturalWidth]; }))"
        )
        measured = page.evaluate(FAINT)
        if screenshot is not None:
            page.screenshot(path=screenshot, full_page=True)
    finally:
        context.close()
    return Look(
        messages=messages,
        requests=[url for url in requests if not url.startswith(("data:", "blob:")) and url != address],
        overflow=overflow,
        broken=[source for source, pixels in pictures if not pixels],
        pictures=len(pictures),
        faint=measured["faint"],
        texts=measured["seen"],
    )
