"""Layout check of the built site in a headless browser: no page is wider than its window.

    python tests/check_site.py                    # after make docs; needs Chromium or Chrome
    python tests/check_site.py --shots build/shots index benchmarks

At every width no element may reach beyond the window, except inside a box that scrolls. At 1280
pixels those boxes must show their content whole: code and tables fit. Without a browser the check
says so and ends with 0; with ``--need-browser``, for machines that have one, with 2.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 390)
WHOLE_FROM = 1280  # pixels
TIMEOUT_S = 240

# Pages are loaded one after another into a frame, which may be narrower than a browser's window can be.
CHECK = """<!doctype html><meta charset="utf-8"><title>check</title><body><script>
const pages = PAGES, widths = WIDTHS, wholeFrom = WHOLE_FROM, found = [];
const sleep = ms => new Promise(done => setTimeout(done, ms));
const name = node => node.tagName.toLowerCase() + (node.className && node.className.split ?
  "." + node.className.trim().split(/\\s+/).join(".") : "") +
  " " + JSON.stringify((node.innerText || "").trim().slice(0, 70));
function scrolls(node) {
  return ["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(node).overflowX);
}
function boxed(node, root) {
  for (let at = node.parentElement; at && at !== root; at = at.parentElement)
    if (scrolls(at)) return true;
  return false;
}
function measure(view, page, width) {
  const root = view.document.documentElement, content = view.document.querySelector("main");
  if (root.scrollWidth > width) found.push([page, width, "page", root.scrollWidth]);
  if (!content) found.push([page, width, "no <main>", 0]);
  for (const node of content ? content.querySelectorAll("article, article *") : []) {
    const box = node.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    if (box.right > width + 1 && !boxed(node, content))
      found.push([page, width, name(node), Math.round(box.right)]);
    const overflow = getComputedStyle(node).overflowX;
    if (width >= wholeFrom && ["auto", "scroll"].includes(overflow) &&
        node.scrollWidth > node.clientWidth + 1)
      found.push([page, width, name(node), node.scrollWidth, node.clientWidth]);
  }
}
(async () => {
  for (const width of widths) for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:900px;border:0`;
    const loaded = new Promise(done => frame.onload = done);
    frame.src = page;
    document.body.append(frame);
    await loaded;
    await sleep(150);
    measure(frame.contentWindow, page, width);
    frame.remove();
  }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({pages: pages.length * widths.length, found});
  document.body.append(result);
})();
</script>"""

SHOT = """<!doctype html><meta charset="utf-8"><style>body{margin:0}
iframe{border:0;display:block}</style>
<iframe src="PAGE" style="width:WIDTHpx;height:HEIGHTpx"></iframe>"""


def find_browser() -> str | None:
    """Return the path of a browser: ``$BROWSER_PATH``, or the first that is installed."""
    named = os.environ.get("BROWSER_PATH")
    return named or next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(browser: str, page: Path, *arguments: str) -> str:
    """Open a page without a window, and return what the browser prints."""
    with tempfile.TemporaryDirectory(prefix="effadam-site-") as profile:
        command = [
            *(browser, "--headless=new", "--disable-gpu", "--no-sandbox", "--hide-scrollbars"),
            *(
                "--allow-file-access-from-files",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-breakpad",
            ),
            *(f"--user-data-dir={profile}", f"--timeout={1000 * TIMEOUT_S}", *arguments),
            page.as_uri(),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S + 30, check=True
        )
    return done.stdout


def check(browser: str, site: Path, pages: list[str]) -> list[list[object]]:
    """Measure pages at all widths.

    Args:
        browser: Path of the browser.
        site: Folder of the site.
        pages: Names of the pages, relative to it.

    Returns:
        Page, width of the window, element and its measured widths, for every element that is too wide.
    """
    harness = site / "_check.html"
    values = {"PAGES": pages, "WIDTHS": WIDTHS, "WHOLE_FROM": WHOLE_FROM}
    text = CHECK
    for key in ("PAGES", "WIDTHS", "WHOLE_FROM"):
        text = text.replace(f"= {key}", f"= {json.dumps(values[key])}", 1)
    harness.write_text(text, "utf-8")
    try:
        # The browser's own clock runs ahead while nothing happens, so the budget is no waiting time.
        printed = browse(browser, harness, "--dump-dom", "--virtual-time-budget=600000")
    finally:
        harness.unlink()
    _, mark, rest = printed.partition('<pre id="result">')
    if not mark:
        raise SystemExit(f"The browser did not finish. It printed:\n{printed[-500:]}")
    result = json.loads(html.unescape(rest.partition("</pre>")[0]))
    if result["pages"] != len(pages) * len(WIDTHS):
        raise SystemExit(f"Only {result['pages']} pages were measured.")
    found: list[list[object]] = result["found"]
    return found


def shoot(browser: str, site: Path, page: str, width: int, height: int, path: Path) -> None:
    """Write a screenshot of a page in a window of this width."""
    harness = site / "_shot.html"
    text = SHOT.replace("PAGE", page).replace("WIDTH", str(width)).replace("HEIGHT", str(height))
    harness.write_text(text, "utf-8")
    try:
        size = f"--window-size={max(width, 500)},{height}"
        browse(browser, harness, f"--screenshot={path}", size, "--virtual-time-budget=5000")
    finally:
        harness.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="pages without .html (default: all)")
    parser.add_argument("--site", type=Path, default=Path("build/site"))
    parser.add_argument("--shots", type=Path, help="folder for screenshots of the named pages")
    parser.add_argument("--height", type=int, default=2400, help="of a screenshot, in pixels")
    parser.add_argument("--need-browser", action="store_true")
    args = parser.parse_args()
    site = args.site.resolve()
    pages = [f"{page}.html" for page in args.pages] or sorted(
        path.name for path in site.glob("*.html") if path.name != "404.html"
    )
    if not pages:
        raise SystemExit(f"There is no page in {site}. Run make docs first.")
    browser = find_browser()
    if browser is None:
        print("check_site: no Chromium or Chrome is installed, so the layout was not checked.")
        return 2 if args.need_browser else 0
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
        for page in pages:
            for width in WIDTHS:
                path = args.shots.resolve() / f"{Path(page).stem}-{width}.png"
                shoot(browser, site, page, width, args.height, path)
        return 0
    found = check(browser, site, pages)
    for page, width, element, *sizes in found:
        print(f"{page} at {width} px: {element} is {' in '.join(map(str, sizes))} px wide")
    print(f"check_site: {len(pages)} pages at {WIDTHS} px, {len(found)} elements too wide")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
