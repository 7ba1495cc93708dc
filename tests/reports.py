"""Runs for the tests of the report: a real one, and the same with more methods or with a failed gate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from eval import dependence, mmspec
from mmspec.checkpoint import DraftTree
from mmspec.targets import load_target
from tests import tiny


def run_of(folder: Path) -> Path:
    """A sweep of an untrained head on the embedded target in `eval`, and its dependence in `where`."""
    tiny.run_folder(folder, load_target("tiny_llava"), DraftTree(3, 2, 4))
    given = ["--ckpt", str(folder), "--limit", "6", "--max-new-tokens", "5"]
    sweep = ["--method", "pld", "recycling", "--method-budget", "fixed", "--batch-size", "1", "2"]
    sweep += ["--temperature", "0", "1"]
    assert mmspec.main([*given, *sweep]) == 0
    assert dependence.main([*given, "--out", str(folder / "where")]) == 0
    return folder


def sixteen(summary: dict[str, Any]) -> dict[str, Any]:
    """The run as one of sixteen methods beside plain decoding, some with long names: figures of its own ones again."""
    whole = copy.deepcopy(summary)
    for cell in whole["cells"]:
        own = [name for name in cell["methods"] if name != "plain"]
        for place in range(16 - len(own)):
            like, name = own[place % len(own)], f"method_{place}" + "_with_a_long_name" * (place % 3 == 0)
            cell["methods"][name] = copy.deepcopy(cell["methods"][like])
            claim = next(claim for claim in cell["claims"]["faster_than_plain"] if claim["method"] == like)
            cell["claims"]["faster_than_plain"].append(claim | {"method": name})
    whole["methods"] = whole["cells"][0]["methods"]
    return whole


def spoiled(summary: dict[str, Any]) -> dict[str, Any]:
    """The run, had one answer of its head differed from plain decoding's at batch size 2."""
    whole = copy.deepcopy(summary)
    cell = next(cell for cell in whole["cells"] if (cell["batch_size"], cell["temperature"]) == (2, 0))
    row = cell["methods"]["viskip"]["overall"]
    row |= {"diverged": 1, "exact_match": 1 - 1 / row["n_requests"]}
    whole["valid"] = cell["valid"] = False
    return whole
