"""The report's parts, and a real run's page as text; how it looks is in `test_report_browser`."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval import report
from eval.report_charts import N_FOCUS, looks
from eval.report_dependence import Dependence, joined
from eval.report_svg import CHARACTER, LINE, Mark, label_places, log_ticks, radar, scatter
from eval.report_views import time_split, verdict
from tests.reports import run_of, sixteen, spoiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of an untrained head on the embedded target, and its dependence in a folder of another name."""
    return run_of(tmp_path_factory.mktemp("report"))


def page_of(folder: Path, *words: str) -> str:
    assert report.main([str(folder / "eval"), *words]) == 0
    return (folder / "eval" / "report.html").read_text()


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "summary.json").read_text())
    return found


class Reader(HTMLParser):
    """Notes what a browser would fetch or run, elements left open, ids, and what refers to them."""

    EMPTY = frozenset(("meta", "input", "img", "br"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.untitled = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        given = dict(attrs)
        self.fetched += [given[key] or "" for key in ("src", "href", "srcset", "action", "data") if key in given]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "object", "embed", "base") else []
        self.ids += [given["id"] or ""] if "id" in given else []
        self.labels += [given["for"] or ""] if tag == "label" else []
        self.untitled += tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def test_the_page_is_whole_and_fetches_nothing(folder: Path) -> None:
    for words in ((), ("--dependence", str(folder / "where"))):
        page = page_of(folder, *words)
        reader = Reader(page)
        assert reader.open == []
        assert len(reader.ids) == len(set(reader.ids))
        assert set(reader.labels) <= set(reader.ids)
        assert reader.untitled == 0
        assert reader.fetched
        assert all(source.startswith("data:image/jpeg;base64,") for source in reader.fetched)
        assert not re.search(r"url\(|@import|https?:|//\w+\.\w", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", page))
        assert str(folder) not in page


def test_every_cell_of_a_sweep_can_be_reached_and_has_its_own_figures(folder: Path) -> None:
    page, summary = page_of(folder), summary_of(folder)
    assert [(cell["batch_size"], cell["temperature"]) for cell in summary["cells"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    panels = re.split(r'<div class="panel panel-\d">', page)[1:]
    assert len(panels) == len(summary["cells"])
    for place, (panel, cell) in enumerate(zip(panels, summary["cells"])):
        assert f'id="cell-{place}"' in page
        assert f'for="cell-{place}"' in page
        assert f"#cell-{place}:checked ~ .panel-{place} {{ display: block; }}" in page
        for name, method in cell["methods"].items():
            if name != "plain":
                row = method["overall"]
                assert f"{row['speedup']:.2f}× [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}]" in panel
            assert f"{method['overall']['latency_p50_s']:.3f} s" in panel
    assert page.count('class="rule"') > 2, "break-even is drawn"
    assert all(heading in page for heading in ("Latency against throughput", "Speedup against batch size"))
    assert all(f"<dt>{name}</dt>" in page for name in (*summary["definitions"], "top_p", "pixels", "history"))


def test_a_run_without_dependence_says_how_to_measure_it_and_with_it_colours_its_answers(folder: Path) -> None:
    page = page_of(folder)
    assert "python -m eval.dependence --ckpt RUN --data synth:testmini --out RUN/eval/dependence" in page
    assert 'id="by-dependence"' not in page
    page = page_of(folder, "--dependence", str(folder / "where"))
    assert "Not measured for this run" not in page
    assert 'id="by-dependence"' in page
    tokens = [json.loads(line) for line in (folder / "where" / "tokens.jsonl").read_text().splitlines()]
    samples = json.loads((folder / "eval" / "samples.json").read_text())
    for sample in samples:
        measured = next(line for line in tokens if (line["id"], line["turn"]) == (sample["id"], sample["turn"]))
        assert measured["tokens"] == [token["id"] for token in sample["tokens"]]
        assert len(measured["kl"]) == len(sample["tokens"]) - 1
    assert len(set(re.findall(r'class="t t-\w+ (k\d)"', page))) == 5
    # What lies beside the report is found there.
    (folder / "where").rename(folder / "eval" / "dependence")
    beside = page_of(folder)
    (folder / "eval" / "dependence").rename(folder / "where")
    assert beside == page


def test_dependence_of_something_else_is_refused_and_beside_the_run_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((folder / "where" / "dependence.json").read_text())
    other["settings"]["fingerprint"] = "another"
    beside = folder / "eval" / "dependence"
    beside.mkdir()
    (beside / "dependence.json").write_text(json.dumps(other))
    (beside / "tokens.jsonl").write_text((folder / "where" / "tokens.jsonl").read_text())
    try:
        assert "dependence/ is of another fingerprint (another" in page_of(folder)
        assert report.main([str(folder / "eval"), "--dependence", str(beside)]) == 2
        (beside / "tokens.jsonl").write_text('{"id": "x", "kl": []}\n')
        assert "measure it again" in page_of(folder)
    finally:
        for path in beside.iterdir():
            path.unlink()
        beside.rmdir()
    assert report.main([str(folder / "eval"), "--dependence", str(tmp_path)]) == 2
    assert report.main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "is of another fingerprint" in errors[0]
    assert "holds no dependence.json" in errors[1]
    assert "has no summary.json" in errors[2]


def test_only_what_is_token_for_token_the_measured_answer_has_a_dependence() -> None:
    found = Dependence({}, {("r", 1): ([5, 6, 7, 8], [0.0, 0.3, 9.0])}, [0.1, 0.2, 0.4, 0.8])

    def levels(*ids: int, turn: int = 1) -> list[int | None]:
        return found.levels({"id": "r", "turn": turn, "tokens": [{"id": n} for n in ids]})

    assert levels(5, 6, 7, 8) == [None, 0, 2, 4], "the first token nobody drafts"
    assert levels(5, 6, 9, 8) == [None, 0, None, None]
    assert levels(5, 6, 7, 8, 9) == [None, 0, 2, 4, None]
    assert levels(5, 6) == [None, 0]
    assert levels(4, 6) == levels(5, 6, turn=2) == [None, None]


def test_pieces_are_cut_where_source_or_dependence_change() -> None:
    tokens = [{"text": text, "source": source} for text, source in (("a", "draft"), ("", "draft"), ("b", "bonus"))]
    cut = joined({"tokens": tokens}, [1, 2, 2])
    assert cut == [{"text": "a", "source": "draft", "level": 1}, {"text": "b", "source": "bonus", "level": 2}]


def test_an_invalid_run_cannot_be_mistaken(folder: Path) -> None:
    whole = summary_of(folder)
    good = report.render(whole, [])
    bad = report.render(spoiled(whole), [])
    for words in (
        "<title>INVALID: ",
        'role="alert"',
        "Invalid: answers differ",
        "✕ invalid",
        "1 diverged",
        'class="lead void"',
    ):
        assert words in bad
        assert words not in good
    assert "<b>Valid.</b>" in good
    assert "<b>Valid.</b>" not in bad
    assert "At batch 2, greedy: viskip." in bad
    assert bad.count("✕ invalid") == 1, "the cell that is"


def test_contention_is_named_with_its_cells(folder: Path) -> None:
    whole = summary_of(folder)
    for place, cell in enumerate(whole["cells"]):
        cell["contention"] = {"other_cores": 1.25 * place, "unreliable": place > 1}
    page = report.render(whole, [])
    assert "Other processes used 3.8 cores during this run, at batch 2, greedy; batch 2, T = 1." in page


def test_sixteen_methods_keep_six_in_colour_and_the_others_in_every_table(folder: Path) -> None:
    whole = sixteen(summary_of(folder))
    assert len(whole["methods"]) == 17
    seen = looks(whole["methods"], whole["primary"])
    coloured = [name for name, look in seen.items() if look.focus and name != "plain"]
    assert len(coloured) == N_FOCUS
    assert coloured[0] == whole["primary"]
    assert len({(look.css, look.shape) for look in seen.values() if look.focus}) == N_FOCUS + 1
    page = report.render(whole, [])
    assert page.count("10 others, see the tables") >= 4
    for name in whole["methods"]:
        assert page.count(f"<td>{name}</td>") >= len(whole["cells"])


def test_the_time_of_a_step_adds_up() -> None:
    row = {"mat": 4.0, "n_tokens": 102, "n_requests": 2, "speedup": 2.0}
    row["seconds"] = {"draft_s": 0.1, "verify_s": 0.3, "commit_s": 0.0, "control_s": 0.1}
    plain = row | {"mat": 1.0, "speedup": 1.0, "seconds": {"draft_s": 0.0, "verify_s": 1.0}}
    split = time_split({"plain": {"overall": plain}, "m": {"overall": row}})
    assert [line["method"] for line in split] == ["plain", "m"]
    assert split[1]["step"] == pytest.approx(1000 * 0.5 / 25), "100 tokens in 25 steps"
    assert split[1]["token"] == pytest.approx(5.0)
    assert split[0]["step"] == split[0]["token"] == pytest.approx(10.0)
    assert [phase["css"] for phase in split[1]["phases"]] == ["draft_s", "verify_s", "control_s"]
    assert sum(phase["width"] for phase in split[1]["phases"]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("exact", "ties", "diverged", "words"),
    [(1.0, 0, 0, "identical"), (1.0, 2, 0, "2 ties"), (0.5, 0, 3, "3 diverged"), (None, None, None, "in distribution")],
)
def test_the_verdict_of_a_method(exact: float | None, ties: int | None, diverged: int | None, words: str) -> None:
    assert verdict({"exact_match": exact, "ties": ties, "diverged": diverged})[1] == words


def test_labels_of_a_chart_never_meet() -> None:
    rng = random.Random(0)
    frame = (0.0, 0.0, 400.0, 300.0)
    for n in (1, 20, 60):
        points = [(rng.uniform(0, 400), rng.uniform(0, 300), "m" * rng.randint(1, 12)) for _ in range(n)]
        places = label_places(points, frame)
        boxes = [
            (x, y - LINE + 3, x + CHARACTER * len(points[k][2]), y + 3)
            for k, place in enumerate(places)
            if place is not None
            for x, y in [place]
        ]
        assert boxes
        for k, one in enumerate(boxes):
            assert 0 <= one[0] <= one[2] <= 400
            assert 0 <= one[1] <= one[3] <= 300
            for other in boxes[:k]:
                assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_logarithmic_ticks_lie_between_their_ends() -> None:
    assert log_ticks(0.03, 5) == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    rng = random.Random(1)
    for _ in range(200):
        lo = 10 ** rng.uniform(-4, 4)
        hi = lo * 1.44 * 10 ** rng.uniform(0, 3)
        steps = log_ticks(lo, hi)
        assert steps == sorted(set(steps))
        assert 1 <= len(steps) <= 12
        assert lo <= steps[0] * (1 + 1e-6)
        assert steps[-1] <= hi * (1 + 1e-6)


def test_charts_escape_names() -> None:
    assert scatter([], "x", "y") == ""
    svg = scatter([Mark("<i>", "<b>", "m0", 0, 1.0, 2.0)], "x <", "y &")
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;b&gt;" in svg
    drawn = radar([], ["<u>", "b", "c"], [0, 1], "a < b")
    assert "<u>" not in drawn
    assert "a &lt; b" in drawn
