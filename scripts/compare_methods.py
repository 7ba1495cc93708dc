"""All methods of MMSpec and ViSkip side by side: at one budget of draft nodes, and each at what was tuned for it.

    bash scripts/compare_methods.sh --heads eagle=runs/heads/eagle eagle3=runs/heads/eagle3 medusa=runs/heads/medusa \\
        msd=runs/heads/msd vispec=runs/heads/vispec viskip=runs/viskip_tiny
    bash scripts/compare_methods.sh --heads eagle=runs/viskip_tiny --data synth:testmini --tune-limit 12  # a quick look
    bash scripts/compare_methods.sh --target llava-hf/llava-1.5-7b-hf --dtype bfloat16 --data MMSPEC/test \\
        --heads eagle=hub:ORG/HEAD viskip=runs/viskip_llava7b        # real weights

--heads names trained heads: run folders, or places on the Hub. `eagle` is shown twice, as EAGLE-1 (one static tree) and
as EAGLE-2 (a dynamic one); of `viskip` the head with its controller and, beside it, the same head without. The methods
without training (PLD, SAM decoding, trie lookahead, Token Recycling) need nothing. Plain decoding is the baseline.

Two tables, each one evaluation in which everybody decodes each prompt of --data directly one after another:
  matched  the same number of draft nodes for all (--tree DEPTH,WIDTH,NODES): the heads' trees have that shape (Medusa
           as many levels as it has heads), static trees are fitted to that many nodes, copied drafts are as long
  tuned    what was fastest on --tune-data: depth, width and nodes of each head's tree, nodes of EAGLE-1's, settings of
           the methods without training, which also choose their nodes by measured costs (--method-budget adaptive)

Nothing is tuned on --data (of MMSpec note that testmini is a part of test). Every step is a command, printed before it
runs and skipped when it is done; one is done again when its command, its head, its controller or a step before it has
changed; an evaluation goes on where it was interrupted (after an update of the code remove its folder in --out first).
Run folders are only read. Results: --results (tables by topic with intervals and exact_match as JSON, CSV, Markdown,
and plots) and a paragraph on the terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.options import DTYPES
from eval.steps import ROOT, Ledger, Step, module, perform, read_json
from eval.tune_tree import STATIC_GRID, parse_tree
from mmspec import checkpoint
from mmspec.api import STATIC_TREE
from mmspec.arguments import Parser, at_least, command
from mmspec.assets import EMBEDDED
from mmspec.hub import run_folder
from mmspec.types import InputError
from scripts._method_tables import FREE, HEADS, STATIC, TABLES, VISKIP, collect, folder_name, write

FILES = ("head.json", "head.safetensors")
CONTROLLER = ("viskip.json", "viskip.safetensors")


@dataclass(frozen=True)
class Entrant:
    """One trained head, of which each table has a folder: links to its weights, and a tree. Its own is only read."""

    name: str
    source: Path

    def folder(self, args: argparse.Namespace, table: str) -> Path:
        """Of a table."""
        return Path(args.out) / f"{table}_heads" / folder_name(self.name)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of what is linked."""
        return (*FILES, *CONTROLLER) if self.name == VISKIP else FILES

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files that all its steps read."""
        return tuple(self.source / name for name in self.files if name.endswith(".safetensors"))


def entrants(args: argparse.Namespace) -> list[Entrant]:
    """The heads, each checked and linked.

    Raises:
        InputError: an unknown name, one that is there twice, or a folder that holds no such head.
    """
    found: dict[str, Entrant] = {}
    for pair in args.heads:
        name, equals, place = pair.partition("=")
        if not equals or name not in HEADS or name in found:
            raise InputError(f"--heads {pair}: write NAME=DIR once for each of {', '.join(HEADS)}")
        loaded = checkpoint.load(place, args.target, args.dtype)
        if name != VISKIP and loaded.kind != name:
            raise InputError(f"--heads {pair}: that is a head of kind {loaded.kind}, not {name}")
        if name == VISKIP and loaded.viskip is None:
            raise InputError(f"--heads {pair}: it has no controller (viskip.safetensors); train one")
        found[name] = Entrant(name, run_folder(place, args.target, args.dtype).resolve())
    for one in found.values():
        for table in TABLES:
            folder = one.folder(args, table)
            folder.mkdir(parents=True, exist_ok=True)
            for file in one.files:
                link = folder / file
                if not link.is_symlink() or link.resolve() != one.source / file:
                    link.unlink(missing_ok=True)
                    link.symlink_to(one.source / file)
            if not (folder / "tree.json").is_file():
                checkpoint.write_json(folder / "tree.json", read_json(one.source / "tree.json"))
    return list(found.values())


def plan(args: argparse.Namespace, heads: Sequence[Entrant]) -> list[Step]:
    """All steps, in order."""
    out, nodes = Path(args.out), parse_tree(args.tree).budget
    on = ("--dtype", args.dtype, "--device", args.device, *(("--target", args.target) if args.target else ()))
    tuning = ("--data", args.tune_data, "--limit", str(args.tune_limit), *on)
    length = ("--max-new-tokens", str(args.max_new_tokens))
    fit = (sys.executable, str(ROOT / "scripts/fit_tree.py"))
    steps, tuned = [], []

    def tune(name: str, *words: str, after: tuple[str, ...] = (), reads: tuple[Path, ...] = ()) -> None:
        place = out / "tuning" / f"{name}.json"
        words = module("eval.tune_tree", *words, "--out", str(place), *tuning, *length)
        steps.append(Step(f"tune {name}", words, place, after, reads=reads))
        tuned.append(f"tune {name}")

    for head in heads:
        ckpt, reads = ("--ckpt", str(head.folder(args, "tuned"))), head.weights
        if head.name == STATIC:
            most = str(max(nodes, *map(int, STATIC_GRID)))
            words = (*fit, *ckpt, "--budget", most, "--out", str(_fitted(args)), *tuning)
            steps.append(Step(f"fit {STATIC}", words, _fitted(args), reads=reads))
            grid = ("--grid", *args.static_grid) if args.static_grid else ()
            static = ("--static", str(_fitted(args)), *grid)
            tune(f"{STATIC}_static", *ckpt, *static, after=(f"fit {STATIC}",), reads=reads)
        grid = ("--grid", *args.grid) if args.grid else ()
        steered = ("--policy", VISKIP) if head.name == VISKIP else ()
        tune(head.name, *ckpt, *steered, *grid, reads=reads)
    recycled = _recycled(args)
    words = (*fit, "--method", "recycling", "--budget", str(nodes), "--out", str(recycled), *tuning)
    steps.append(Step("fit recycling", words, recycled))
    for name in FREE:
        trees = ("--grid", "{}", f"{{tree: {recycled}}}", "{seed_prompt: false}") if name == "recycling" else ()
        tune(name, "--method", name, *trees, after=("fit recycling",) if trees else ())
    fits = [step.name for step in steps if step.name.startswith("fit ")]
    for table, after in zip(TABLES, (fits, tuned)):
        steps.append(_evaluation(args, table, heads, on, after))
    return steps


def _fitted(args: argparse.Namespace) -> Path:
    return Path(args.out) / "fitted" / f"{STATIC}.json"


def _recycled(args: argparse.Namespace) -> Path:
    return Path(args.out) / "fitted" / f"recycling_{parse_tree(args.tree).budget}.json"


def _evaluation(
    args: argparse.Namespace, table: str, heads: Sequence[Entrant], on: Sequence[str], after: Sequence[str]
) -> Step:
    """One table: plain decoding and everybody else, prompt by prompt."""
    folder, methods = Path(args.out) / table, Path(args.out) / f"{table}.yaml"
    ckpts = [word for head in heads for word in ("--ckpt", str(head.folder(args, table)))]
    names = {head.name for head in heads}
    policies = ["fixed", *(["static"] if STATIC in names else []), *([VISKIP] if VISKIP in names else [])]
    words = module(
        "eval.mmspec", *ckpts, *(("--policies", *policies) if heads else ()), "--method", *FREE,
        "--method-settings", str(methods), "--method-budget", "fixed" if table == "matched" else "adaptive",
        "--data", args.data, *(("--limit", str(args.data_limit)) if args.data_limit else ()),
        "--max-new-tokens", str(args.max_new_tokens), "--batch-size", str(args.batch_size), "--seed", str(args.seed),
        "--out", str(folder), *on,
    )  # fmt: skip
    # What was tuned is content of files that are written right before.
    static = [head.folder(args, table) / STATIC_TREE for head in heads if head.name == STATIC]
    weights = [path for head in heads for path in head.weights]
    reads = (methods, *weights, *(head.folder(args, table) / "tree.json" for head in heads), *static)
    return Step(table, words, folder / "summary.json", tuple(after), None, ("--resume",), reads)


def prepare(args: argparse.Namespace, table: str, heads: Sequence[Entrant]) -> None:
    """Writes what an evaluation reads, of what is known by then: trees of its heads, settings of methods."""
    tree, matched = parse_tree(args.tree), table == "matched"
    for head in heads:
        folder = head.folder(args, table)
        best = {"depth": tree.depth, "width": tree.width, "budget": tree.budget} if matched else _best(args, head.name)
        checkpoint.write_json(folder / "tree.json", best)
        if head.name == STATIC:
            nodes = tree.budget if matched else _best(args, f"{STATIC}_static")["nodes"]
            fitted = read_json(_fitted(args))
            checkpoint.write_json(folder / STATIC_TREE, {"paths": fitted["paths"][:nodes]})
    if matched:
        said: dict[str, Any] = {
            "sam": {"n_predicts": tree.budget + 1}, "lookahead": {"decoding_length": tree.budget},
            "recycling": {"tree": str(_recycled(args))}, "pld": {"num_pred": tree.budget},
        }  # fmt: skip
    else:
        said = {name: settings for name in FREE if (settings := _best(args, name)["settings"])}
    (Path(args.out) / f"{table}.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")


def _best(args: argparse.Namespace, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(Path(args.out) / "tuning" / f"{name}.json")["best"]
    return found


@command("compare_methods", interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    said = list(sys.argv[1:] if argv is None else argv)
    args = _parse(said)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    heads = entrants(args)
    ledger = Ledger(Path(args.out))
    for step in plan(args, heads):
        if args.only and step.name.split()[0] not in args.only:
            continue
        if step.name in TABLES:
            prepare(args, step.name, heads)
        step.makes.parent.mkdir(parents=True, exist_ok=True)
        perform(step, ledger)
    if not args.only:
        print(write(args, collect(args, [head.name for head in heads])))


def _parse(said: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/compare_methods.sh", description=__doc__)
    add = parser.add_argument
    add("--heads", nargs="*", default=[], metavar="NAME=DIR", help=f"of {', '.join(HEADS)} (default: no heads)")
    add("--only", nargs="+", choices=("fit", "tune", *TABLES), metavar="STAGE", help="of fit, tune, matched, tuned")
    add("--out", default="runs/methods", metavar="DIR", help="tuning and evaluations (default: %(default)s)")
    add("--results", default="recipes/results/methods", metavar="DIR", help="tables and plots (default: %(default)s)")
    add("--target", metavar="NAME", help=f"to decode with (default: the heads', without any {EMBEDDED})")
    add("--tree", default="7,2,10", metavar="D,W,N", help="of the matched table (default: %(default)s)")
    add("--grid", nargs="+", metavar="D,W,N", help="trees to tune over (default: those of eval.tune_tree)")
    add("--static-grid", nargs="+", metavar="N", help="nodes of EAGLE-1's tree to tune over (default: as there)")
    add("--data", default="synth:test", metavar="DATA", help="what is reported on (default: %(default)s)")
    add("--data-limit", type=int, metavar="N", help="records of it (default: all)")
    add("--tune-data", default="synth:val", metavar="DATA", help="what is tuned on (default: %(default)s)")
    add("--tune-limit", type=int, default=60, metavar="N", help="records of it (default: 60)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: 256)")
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together in the tables (default: 1)")
    add("--dtype", choices=DTYPES, default="float32", help="of target and heads (default: float32)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args(said)
    at_least(args, data_limit=1, tune_limit=1, max_new_tokens=1, batch_size=1)
    for text in (args.tree, *(args.grid or ())):
        parse_tree(text)
    if args.data == args.tune_data:
        raise InputError(f"--tune-data {args.tune_data} is what is reported on; tune on something else")
    args.said = said
    return args


if __name__ == "__main__":
    sys.exit(main())
