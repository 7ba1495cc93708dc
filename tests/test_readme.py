"""README and repository agree: every file is named once in its tree, in order, and every path it names exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(r"^ {4}(\S+)\s{2,}\S", re.MULTILINE)
FOLDERS = ("mmspec/assets/tiny_llava", "tests/golden")
"""Folders that are one entry."""


def tracked() -> set[str]:
    # New files count before they are committed, so that the README is mended in the same commit.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    names = set()
    for name in listed:
        if not (ROOT / name).exists():
            continue
        folder = next((f for f in FOLDERS if name.startswith(f + "/")), None)
        names.add(f"{folder}/" if folder else name)
    return {n for n in names if not n.startswith(".") and n not in ("LICENSE", "README.md")}


def test_every_file_has_its_line():
    text = (ROOT / "README.md").read_text().split("## Every file")[1]
    named = ENTRY.findall(text)
    assert named == sorted(set(named))
    assert set(named) == tracked()
