"""Dashboards: every panel has what it shows, nothing that is logged is left out, and W&B gets what the file says."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from eval import dashboard as evaluation
from eval import wandb_log
from eval.summary import OVERALL
from mmspec.dashboards import Dashboard, Panel
from tests.training import ROOT, distill, record, save_data, save_recipe, save_target
from train import dashboard as training

KEY = "a1b2c3d4" * 5
OLD = "View:1"
MODULES = [
    ("eval.dashboard", "evaluation"),
    pytest.param("train.dashboard", "training", marks=pytest.mark.slow),
]


def names(panel: Panel) -> list[Panel]:
    """Its metrics, each as a panel of its own."""
    return [Panel(panel.title, (name,)) for name in panel.metrics]


def check(board: Dashboard, logged: set[str]) -> None:
    """Each name and pattern of each panel is of something that was logged."""
    for panel in board.panels:
        for one in names(panel):
            assert any(one.shows(name) for name in logged), one.metrics


def test_a_star_stops_at_a_slash():
    panel = Panel("t", ("accept/tau/*", "time/*_s"))
    assert panel.shows("accept/tau/text vqa")
    assert panel.shows("time/head_s")
    assert not panel.shows("accept/tau")
    assert not panel.shows("accept/tau/a/b")
    assert not panel.shows("time/head_s/more")


@pytest.mark.slow
def test_training_logs_what_its_panels_show_and_nothing_else(tmp_path: Path):
    """A real run of head and controller, with all that is logged at times only: topics, a known peak, a vocabulary."""
    records = [record(n) | {"topic": "ab"[n % 2]} for n in range(24)]
    save_target(tmp_path / "target")
    data = save_data(tmp_path, records)
    recipe = save_recipe(tmp_path / "r.yaml", tmp_path / "target", data, tmp_path / "out", max_steps=2)
    more = ["head.kind=eagle3", "head.draft_vocab_size=20", "policy.kind=learned", "deepspeed.zero_stage=1"]
    done = distill(
        0, recipe, *more, "run.peak_tflops=0.25", "run.trackers=[]", "run.eval_prompts=4", "policy.rollouts=16"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "out" / "t" / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step", "wall_s"}
    check(training.BOARD, logged)
    forgotten = {name for name in logged if not any(panel.shows(name) for panel in training.BOARD.panels)}
    assert not forgotten


def test_an_evaluation_logs_what_its_panels_show():
    figures = {panel.metrics[0].split("/")[2] for panel in evaluation.BOARD.panels}
    figures |= {f"speedup_{end}" for end in ("lo", "hi")}
    found = dict.fromkeys(figures, 1.0)
    method = {OVERALL: found, "topics": {"text vqa": found}}
    cell = {"batch_size": 1, "temperature": 0.0, "valid": True, "methods": {"eagle": method}}
    [logged] = wandb_log.scalars({"settings": cell, "cells": [cell]})
    check(evaluation.BOARD, set(logged))
    assert {panel.x for panel in evaluation.BOARD.panels} <= set(logged)


# ---- where they go ----


class Service(ThreadingHTTPServer):
    """The part of W&B that dashboards need, over real HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.saved: list[dict[str, Any]] = []
        self.refuses = False


class Answers(BaseHTTPRequestHandler):
    """GraphQL."""

    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        asked = json.loads(body) if self.path == "/graphql" else {"query": ""}
        viewer = {"id": "u", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        data: dict[str, Any] = {"viewer": viewer}
        if "upsertView" in asked["query"]:
            self.server.saved.append(asked["variables"])
            data["upsertView"] = {"view": {"id": OLD, "name": asked["variables"]["name"]}, "inserted": True}
        elif "allViews" in asked["query"]:
            old = self.server.saved[-1]
            node = {"id": OLD, "displayName": old["displayName"], "spec": old["spec"]}
            data["project"] = {"allViews": {"edges": [{"node": node}]}}
        self.send_response(403 if self.server.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(tmp_path: Path, service: Service | None, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, logged in to the service, or to none."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    online = {"WANDB_BASE_URL": f"http://127.0.0.1:{service.server_port}", "WANDB_API_KEY": KEY} if service else {}
    env = {**keep, **online, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_ERROR_REPORTING": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )


def sections(spec: dict[str, Any]) -> list[Any]:
    found: list[Any] = spec["section"]["panelBankConfig"]["sections"]
    return [(s["name"], [(p["viewType"], p["config"]) for p in s["panels"]]) for s in found]


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_without_a_login_it_is_a_file_that_is_always_the_same(tmp_path: Path, module: str, name: str):
    file = tmp_path / "runs" / "dashboards" / f"{name}.json"
    texts = []
    for _ in range(2):
        done = run(tmp_path, None, module)
        assert done.returncode == 0, done.stderr
        assert "not logged in" in done.stdout
        texts.append(file.read_text())
    assert texts[0] == texts[1]
    board = training.BOARD if name == "training" else evaluation.BOARD
    shown = sections(json.loads(texts[0])["spec"])
    assert [title for title, _ in shown] == [title for title, _ in board.sections]
    configs = [config for _, panels in shown for _, config in panels]
    assert [config["chartTitle"] for config in configs] == [panel.title for panel in board.panels]
    for config, panel in zip(configs, board.panels):
        assert config.get("metricRegex", panel.pattern) == panel.pattern
        assert config["metrics"] == ([] if "metricRegex" in config else list(panel.metrics))


def test_with_a_login_it_is_applied_and_brought_up_to_date(tmp_path: Path, service: Service):
    """Over real HTTP; the key is in no output and no file."""
    out = tmp_path / "view.json"
    done = run(tmp_path, service, "eval.dashboard", "--project", "p", "--out", str(out))
    assert done.returncode == 0, done.stderr
    [first] = service.saved
    assert (first["entityName"], first["projectName"], first["displayName"]) == ("me", "p", "MMSpec evaluation")
    assert sections(json.loads(first["spec"])) == sections(json.loads(out.read_text())["spec"])
    url = done.stdout.split("applied: ")[1].strip()
    again = run(tmp_path, service, "eval.dashboard", "--project", "p", "--replace", url)
    assert again.returncode == 0, again.stderr
    assert (service.saved[1]["id"], service.saved[1]["name"]) == (OLD, first["name"])
    assert sections(json.loads(service.saved[1]["spec"])) == sections(json.loads(first["spec"]))
    assert KEY not in out.read_text() + done.stdout + done.stderr + again.stdout + again.stderr


@pytest.mark.slow
def test_what_is_wrong_is_one_line(tmp_path: Path, service: Service):
    done = run(tmp_path, None, "eval.dashboard", "--replace", "http://x/e/p?nw=a")
    assert done.returncode == 2
    assert "--replace needs a login" in done.stderr
    service.refuses = True
    done = run(tmp_path, service, "eval.dashboard")
    assert done.returncode == 2
    assert "eval.dashboard: error: W&B did not take the dashboard" in done.stderr
    assert KEY not in done.stdout + done.stderr
