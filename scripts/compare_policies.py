"""Trains controllers, tunes and scores all policies of several drafters, and writes the table, a page and plots.

    bash scripts/compare_policies.sh --heads eagle=runs/eagle_tiny vispec=runs/vispec_tiny
    bash scripts/compare_policies.sh --heads eagle=runs/eagle_tiny --methods --batches 1 --temperatures 0 --data-limit 6

Drafters: the heads of --heads, an untrained one made like the first of them (scored on --data alone), and the
training-free --methods. For each: its controller and those that read less (recipes/viskip_only_<name>_tiny.yaml, one
rollout for all three), and the costs of this machine; then for each batch size and temperature the tuning on synth:val,
all policies on --data, and those of --long-policies on --long-data. All policies of a cell decode interleaved with one
plain run. `--shard I/N` does every N-th drafter's steps alone, so that cores can share the work: one call for each,
with --answers, then one without.

What costs time, and where it is spared: tuning decodes --tune-limit records, up to --tune-tokens tokens each, in
batches of all topics; what is far behind on a quarter of them is not timed on the others; policies that make the same
plans are decoded once (`python -m eval.policies --help`). Most of all time is --long-data, and half of the rest is
batch 1. Times of a busy machine are marked unreliable, and so are the costs that policies then decide by.

Every step is a command, printed before it runs and skipped when it is done; a step is done again when its command or a
step before it has changed. Results: runs/policies/table.json, and --results (the same, a page, plots); --so-far makes
them of the cells that are there, and says which are not; with --keep those that only --results has stay in it, as they
were made on another machine. Each cell names its commit and its machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from eval.options import DTYPES
from eval.policy_page import render
from eval.policy_runs import BASELINES, LEARNED, ORACLE
from eval.policy_tables import (
    Key,
    break_even,
    headroom_of,
    judge,
    key_of,
    markdown,
    means,
    merged,
    plot,
    rows_of,
    sentences,
    skip_quality,
)
from eval.steps import ROOT, Ledger, Step, hardware_line, module, options, perform
from eval.summary import clean
from eval.tasks import data_name
from eval.tune_tree import parse_tree
from mmspec import checkpoint
from mmspec.arguments import Parser, at_least, command
from mmspec.files import write_text
from mmspec.methods import method_names
from mmspec.targets import load_target
from mmspec.types import InputError

UNTRAINED = "untrained"
DIGITS = 5
"""Significant digits of the table."""
LONG = ("P1", "P2", "marginal", "P7", "P8")
BLIND = ["policy.controller.n_mass=0", "policy.controller.counterfactual=none"]
CONTROLLERS: dict[str, list[str]] = {
    "full": [],
    "scalars": ["policy.controller.reads=scalars", *BLIND],
    "blind": BLIND,
}
"""What the controllers of P7 and P8, P5 and P6 differ in."""
HEAD_FILES = ("head.json", "head.safetensors", "tree.json")
OPTIONS = {"full": "--controller", "scalars": "--scalars-controller", "blind": "--blind-controller"}
QUESTIONED = ("P7", "P8")
"""Learned policies that must not be slowed by a head that is always wrong."""


@dataclass(frozen=True)
class Entrant:
    """One drafter.

    Args:
        name: in the table.
        words: that name it to eval.policies.
        recipe: of its controller.
        overrides: of the recipe.
        files: of its head, which is another drafter once it was trained anew.
    """

    name: str
    words: tuple[str, ...]
    recipe: Path
    overrides: tuple[str, ...]
    files: tuple[Path, ...] = ()


def entrants(args: argparse.Namespace) -> list[Entrant]:
    """The drafters, heads first.

    Raises:
        InputError: a head has no folder, or a drafter no recipe.
    """
    heads = dict(pair.split("=", 1) for pair in args.heads)
    if heads and not args.no_untrained:
        heads[UNTRAINED] = str(Path(args.out) / UNTRAINED)
    found = []
    for name, folder in heads.items():
        if name != UNTRAINED and not (Path(folder) / "head.json").is_file():
            raise InputError(f"--heads {name}={folder} holds no head; train one, or say where it is")
        kind = checkpoint.load(heads[first(args)] if name == UNTRAINED else folder).kind
        # The untrained one is made by a step, on which the others depend.
        own = () if name == UNTRAINED else (Path(folder) / file for file in HEAD_FILES)
        files = tuple(path for path in own if path.is_file())
        found.append(Entrant(name, ("--ckpt", folder), _recipe(kind, args), (f"head.init_from={folder}",), files))
    for name in args.methods:
        found.append(Entrant(name, ("--method", name), _recipe(name, args), ()))
    return found


def first(args: argparse.Namespace) -> str:
    """Name of the head that the untrained one is made like."""
    return str(args.heads[0].split("=", 1)[0])


def _recipe(name: str, args: argparse.Namespace) -> Path:
    path = ROOT / "recipes" / f"viskip_only_{name}_{args.suffix}.yaml"
    if not path.is_file():
        raise InputError(f"there is no {path.relative_to(ROOT)} to train a controller of {name} by; write one")
    return path


def plan(args: argparse.Namespace, drafters: Sequence[Entrant]) -> list[Step]:
    """All steps, in order."""
    steps: list[Step] = []
    for entrant in drafters:
        before: tuple[str, ...] = ()
        if entrant.name == UNTRAINED:
            like = dict(pair.split("=", 1) for pair in args.heads)[first(args)]
            made = Path(args.out) / UNTRAINED
            words = module("scripts.compare_policies", "--make-untrained", like, "--out", args.out)
            steps.append(Step(UNTRAINED, words, made / "tree.json"))
            before = (UNTRAINED,)
        steps += _controllers(args, entrant, before)
        steps.append(_costs(args, entrant, before))
        for batch in args.batches:
            for temperature in args.temperatures:
                steps += _cell(args, entrant, batch, temperature)
    return steps


def _controllers(args: argparse.Namespace, entrant: Entrant, before: tuple[str, ...]) -> list[Step]:
    """The whole controller, and on its rollout those that read less."""
    out, steps = Path(args.out) / "controllers", []
    tree = parse_tree(args.offer)
    draft = [f"policy.depth={tree.depth}", f"policy.width={tree.width}", f"policy.budget={tree.budget}"]
    shared = [f"run.out={out}", f"run.seed={args.seed}", "run.trackers=[]", f"policy.controller.depth={tree.depth}"]
    answers = [f"data.answers_dir={args.answers or Path(args.out) / 'answers'}"]
    for name, own in _readers(entrant).items():
        folder = out / f"{entrant.name}_{name}"
        rounds = [] if name == "full" else [f"policy.rollouts_from={out / f'{entrant.name}_full'}"]
        after = before if name == "full" else (f"controller {entrant.name} full",)
        words = (sys.executable, str(ROOT / "train/distill.py"), str(entrant.recipe), f"run.name={folder.name}")
        said = (*words, *shared, *answers, *draft, *entrant.overrides, *rounds, *own, *args.set)
        makes = folder / "viskip.safetensors"
        again, reads = ("run.resume=true",), (entrant.recipe, *entrant.files)
        steps.append(Step(f"controller {entrant.name} {name}", said, makes, after, None, again, reads))
    return steps


def _costs(args: argparse.Namespace, entrant: Entrant, before: tuple[str, ...]) -> Step:
    folder = Path(args.out) / "costs" / entrant.name
    words = (sys.executable, "-m", "scripts.measure_costs", *entrant.words, "--offer", args.offer)
    more = ("--max-batch", str(max(args.batches)), "--out", str(folder), "--dtype", args.dtype)
    return Step(f"costs {entrant.name}", (*words, *more), folder, before, reads=entrant.files, owns=folder)


def _cell(args: argparse.Namespace, entrant: Entrant, batch: int, temperature: float) -> list[Step]:
    """Tuning and both scores of a drafter at one batch size and temperature."""
    name = f"{entrant.name} batch {batch} T {temperature:g}"
    folder = Path(args.out) / "cells" / f"{entrant.name}_b{batch}_t{temperature:g}"
    trained = {k: str(Path(args.out) / "controllers" / f"{entrant.name}_{k}") for k in _readers(entrant)}
    base = [*entrant.words, "--offer", args.offer, "--costs", str(Path(args.out) / "costs" / entrant.name)]
    base += ["--batch-size", str(batch), "--temperature", f"{temperature:g}", "--seed", str(args.seed)]
    base += ["--dtype", args.dtype]
    read = [word for k, folder in trained.items() for word in (OPTIONS[k], folder)]
    tuned = folder / "tuned.json"
    how = ["--limit", str(args.tune_limit), "--max-new-tokens", str(min(args.tune_tokens, args.max_new_tokens))]
    words = module("eval.policies", *base, "--tune", *how, "--out", str(tuned))
    steps = [Step(f"tune {name}", words, tuned, (f"costs {entrant.name}",))]
    after = (f"tune {name}", *(f"controller {entrant.name} {k}" for k in trained))
    limit = ["--limit", str(args.data_limit)] if args.data_limit else []
    every = [*BASELINES, *QUESTIONED] if entrant.name == UNTRAINED else [*BASELINES, *LEARNED, ORACLE]
    whose = {"short": every, "long": args.long_policies}
    for part, data in _parts(args, entrant).items():
        makes = folder / f"{part}.json"
        said = [*base, *read, "--max-new-tokens", str(args.max_new_tokens), "--tuned", str(tuned)]
        said += ["--data", data, *limit, "--policies", *whose[part]]
        steps.append(Step(f"score {name} {part}", module("eval.policies", *said, "--out", str(makes)), makes, after))
    return steps


def _readers(entrant: Entrant) -> dict[str, list[str]]:
    """Its controllers: nobody asks of the untrained head what reading less is worth."""
    return {"full": CONTROLLERS["full"]} if entrant.name == UNTRAINED else CONTROLLERS


def _parts(args: argparse.Namespace, entrant: Entrant) -> dict[str, str]:
    """What a drafter is scored on: the untrained one, about which there is one question, on the short data alone."""
    short = {"short": str(args.data)}
    return {**short, "long": args.long_data} if args.long_data and entrant.name != UNTRAINED else short


def make_untrained(like: Path, folder: Path) -> None:
    """A run folder with a head of the kind and shape of another, untrained."""
    loaded = checkpoint.load(like)
    target = load_target(loaded.target.name, "float32", "cpu")
    torch.manual_seed(0)
    head = checkpoint.build_head(loaded.kind, loaded.config)
    checkpoint.save_head(folder, head.state_dict(), loaded.config, target)
    checkpoint.save_tree(folder, loaded.tree)


def collect(args: argparse.Namespace, drafters: Sequence[Entrant]) -> dict[str, Any]:
    """The table: rows, headroom, what does not hold, and what else the cells say.

    Raises:
        InputError: a cell is missing, and not only those so far are asked for; there is none; or a cell that is to be
            kept was made with another offer, length or dtype.
    """
    files: list[dict[str, Any]] = []
    missing: dict[Key, Path] = {}
    for entrant in drafters:
        for batch in args.batches:
            for temperature in args.temperatures:
                folder = Path(args.out) / "cells" / f"{entrant.name}_b{batch}_t{temperature:g}"
                for part, data in _parts(args, entrant).items():
                    path = folder / f"{part}.json"
                    if not path.is_file():
                        missing[entrant.name, batch, temperature, data] = path
                        continue
                    found = json.loads(path.read_text(encoding="utf-8"))
                    found["settings"]["drafter"] = entrant.name
                    files.append(found)
    facts = ("commit", "hardware", "settings", "best", "control", "calibration", "against", "skips")
    for found in files:
        found["skips"] = {k: skip_quality(v) for k, v in found.pop("outcomes", {}).items()}
    table: dict[str, Any] = {
        "settings": _settings(args), "commit": checkpoint.git_commit(),
        "rows": [row for found in files for row in rows_of(found)],
        "headroom": [row for found in files for row in headroom_of(found)],
        "promises": [judge(found) for found in files],
        "cells": [{key: found.get(key) for key in facts} for found in files],
        "costs": {entrant.name: _costs_of(args, entrant) for entrant in drafters},
        "controllers": {entrant.name: _held_out(args, entrant) for entrant in drafters},
    }  # fmt: skip
    if args.keep:
        table = merged(table, _kept(args))
    for cell in table["cells"]:
        missing.pop(key_of(cell["settings"]), None)
    if missing and not (args.so_far and table["cells"]):
        first_missing = next(iter(missing.values()))
        raise InputError(f"{first_missing} is missing: run the shard that makes it, then this command again")
    table["missing"] = [f"{path.parent.name}/{path.stem}" for path in missing.values()]
    return {**table, "means": means(table["rows"]), "break_even": break_even(table["rows"])}


def _kept(args: argparse.Namespace) -> dict[str, Any]:
    """The table that --results has already."""
    path = Path(args.results) / "policies.json"
    if not path.is_file():
        raise InputError(f"--keep: there is no {path} whose cells could be kept")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for cell in table["cells"]:
        for name in ("offer", "max_new_tokens", "dtype"):
            if cell["settings"][name] != getattr(args, name):
                said = f"--{name.replace('_', '-')} {cell['settings'][name]}"
                raise InputError(
                    f"--keep: {path} has cells of {said}, not {getattr(args, name)}; give another --results"
                )
    return table


def _held_out(args: argparse.Namespace, entrant: Entrant) -> dict[str, dict[str, float]]:
    """The last held-out figures of each controller: what reading more was worth (`val_survival_nll`, nats a round)."""
    found = {}
    for name in _readers(entrant):
        path = Path(args.out) / "controllers" / f"{entrant.name}_{name}" / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        said = [entry for entry in map(json.loads, lines) if "viskip/val_survival_nll" in entry]
        found[name] = {key: value for key, value in said[-1].items() if key.startswith("viskip/val_")} if said else {}
    return found


def _costs_of(args: argparse.Namespace, entrant: Entrant) -> list[Any]:
    paths = sorted((Path(args.out) / "costs" / entrant.name).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options, without places of this machine."""
    return options(args, ("make_untrained",))


def in_lines(table: Mapping[str, Any]) -> str:
    """The table as JSON, an entry of a list a line: small, and a changed row is a changed line."""

    def said(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    def entry(value: Any) -> str:
        return "[\n" + ",\n".join(map(said, value)) + "\n]" if isinstance(value, list) else said(value)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {entry(value)}" for key, value in table.items()) + "\n}\n"


def write(args: argparse.Namespace, table: Mapping[str, Any]) -> str:
    """Table, page and plots; returns the paragraph for RESULTS.md."""
    results = Path(args.results)
    (results / "policies").mkdir(parents=True, exist_ok=True)
    table = clean(table, DIGITS)
    for path in (Path(args.out) / "table.json", results / "policies.json"):
        write_text(path, in_lines(table))
    data = data_name(args.data)
    for drafter, temperature in dict.fromkeys((row["drafter"], row["temperature"]) for row in table["rows"]):
        how = (drafter, temperature, data)
        rows = [row for row in table["rows"] if (row["drafter"], row["temperature"], row["data"]) == how]
        if len({row["batch"] for row in rows}) > 1:
            drawn = plot(f"{drafter}, T {temperature:g}, {data}", rows)
            write_text(results / "policies" / f"{drafter}_t{temperature:g}.svg", drawn)
    write_text(results / "policies" / "index.html", render(table))
    averages = "\n".join(
        f"- {row['drafter']}, {row['data']}, {row['policy']}: {row['over_plain']:.3f} of plain decoding, "
        f"{row['over_P1']:.3f} of P1 (geometric means of {row['n_cells']} cells)"
        for row in table["means"]
    )
    machines = "; ".join(dict.fromkeys(hardware_line(cell["hardware"]) for cell in table["cells"]))
    missed = "\n".join(f"- {line}" for line in sentences(table["promises"])) or "Everything that was promised holds."
    missed += f"\n\nNot scored yet: {', '.join(table['missing'])}." if table["missing"] else ""
    said = " ".join(map(checkpoint.discreet, args.said))
    scored_at = ", ".join(dict.fromkeys(str(cell["commit"]) for cell in table["cells"]))
    return (
        f"## {date.today()} · Policies side by side\n\n`bash scripts/compare_policies.sh {said}`, collected at commit "
        f"{table['commit']}, scored at {scored_at}, {machines}.\n\n{markdown(table['rows'])}\n{averages}\n\n{missed}\n"
    )


@command("compare_policies", interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    said = list(sys.argv[1:] if argv is None else argv)
    args = _parse(said)
    if args.make_untrained:
        make_untrained(Path(args.make_untrained), Path(args.out) / UNTRAINED)
        return
    drafters = entrants(args)
    number, n_shards = args.shard
    mine = [] if args.so_far else drafters[number - 1 :: n_shards]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    ledger = Ledger(Path(args.out))
    for step in plan(args, mine):
        perform(step, ledger)
    if args.so_far or n_shards == 1:
        print(write(args, collect(args, drafters)))


def _parse(said: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/compare_policies.sh", description=__doc__)
    add = parser.add_argument
    heads = ["eagle=runs/eagle_tiny", "vispec=runs/vispec_tiny"]
    add("--heads", nargs="*", default=heads, metavar="NAME=DIR", help=f"trained heads (default: {' '.join(heads)})")
    add("--methods", nargs="*", default=["sam"], metavar="NAME", help="training-free methods (default: sam)")
    add("--no-untrained", action="store_true", help="without an untrained head, which no policy may be slowed by")
    add("--suffix", default="tiny", metavar="TARGET", help="of the recipes (default: tiny)")
    add("--offer", default="12,2,16", metavar="D,W,N", help="the largest draft (default: %(default)s)")
    add("--batches", nargs="+", type=int, default=[1, 4, 8, 16], metavar="N", help="batch sizes (default: 1 4 8 16)")
    add("--temperatures", nargs="+", type=float, default=[0.0, 1.0], metavar="T", help="(default: 0 1)")
    add("--data", default="synth:testmini", metavar="DATA", help="what all are scored on (default: %(default)s)")
    add("--long-data", default="synth:test", metavar="DATA", help="for --long-policies; '' for none")
    add("--long-policies", nargs="+", default=list(LONG), metavar="P", help=f"(default: {' '.join(LONG)})")
    add("--data-limit", type=int, metavar="N", help="records of both (default: all)")
    add("--tune-limit", type=int, default=32, metavar="N", help="records of synth:val to tune on (default: 32)")
    add("--tune-tokens", type=int, default=128, metavar="N", help="per request of the tuning (default: 128)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: 256)")
    add("--dtype", choices=DTYPES, default="float32", help="to decode with (default: float32)")
    add("--answers", metavar="DIR", help="answers of a run on the same questions (default: made once)")
    add("--seed", type=int, default=0, help="of training, noise and bootstrap (default: 0)")
    add("--out", default="runs/policies", metavar="DIR", help="(default: %(default)s)")
    add("--results", default="recipes/results", metavar="DIR", help="policies.json, page, plots (default: %(default)s)")
    add("--shard", default="1/1", metavar="I/N", help="only every N-th drafter, from the I-th on; collects nothing")
    add("--so-far", action="store_true", help="do no step: table, page and plots of the cells that are there")
    add("--set", nargs="+", default=[], metavar="key=value", help="recipe keys to change, for all controllers")
    add("--make-untrained", metavar="DIR", help=argparse.SUPPRESS)
    add("--keep", action="store_true", help="keep the cells that --results has and --out does not: another machine's")
    args = parser.parse_args(said)
    at_least(args, batches=1, tune_limit=1, tune_tokens=1, max_new_tokens=1, data_limit=1)
    if any("=" not in pair for pair in args.heads):
        raise InputError(f"--heads takes NAME=DIR, not {next(p for p in args.heads if '=' not in p)}")
    if unknown := [name for name in args.methods if name not in method_names()]:
        raise InputError(f"--methods {unknown[0]} is unknown; there are: {', '.join(method_names())}")
    if unknown := [p for p in args.long_policies if p not in (*BASELINES, *LEARNED, ORACLE)]:
        raise InputError(f"--long-policies {unknown[0]} is none of {', '.join((*BASELINES, *LEARNED, ORACLE))}")
    parse_tree(args.offer)
    try:
        number, n_shards = map(int, args.shard.split("/"))
    except ValueError:
        number, n_shards = 0, 0
    if not 1 <= number <= n_shards:
        raise InputError(f"--shard {args.shard} is none; write I/N, as in 1/2")
    args.shard, args.said = (number, n_shards), said
    return args


if __name__ == "__main__":
    sys.exit(main())
