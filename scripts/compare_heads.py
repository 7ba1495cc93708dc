"""Trains every head of a target on one token budget, scores them side by side, and writes the tables and plots.

    bash scripts/compare_heads.sh                             # all recipes/<head>_tiny.yaml, and their blind twins
    bash scripts/compare_heads.sh --heads eagle eagle3 --no-blind --data synth:testmini

Heads are the files of mmspec/heads that have a recipe <head>_<target>.yaml, so a new one joins by itself. All train on
the same regenerated answers, whose states the target computes once (--live: in every step again), for as many steps of
as many conversations, at most --minutes each; a head that does not get there is scored as far as it got, and the table
shows its steps. Two tables: `matched` has one tree for all heads (--tree), `tuned` each head's own, chosen by speedup
on --tune-data. A twin reads means in place of the image (mmspec/heads/_blind.py) and stands in the first table;
eval.dependence says at which tokens that costs acceptance. The fastest method without training stands there too, with
its own settings and as many nodes as pay by measured costs.

Every step is a command, printed before it runs and skipped when it is done; a step is done again when its command or a
step before it has changed. Several of these commands may share --out, each with --heads of its own and the other
options alike; one for all heads then finds their work done. Results: --results (tables, CSV, JSON, plots) and a
paragraph on the terminal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from eval.head_tables import as_csv, depth_plot, gains, markdown, row
from eval.options import DTYPES
from eval.steps import (
    ROOT,
    Ledger,
    Step,
    hardware_line,
    launched,
    module,
    one_budget,
    options,
    perform,
    read_json,
)
from eval.summary import OVERALL, clean
from eval.tune_tree import parse_tree
from mmspec import checkpoint
from mmspec.api import STATIC_TREE
from mmspec.arguments import Parser, at_least, command
from mmspec.methods import method_names
from mmspec.recipe import head_kinds, load
from mmspec.types import InputError

PREPARED = "prepared"
"""The step that all trainings read."""
STAGES = (PREPARED, "train", "static", "tune", "matched", "tuned", "dependence")
"""First words of the steps' names."""
STATIC = "eagle"
"""The head that EAGLE-1's static tree is shown of, beside the dynamic one."""
TUNED = "tuned_tree.json"
"""What eval.tune_tree leaves in a run folder."""


# ---- what is done ----


@dataclass(frozen=True)
class Entrant:
    """One head, or its twin.

    Args:
        name: of its run folder, and in the tables.
        kind: file name under `mmspec/heads`.
        recipe: it is trained by.
    """

    name: str
    kind: str
    recipe: Path
    blind: bool


def entrants(args: argparse.Namespace) -> list[Entrant]:
    """The heads that have a recipe for the target, each followed by its twin.

    Raises:
        InputError: one that is asked for has none.
    """
    found, known = [], _recipes(args)
    for kind in args.heads or known:
        recipe = ROOT / "recipes" / f"{kind}_{args.suffix}.yaml"
        if kind not in known:
            raise InputError(f"--heads {kind}: there is no recipes/{kind}_{args.suffix}.yaml of a head of that name")
        found.append(Entrant(kind, kind, recipe, False))
        found += [] if args.no_blind else [Entrant(f"{kind}_blind", kind, recipe, True)]
    return found


def _recipes(args: argparse.Namespace) -> dict[str, Path]:
    """Of the target, by kind of head."""
    places = {kind: ROOT / "recipes" / f"{kind}_{args.suffix}.yaml" for kind in head_kinds()}
    return {kind: place for kind, place in places.items() if place.is_file()}


def plan(args: argparse.Namespace, heads: Sequence[Entrant]) -> list[Step]:
    """All steps, in order."""
    out = Path(args.out)
    steps = [_prepared(args)]
    for head in heads:
        steps += _of_head(args, head)
    seeing = [head for head in heads if not head.blind]
    tree = ("--tree", *map(str, _numbers(args.tree)))
    free = () if args.no_training_free else ("--method", *method_names())
    fitted = [step.name for step in steps if step.name.startswith("static")]
    policies = ("--policies", "fixed", *(["static"] if fitted else []))
    steps.append(_evaluation(args, "matched", heads, (*tree, *policies, *free), fitted))
    trees = [f"--tree=@{out / head.name / TUNED}" for head in seeing]
    steps.append(
        _evaluation(args, "tuned", seeing, (*trees, "--policies", "fixed"), [f"tune {h.name}" for h in seeing])
    )
    for head in heads:
        if head.blind:
            folder = out / "dependence" / head.kind
            both = ("--ckpt", str(out / head.kind), "--ckpt", str(out / head.name))
            words = module("eval.dependence", *both, "--out", str(folder), *_scored(args))
            after = (f"train {head.kind}", f"train {head.name}")
            steps.append(Step(f"dependence {head.kind}", words, folder / "dependence.json", after))
    return steps


def _evaluation(
    args: argparse.Namespace, name: str, heads: Sequence[Entrant], more: Sequence[str], after: Sequence[str]
) -> Step:
    """One table: all of its methods decode each prompt one directly after another, beside plain decoding."""
    folder = Path(args.out) / name
    ckpts = [word for head in heads for word in ("--ckpt", str(Path(args.out) / head.name))]
    words = module("eval.mmspec", *ckpts, *more, "--out", str(folder), *_scored(args))
    before = (*(f"train {head.name}" for head in heads), *after)
    return Step(name, words, folder / "summary.json", before, resume=("--resume",))


def _shared(args: argparse.Namespace) -> list[str]:
    """Overrides that make one budget of all recipes."""
    source = f"data.sources=[{{path: '{args.train}', limit: {args.limit}}}]"
    return [source, f"data.answers_dir={Path(args.out) / 'answers'}", *one_budget(args), *args.set]


def _scored(args: argparse.Namespace) -> list[str]:
    limit = ["--limit", str(args.data_limit)] if args.data_limit else []
    said = ["--data", args.data, "--max-new-tokens", str(args.max_new_tokens), "--seed", str(args.seed)]
    return [*said, "--dtype", args.dtype, *limit]


def _prepared(args: argparse.Namespace) -> Step:
    """What all heads learn from: the answers, and without --live the target's states on them."""
    # The same for any --heads. One head's states hold what all read: the last, and those of a head that taps more.
    recipes = list(_recipes(args).values())
    recipe = max(recipes, key=lambda place: hasattr(load(place).head.config, "taps"))
    named = (str(recipe), "run.name=prepared", *_shared(args))
    if args.live:
        words = launched(args.procs, "scripts/regenerate.py", *named)
        return Step(PREPARED, words, Path(args.out) / "answers", reads=(recipe,))
    folder = Path(args.out) / "states"
    words = launched(args.procs, "scripts/extract_features.py", *named, "--out", str(folder))
    return Step(PREPARED, words, folder / "manifest.json", reads=(recipe,), owns=folder)


def _of_head(args: argparse.Namespace, head: Entrant) -> list[Step]:
    """Training of one head, and what its trees are chosen by."""
    folder = Path(args.out) / head.name
    trained = f"train {head.name}"
    own = [f"run.name={head.name}", f"head.blind={str(head.blind).lower()}"]
    own += [] if args.live else [f"data.features={Path(args.out) / 'states'}"]
    words = launched(args.procs, "train/distill.py", str(head.recipe), *_shared(args), *own)
    weights = folder / "head.safetensors"
    steps = [Step(trained, words, weights, (PREPARED,), args.minutes * 60, ("run.resume=true",), (head.recipe,))]
    if head.blind:
        return steps
    ckpt = ("--ckpt", str(folder))
    tuning = ("--data", args.tune_data, "--limit", str(args.tune_limit), "--dtype", args.dtype)
    if head.name == STATIC:
        words = (sys.executable, str(ROOT / "scripts/fit_tree.py"), *ckpt, "--budget", str(_numbers(args.tree)[2]))
        steps.append(Step(f"static {head.name}", (*words, *tuning), folder / STATIC_TREE, (trained,)))
    grid = ("--grid", *args.grid) if args.grid else ()
    words = module("eval.tune_tree", *ckpt, "--out", str(folder / TUNED), *tuning, *grid)
    words += ("--max-new-tokens", str(args.max_new_tokens))
    steps.append(Step(f"tune {head.name}", words, folder / TUNED, (trained,)))
    return steps


def _numbers(text: str) -> tuple[int, int, int]:
    tree = parse_tree(text)
    return tree.depth, tree.width, tree.budget


def ready(step: Step) -> Step:
    """The step with what an earlier one found put in place of `--tree=@FILE`."""
    words: list[str] = []
    for word in step.words:
        if word.startswith("--tree=@"):
            best = json.loads(Path(word.removeprefix("--tree=@")).read_text(encoding="utf-8"))["best"]
            words += ["--tree", *(str(best[key]) for key in ("depth", "width", "budget"))]
        else:
            words.append(word)
    return replace(step, words=tuple(words))


# ---- what came of it ----


def collect(args: argparse.Namespace, heads: Sequence[Entrant], ledger: Ledger) -> dict[str, Any]:
    """Rows of both tables, and what the twins say."""
    out, runs = Path(args.out), {head.name: head for head in heads}
    found = {table: read_json(out / table / "summary.json") for table in ("matched", "tuned")}
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, summary in found.items():
        tables[table] = []
        for method, how in summary["settings"]["methods"].items():
            name = method.removesuffix("_static")
            if name in runs:
                tree = f"{how['depth']},{how.get('width', '-')},{how['budget']}"
                facts = {"tree": tree, "steps": _steps(out / name)}
                if method == name:  # one checkpoint, however many trees
                    facts["train_s"] = ledger.seconds(f"train {name}")
                tables[table].append(row(method, summary, method, {**facts, "blind": runs[name].blind}))
    if not args.no_training_free:
        summary = found["matched"]
        best = max(method_names(), key=lambda name: summary["methods"][name][OVERALL]["speedup"])
        facts = {"tree": "defaults; nodes by cost"}
        tables["matched"].append(row(f"best training-free ({best})", summary, best, facts))
    dependence = {h.kind: read_json(out / "dependence" / h.kind / "dependence.json") for h in heads if h.blind}
    return {
        "settings": options(args),
        "commit": checkpoint.git_commit(),
        "hardware": found["matched"]["hardware"],
        **tables,
        "dependence": {k: {key: d[key] for key in ("zeros", "overall", "topics")} for k, d in dependence.items()},
    }


def _steps(folder: Path) -> int | None:
    """Optimizer steps that a run made."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    made = [entry["step"] for entry in map(json.loads, lines) if "train/loss" in entry]
    return max(made, default=None)


def write(args: argparse.Namespace, found: Mapping[str, Any]) -> str:
    """Tables, CSV, JSON and plots; returns the paragraph for RESULTS.md."""
    results, out = Path(args.results), Path(args.out)
    results.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(results / "heads.json", clean(found))
    titles = {
        "matched": f"Matched budget: depth, width, nodes {args.tree}",
        "tuned": f"Tuned: each head's best tree on {checkpoint.discreet(args.tune_data)}",
    }
    text = []
    for table, title in titles.items():
        (results / f"{table}.csv").write_text(as_csv(found[table]), encoding="utf-8")
        (results / f"{table}.svg").write_text(depth_plot(title, found[table]), encoding="utf-8")
        text.append(markdown(title, found[table]))
    for kind, dependence in found["dependence"].items():
        shutil.copy(out / "dependence" / kind / "dependence.svg", results / f"dependence_{kind}.svg")
        text.append(f"- Acceptance that seeing adds to {kind}: {gains(dependence, f'{kind}_blind')}.\n")
    (results / "tables.md").write_text("\n".join(text), encoding="utf-8")
    trained = [f"{entry['head']} {entry['train_s'] / 60:.1f} min" for entry in found["matched"] if "train_s" in entry]
    machine = hardware_line(found["hardware"])
    said = " ".join(map(checkpoint.discreet, args.said))
    return (
        f"## {date.today()} · Heads side by side on {checkpoint.discreet(args.data)}\n\n"
        f"`bash scripts/compare_heads.sh {said}`, commit {found['commit']}, {machine}.\n"
        f"{args.steps} steps of {args.batch} conversations each, at most {args.minutes:g} minutes; trained: "
        f"{', '.join(trained)}.\n\n" + "\n".join(text)
    )


@command("compare_heads", interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    said = list(sys.argv[1:] if argv is None else argv)
    args = _parse(said)
    heads = entrants(args)
    for head in heads:
        load(head.recipe, [*_shared(args), f"head.blind={str(head.blind).lower()}"])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    ledger = Ledger(Path(args.out))
    for step in plan(args, heads):
        if not args.only or step.name.split()[0] in args.only:
            perform(ready(step), ledger)
    if not args.only:
        print(write(args, collect(args, heads, ledger)))


def _parse(said: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/compare_heads.sh", description=__doc__)
    add = parser.add_argument
    add("--suffix", default="tiny", metavar="TARGET", help="of the recipes: <head>_TARGET.yaml (default: tiny)")
    add("--heads", nargs="+", metavar="KIND", help="only these (default: all that have a recipe)")
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; then no tables are made")
    add("--no-blind", action="store_true", help="without vision-blind twins")
    add("--no-training-free", action="store_true", help="without the best training-free method")
    add("--out", default="runs/heads", metavar="DIR", help="run folders and evaluations (default: %(default)s)")
    add("--results", default="recipes/results/heads", metavar="DIR", help="tables and plots (default: %(default)s)")
    add("--train", default="synth:train", metavar="DATA", help="training questions (default: %(default)s)")
    add("--limit", type=int, default=1600, metavar="N", help="of them (default: 1600)")
    add("--steps", type=int, default=600, metavar="N", help="optimizer steps of each head (default: 600)")
    add("--batch", type=int, default=16, metavar="N", help="conversations a step (default: 16)")
    add("--minutes", type=float, default=20, metavar="M", help="of training for each head (default: 20)")
    add("--live", action="store_true", help="run the target in every training step instead of storing its states")
    add("--procs", type=int, default=2, metavar="N", help="processes that train (default: 2)")
    add("--tree", default="7,2,10", metavar="D,W,N", help="of the matched table (default: %(default)s)")
    add("--grid", nargs="+", metavar="D,W,N", help="trees to tune over (default: those of eval.tune_tree)")
    add("--data", default="synth:test", metavar="DATA", help="what is reported on (default: %(default)s)")
    add("--data-limit", type=int, metavar="N", help="records of it (default: all)")
    add("--tune-data", default="synth:val", metavar="DATA", help="what is tuned on (default: %(default)s)")
    add("--tune-limit", type=int, default=60, metavar="N", help="records of it (default: 60)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: 256)")
    add("--dtype", choices=DTYPES, default="float32", help="to decode with (default: float32); a recipe says its own")
    add("--seed", type=int, default=0, help="of training and bootstrap (default: 0)")
    add("--set", nargs="+", default=[], metavar="key=value", help="recipe keys to change, for all heads")
    args = parser.parse_args(said)
    at_least(args, limit=1, steps=1, batch=1, procs=1, data_limit=1, tune_limit=1, max_new_tokens=1)
    if not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, got {args.minutes:g}")
    if args.batch % args.procs:
        raise InputError(f"--batch {args.batch} must be a multiple of --procs {args.procs}")
    for text in (args.tree, *(args.grid or ())):
        parse_tree(text)
    args.said = said
    return args


if __name__ == "__main__":
    sys.exit(main())
