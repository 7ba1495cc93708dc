"""The guide of README, followed word for word: every command of it, in its order, on the embedded target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_eval import records_in, write_records
from tests.training import ROOT, environment

FIRST = "    RECIPE=recipes/viskip_tiny.yaml RUN=runs/viskip_tiny BENCHMARK=synth:testmini GPUS=2"
ENVIRONMENT = ". scripts/env.sh && mmspec_environment"


def commands() -> list[str]:
    """Lines of the guide's two lists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    guide = text.split("## From nothing to a published head")[1].split("### Look at the data")[0]
    return [line.strip() for line in guide.splitlines() if line.startswith("    ")]


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the same keys and little work."""
    recipe["data"] |= {"sources": [{"path": "synth:train", "limit": 24}], "max_new_tokens": 24, "answer_batch": 8}
    recipe["data"] |= {"max_degenerate_share": 1.0, "drop": ["empty"]}
    recipe["optim"] |= {"micro_batch": 2, "warmup": 1}
    recipe["policy"] |= {"rollouts": 8, "rollout_batch": 4, "steps": 4}
    recipe["run"] |= {"max_steps": 6, "eval_every": 3, "eval_prompts": 2, "eval_max_new_tokens": 8, "trackers": []}
    return recipe


def test_the_guide_begins_with_the_variables_that_its_commands_use():
    first, second, third, *rest = commands()
    assert f"    {first}".startswith(FIRST)
    assert third.startswith(ENVIRONMENT)
    text = "\n".join(rest)
    for name in ("$RECIPE", "$RUN", "$BENCHMARK", "$GPUS", "$DATA"):
        assert name in text
    assert second.startswith("DATA=")


@pytest.mark.slow
def test_every_command_of_the_guide_works(tmp_path: Path):
    """In an empty folder with links to the code; what differs is the recipe and benchmark of the first line."""
    for name in ("eval", "mmspec", "recipes", "scripts", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    recipe = small(yaml.safe_load((ROOT / "recipes" / "viskip_tiny.yaml").read_text(encoding="utf-8")))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "benchmark").mkdir()
    write_records(tmp_path / "benchmark", records_in(tmp_path / "benchmark", 3))
    (tmp_path / "data").mkdir()
    first, *rest = commands()
    assert f"    {first}".startswith(FIRST)
    lines = ["RECIPE=small.yaml RUN=runs/viskip_tiny BENCHMARK=benchmark GPUS=1"]
    lines += [line for line in rest if not line.startswith(("#", ENVIRONMENT))]
    lines = [line.replace("run.max_steps=100", "run.max_steps=3").replace("--limit 12", "--limit 2 ") for line in lines]
    script = "set -euxo pipefail\n" + "\n".join(lines) + "\n"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "looks" / "dependence.json").is_file()
