"""Pages in headless Chromium: measured, and pictured.

    python -m tests.browser runs/viskip_tiny/eval/report.html recipes/results/report.png --width 1280 --height 1560
    python -m tests.browser runs/viskip_tiny/eval/report.html recipes/results/report_phone.png --width 390 --height 1560

Those are the pictures of the README. A window cannot be as narrow as a phone, so a page is shown in a frame of a page.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body{margin:0}iframe{border:0;display:block;height:%(height)dpx}</style>
%(frames)s<pre></pre><script>
const measure = %(script)s
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(f => measure(f.contentDocument, f.contentWindow))
  document.querySelector("pre").textContent = JSON.stringify(found)
}
</script>"""


Frame = tuple[Path, int]
"""A page, of which a copy opens, and how wide in px."""


def browse(frames: Sequence[Frame], height: int, dark: bool, action: str, script: str) -> tuple[str, str, Path]:
    """Open pages once, in frames below each other.

    Args:
        frames: what opens.
        height: of each frame in px.
        dark: the colour scheme that is preferred.
        action: what Chromium does with it.
        script: a function of a page's document and window, called for each when all is loaded.

    Returns:
        What Chromium printed, what it logged, and the folder it worked in.
    """
    assert CHROMIUM is not None
    folder = Path(tempfile.mkdtemp(prefix="page-"))
    for place, (page, _) in enumerate(frames):
        shutil.copyfile(page, folder / f"{place}.html")
    drawn = "".join(
        f'<iframe src="{place}.html" style="width:{width}px"></iframe>' for place, (_, width) in enumerate(frames)
    )
    frame = FRAME % {"height": height, "frames": drawn, "script": script}
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    widest = max(500, *(width for _, width in frames))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--disable-background-networking", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={widest},{height}", action,
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=180, cwd=folder, env=os.environ | {"HOME": str(folder)}, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr, folder


def measure(frames: Sequence[Frame], dark: bool, script: str) -> tuple[list[Any], list[str]]:
    """What a script finds in each page, and what stands in the console; arguments as of `browse`."""
    printed, logged, folder = browse(frames, 900, dark, "--dump-dom", script)
    shutil.rmtree(folder)
    text = printed.split("<pre>")[1].split("</pre>")[0]
    assert text, logged
    return json.loads(html.unescape(text)), [line for line in logged.splitlines() if ":CONSOLE" in line]


def picture(page: Path, out: Path, width: int, height: int | None = None, dark: bool = False) -> None:
    """A page's picture, as PNG: its top, or without `height` all of it."""
    (whole,), _ = measure([(page, width)], dark, "page => page.documentElement.scrollHeight")
    height = min(height or whole, whole)
    _, _, folder = browse([(page, width)], height, dark, "--screenshot", "() => 0")
    with Image.open(folder / "screenshot.png") as image:
        image.convert("RGB").crop((0, 0, width, height)).save(out, optimize=True)
    shutil.rmtree(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="of its top (default: all of the page)")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args(argv)
    picture(args.page, args.out, args.width, args.height, args.dark)


if __name__ == "__main__":
    main()
