"""Who may import whom: the layers of design, enforced on the syntax tree of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYER_1 = {"types", "tree", "static_tree", "sampling", "nn", "losses", "cache", "files", "metrics", "records", "safety"}
LAYER_2 = {"targets", "heads", "drafters", "verify", "policy"}
ONLY_OUTSIDE = {"deepspeed", "wandb", "wandb_workspaces", "peft", "datasets"}
WITHIN_FUNCTIONS = {"dashboards": {"wandb", "wandb_workspaces"}}
"""What a member may import all the same, but not by being imported: train and eval both have a dashboard, and may not
import each other."""
FILES = sorted(p for folder in ("mmspec", "train", "eval", "scripts") for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path, within_functions: bool = True) -> set[str]:
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if within_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    """The member of mmspec that a file belongs to: `loop` of loop.py, `heads` of heads/eagle.py."""
    return path.relative_to(ROOT / "mmspec").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path: Path):
    names = imports(path)
    packages = {name.split(".")[0] for name in names}
    assert "scripts" not in packages or path.is_relative_to(ROOT / "scripts")
    if path.is_relative_to(ROOT / "train"):
        assert "eval" not in packages
        return
    if path.is_relative_to(ROOT / "eval"):
        assert "train" not in packages
        return
    if path.is_relative_to(ROOT / "scripts"):
        return
    late = WITHIN_FUNCTIONS.get(part(path), set())
    assert not packages & (ONLY_OUTSIDE - late | {"train", "eval"}), f"{path} imports {packages}"
    assert not {name.split(".")[0] for name in imports(path, within_functions=False)} & late
    mine, used = part(path), {name.split(".")[1] for name in names if name.startswith("mmspec.")}
    if "transformers" in packages:
        assert mine in {"targets", "checkpoint", "assets"}
    if mine in LAYER_1:
        assert used <= LAYER_1, f"{path} reaches up to {used - LAYER_1}"
    elif mine in LAYER_2:
        # `assets` is a leaf of paths; a package may use its own base, and what its files share in `_name.py`.
        assert used <= LAYER_1 | {mine, "assets"}, f"{path} reaches up to {used - LAYER_1}"
        members = {n.split(".")[2] for n in names if n.startswith(f"mmspec.{mine}.")}
        siblings = {m for m in members if m != "base" and not m.startswith("_")}
        assert path.name == "__init__.py" or not siblings, f"{path} imports its siblings {siblings}"
    elif mine == "loop":
        assert used <= LAYER_1 | {"verify"}, f"loop reaches up to {used}"


def test_nobody_waits_for_the_compiler_before_a_target_is_loaded():
    """`--help` and a wrong word: torch's compiler, which transformers' models import, takes as long as torch itself."""
    code = (
        "import sys, eval.mmspec, train.distill, train.labels, train.regenerate; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
