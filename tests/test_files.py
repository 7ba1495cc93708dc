"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmspec.files import replacing, write_text


def test_a_writer_that_is_stopped_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def stopped() -> None:
        with replacing(path) as scratch:
            scratch.write_text("ne")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}


def test_what_utf_8_cannot_hold_is_an_error_unless_it_is_to_be_replaced(tmp_path: Path):
    path = tmp_path / "page.html"
    write_text(path, "é \udcff", errors="replace")
    assert path.read_text(encoding="utf-8") == "é ?"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udcff")
    assert path.read_text(encoding="utf-8") == "é ?"
    assert list(tmp_path.iterdir()) == [path]
