"""The report in headless Chromium, wide and narrow, light and dark, in every state that it can be brought to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import report
from eval.report_dependence import load
from tests.browser import CHROMIUM, measure, picture
from tests.reports import run_of, sixteen, spoiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH to look at pages with"),
]

WIDTHS = (1280, 390)
MEASURE = (Path(__file__).parent / "measure_page.js").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three pages of one real run: as it is and with its dependence; of sixteen methods; with a failed gate."""
    folder = run_of(tmp_path_factory.mktemp("report"))
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    samples = json.loads((folder / "eval" / "samples.json").read_text())
    found = load(folder / "where", summary["settings"])
    made = {
        "whole": report.render(summary, samples, found),
        "sixteen": report.render(sixteen(summary), samples),
        "invalid": report.render(spoiled(summary), samples),
    }
    for name, page in made.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_cut_off_overlaps_or_is_hard_to_read(pages: dict[str, Path], dark: bool) -> None:
    frames = [(name, width) for name in pages for width in WIDTHS]
    found, console = measure([(pages[name], width) for name, width in frames], dark, MEASURE)
    for (name, width), view in zip(frames, found, strict=True):
        assert (view["width"], view["dark"]) == (width, dark)
        states = dict(view["states"])
        assert {"cell-0", "cell-1", "cell-2", "cell-3", "by-source"} <= set(states)
        assert ("by-dependence" in states) == (name == "whole")
        assert min(states.values()) > 300, "pieces of text were looked at"
        assert view["wrong"] == [], name
    assert console == []


SPOILED = """
<div style="position:absolute;top:0;left:80px">over</div><p style="width:2000px">wide</p><p style="color:#ccc">pale</p>
<img src="https://example.org/x.png"></main>
"""


def test_the_measuring_finds_what_is_wrong(pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "spoiled.html"
    page.write_text(
        pages["whole"].read_text().replace("</main>", SPOILED).replace("<main>", '<main style="padding:0">')
    )
    (view,), console = measure([(page, 1280)], False, MEASURE)
    said = "\n".join(view["wrong"])
    assert '"over" and ' in said or ' and "over" overlap' in said
    assert "the page scrolls sideways" in said
    assert "P. reaches out of the page: wide" in said
    assert "contrast 1.5" in said
    assert any("Content Security Policy" in line for line in console), "an image of the network is refused"


def test_a_picture_is_as_wide_as_asked(pages: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    for width, dark, ends in ((390, True, (0, 90)), (1280, False, (200, 256))):
        picture(pages["whole"], tmp_path / "page.png", width, 500, dark)
        with Image.open(tmp_path / "page.png") as image:
            assert image.size == (width, 500)
            corner = image.convert("L").getpixel((2, 490))
            assert ends[0] <= corner < ends[1]
