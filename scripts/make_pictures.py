"""The pictures of the explorer in the docs, from pages that `make graph` or `circuitgraph view` wrote.

    python scripts/make_pictures.py explore.html a3.h2 nbs/images/explorer.png
    python scripts/make_pictures.py explore.html a3.h2 nbs/images/neighbours.png Neighbours

The page is opened in Chromium, the node is searched, and a view chosen if one is named.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1200, "height": 760}


def take(source: Path, node: str, target: Path, view: str | None = None) -> None:
    """Take one picture."""
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE)
        page.goto(source.resolve().as_uri())
        if node:
            page.fill("#search", node)
            page.press("#search", "Enter")
        if view is not None:
            page.get_by_role("tab", name=view).click()
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    page, node, picture, *views = sys.argv[1:]
    take(Path(page), node, Path(picture), *views)
