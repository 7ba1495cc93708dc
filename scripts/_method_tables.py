"""All methods side by side: from the two evaluations and what was tuned to rows, tables and plots.

Invariant: a figure is copied from a `summary.json`; nothing that is written names a place of this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from eval.card import NAMES
from eval.head_tables import as_csv, depth_plot, markdown, row, speedup_plot
from eval.lineup import without_places
from eval.steps import hardware_line, options, read_json
from eval.summary import clean
from eval.tune_tree import parse_tree
from mmspec import checkpoint

VISKIP, STATIC = "viskip", "eagle"
HEADS = {**NAMES, "eagle": "EAGLE-2 (dynamic tree)", VISKIP: "ViSkip's head alone"}
STEERED = {f"{STATIC}_static": "EAGLE-1 (static tree)", VISKIP: "ViSkip"}
FREE = {"sam": "SAM decoding", "lookahead": "Lookahead (trie)", "recycling": "Token Recycling", "pld": "PLD"}
"""Methods without training that MMSpec has, and what they are called in the tables."""
ORDER = (STEERED["eagle_static"], *list(HEADS.values())[:-1], *FREE.values(), HEADS[VISKIP], STEERED[VISKIP])
TABLES = ("matched", "tuned")
FACTS = ("budget",)


def folder_name(name: str) -> str:
    """Of a head: no method of another head can be called so."""
    return f"{name}_head" if name == VISKIP else name


def collect(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Rows of both tables, what was tried in tuning, and the claims of both evaluations."""
    out = Path(args.out)
    found = {table: read_json(out / table / "summary.json") for table in TABLES}
    labels = {folder_name(name): HEADS[name] for name in names}
    rows: dict[str, list[dict[str, Any]]] = {}
    for table, summary in found.items():
        rows[table] = []
        for method, how in summary["settings"]["methods"].items():
            if label := _label(how, labels):
                budget = _budget(out, table, method, how)
                rows[table].append(row(label, summary, method, {"method": method, "budget": budget}))
        rows[table].sort(key=lambda entry: ORDER.index(entry["head"]))
    tuning = {path.stem: without_places(read_json(path)) for path in sorted((out / "tuning").glob("*.json"))}
    return {
        "settings": options(args),
        "commit": checkpoint.git_commit(),
        "hardware": found["matched"]["hardware"],
        "valid": {table: summary["valid"] for table, summary in found.items()},
        "plain": {table: summary["methods"]["plain"]["overall"] for table, summary in found.items()},
        **rows,
        "claims": {table: summary["claims"]["faster_than_plain"] for table, summary in found.items()},
        "tuning": {name: {"best": one["best"], "tried": one["tried"]} for name, one in tuning.items()},
    }


def _label(how: Mapping[str, Any], labels: Mapping[str, str]) -> str | None:
    """What a method of an evaluation is called in the tables; None for plain decoding."""
    if "checkpoint" not in how:
        return FREE.get(how.get("drafter", ""))
    if how["policy"] == "learned":
        return STEERED[VISKIP]
    return STEERED[f"{STATIC}_static"] if "tree" in how else labels[how["checkpoint"]]


def _budget(out: Path, table: str, method: str, how: Mapping[str, Any]) -> str:
    """What it drafts, in words."""
    if "checkpoint" in how:
        return f"{how['budget']} nodes" if "tree" in how else f"{how['depth']},{how['width']},{how['budget']}"
    given = (yaml.safe_load((out / f"{table}.yaml").read_text(encoding="utf-8")) or {}).get(method, {})
    said = ", ".join(f"{k} {Path(v).stem if isinstance(v, str) else v}" for k, v in given.items()) or "defaults"
    return said if how["policy"] == "fixed" else f"{said}; nodes by cost"


def write(args: argparse.Namespace, found: Mapping[str, Any]) -> str:
    """Tables as JSON, CSV and Markdown, and plots; returns the paragraph for RESULTS.md."""
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(results / "methods.json", clean(found))
    titles = {
        "matched": f"Matched budget: {parse_tree(args.tree).budget} draft nodes for all, trees {args.tree}",
        "tuned": f"Tuned: each at what was fastest on {checkpoint.discreet(args.tune_data)}",
    }
    text = []
    for table, title in titles.items():
        (results / f"{table}.csv").write_text(as_csv(found[table], FACTS), encoding="utf-8")
        (results / f"{table}.svg").write_text(speedup_plot(title, found[table]), encoding="utf-8")
        (results / f"{table}_depth.svg").write_text(depth_plot(title, found[table]), encoding="utf-8")
        text.append(markdown(title, found[table], FACTS))
    (results / "tables.md").write_text("\n".join(text), encoding="utf-8")
    said = " ".join(map(checkpoint.discreet, args.said))
    return (
        f"## {date.today()} · All methods side by side on {checkpoint.discreet(args.data)}\n\n"
        f"`bash scripts/compare_methods.sh {said}`, commit {found['commit']}, {hardware_line(found['hardware'])}.\n\n"
        + "\n".join(text)
    )
