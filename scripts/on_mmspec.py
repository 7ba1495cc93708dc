"""What needs real weights, a command each: public heads against the figures published of them, a recipe's whole table.

    python scripts/on_mmspec.py heads --data MMSPEC/testmini
    python scripts/on_mmspec.py recipe recipes/vispec_qwen2_5_vl_7b.yaml data.train=mix.json --data MMSPEC/test

`heads` takes every head that recipes/results/published.yaml names from the Hub (or, with --heads, from the folder of
its name there), converts it, scores it as its figure was taken (greedy, batch 1, at most 1,024 tokens, its tree), and
compares the mean accepted length (MAT): what lies within 5% and changed no answer has passed. `recipe` looks for what
data and benchmark share, trains, and scores the head with all training-free methods beside it, on as many records as
the folder has.

Every step is a command, printed before it runs and skipped when it is done: the same command again goes on. What one
head is refused for, or fails at, is said and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from eval.options import DTYPES  # noqa: E402
from eval.steps import Ledger, Step, launched, module, perform  # noqa: E402
from eval.tables import INVALID  # noqa: E402
from mmspec import checkpoint  # noqa: E402
from mmspec.arguments import Parser, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from mmspec.types import InputError  # noqa: E402

PUBLISHED = ROOT / "recipes" / "results" / "published.yaml"
TOLERANCE = 0.05
BENCHMARK = "MMSpec"
"""How the data of the figures begin that heads are tested against."""


@dataclass(frozen=True)
class Verdict:
    """What came of one head.

    Args:
        name: of the head.
        measured: its MAT here; None where it was not scored.
        low, high: the published figure, one number or a range; None where nothing is published.
        said: where the figure is from, or why there is no measurement; first of all, that answers were changed.
        valid: whether they are plain decoding's (the gate of `summary.json`); None where it was not scored.
    """

    name: str
    measured: float | None
    low: float | None
    high: float | None
    said: str
    valid: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether it was measured within TOLERANCE of the figure, without changing an answer."""
        return self.valid is True and self.off is not None and abs(self.off) <= TOLERANCE

    @property
    def off(self) -> float | None:
        """How far below (negative) or above the figure, as a share of its nearer end; 0 inside of a range."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        if self.measured < self.low:
            return self.measured / self.low - 1
        return max(self.measured / self.high - 1, 0.0)

    @property
    def published(self) -> str:
        """The figure in words."""
        if self.low is None or self.high is None:
            return "-"
        return f"{self.low:.2f}" if self.low == self.high else f"{self.low:.2f} to {self.high:.2f}"


def judge(
    name: str,
    measured: float | None,
    figure: Mapping[str, Any] | None,
    sources: Mapping[str, Any],
    valid: bool = True,
) -> Verdict:
    """A head's measured MAT beside the figure published of it.

    Args:
        figure: of recipes/results/published.yaml, `mat` one number or the lowest and the highest; None: there is none.
        sources: of the same file.
        valid: see `Verdict`.
    """
    first = "" if valid else f"{INVALID}; "
    if figure is None:
        return Verdict(name, measured, None, None, f"{first}no figure is published", valid)
    mat = figure["mat"] if isinstance(figure["mat"], list) else [figure["mat"]] * 2
    note = f"; {figure['note']}" if "note" in figure else ""
    said = f"{first}{figure['data']}, {sources[figure['source']]['name']}{note}"
    return Verdict(name, measured, *map(float, mat), said, valid)


# ---- public heads ----


def heads(args: argparse.Namespace) -> int:
    """Converts, scores and compares; returns 0 when all passed, else 1."""
    known = _published(args.published)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger, verdicts = Ledger(args.out), []
    for head in _chosen(known["heads"], args.only):
        name = head["name"]
        found = [f for f in known["figures"] if f["head"] == head["layout"] and f["target"] == head["target"]]
        figure = next((f for f in found if f["data"].startswith(BENCHMARK)), None)
        try:
            for step in _steps(args, head, known["targets"]):
                perform(step, ledger)
            summary = json.loads((args.out / name / "eval" / "summary.json").read_text(encoding="utf-8"))
            verdicts.append(judge(name, float(summary["mat"]), figure, known["sources"], summary["valid"]))
        except InputError as error:
            print(f"== {error}", file=sys.stderr, flush=True)
            verdict = judge(name, None, figure, known["sources"])
            verdicts.append(Verdict(name, None, verdict.low, verdict.high, f"not scored: {error}"))
    said = [asdict(verdict) | {"off": verdict.off, "passed": verdict.passed} for verdict in verdicts]
    checkpoint.write_json(args.out / "verdict.json", {"data": args.data.name, "tolerance": TOLERANCE, "heads": said})
    _show(verdicts)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _published(path: Path) -> dict[str, Any]:
    """The list of heads and figures.

    Raises:
        InputError: it cannot be read.
    """
    try:
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and {"heads", "figures", "targets", "sources"} <= set(known):
            return known
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--published {path} cannot be read ({' '.join(str(error).split())})") from error
    raise InputError(f"--published {path} lacks one of heads, figures, targets, sources; {PUBLISHED.name} has them")


def _chosen(heads: Sequence[dict[str, Any]], only: Sequence[str]) -> list[dict[str, Any]]:
    names = [head["name"] for head in heads]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--only {unknown[0]} is not in the list; there are: {', '.join(names)}")
    return [head for head in heads if not only or head["name"] in only]


def _steps(args: argparse.Namespace, head: Mapping[str, Any], targets: Mapping[str, str]) -> list[Step]:
    """Conversion and evaluation of one head."""
    name, target = head["name"], targets[head["target"]]
    folder = args.out / name
    place = str(args.heads / name) if args.heads else head["hub"]
    if not Path(place).exists() and not args.heads:
        place = f"hub:{place}"
    made = ("--target", target, "--layout", head["layout"], "--out", str(folder / "head"))
    convert = (sys.executable, str(ROOT / "scripts/convert.py"), place, *made, "--dtype", args.dtype, *_device(args))
    tree = ("--tree", *map(str, head["tree"]))
    score = ("--ckpt", str(folder / "head"), "--target", target, *tree, "--out", str(folder / "eval"), *_scored(args))
    converted = Step(f"convert {name}", convert, folder / "head" / "head.json")
    return [converted, _evaluation(f"score {name}", score, folder / "eval", converted.name)]


def _evaluation(name: str, words: Sequence[str], out: Path, after: str) -> Step:
    """An evaluation."""
    return Step(name, module("eval.mmspec", *words), out / "summary.json", (after,), resume=("--resume",))


def _show(verdicts: Sequence[Verdict]) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("head", "MAT", "published", "off", "verdict"):
        table.add_column(column, justify="left" if column in ("head", "verdict") else "right")
    table.add_column("of", overflow="fold")
    for verdict in verdicts:
        off = "-" if verdict.off is None else f"{verdict.off:+.1%}"
        measured = "-" if verdict.measured is None else f"{verdict.measured:.2f}"
        word = "passed" if verdict.passed else "open" if verdict.off is None else "off" if verdict.valid else "INVALID"
        table.add_row(verdict.name, measured, verdict.published, off, word, verdict.said)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


# ---- a recipe ----


def recipe(args: argparse.Namespace) -> int:
    """Trains a recipe and scores it with every method beside it; returns 0."""
    settings = load(args.recipe, args.overrides)
    ledger, folder = Ledger(settings.folder / "on_mmspec"), settings.folder
    given, steps, before = (str(args.recipe), *args.overrides), [], ()
    if settings.data.decontaminated:
        words = (sys.executable, str(ROOT / "scripts/decontaminate.py"), *given, "--benchmark", str(args.data))
        steps.append(Step("decontaminate", words, Path(settings.data.decontaminated).parent, reads=(args.recipe,)))
        before = ("decontaminate",)
    # A step that is first begun loses the file it makes; of a run that is there already nothing may be lost.
    train = launched(args.procs, "train/distill.py", *given, "run.resume=true")
    steps.append(Step("train", train, folder, before, reads=(args.recipe,)))
    out = args.out or folder / "mmspec"
    dtype = args.dtype or settings.target.dtype
    words = ("--ckpt", str(folder), "--target", settings.target.name, "--method", "all", "--out", str(out))
    steps.append(_evaluation("score", (*words, *_scored(args, dtype)), out, "train"))
    (folder / "on_mmspec").mkdir(parents=True, exist_ok=True)
    for step in steps:
        perform(step, ledger)
    print(f"the table: python -m eval.show {out / 'summary.json'}")
    return 0


# ---- commands ----


def _device(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--device", args.device)


def _scored(args: argparse.Namespace, dtype: str | None = None) -> tuple[str, ...]:
    limit = ("--limit", str(args.limit)) if args.limit else ()
    said = ("--data", str(args.data), "--max-new-tokens", str(args.max_new_tokens), "--dtype", dtype or args.dtype)
    return (*said, *_device(args), *limit)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(prog="scripts/on_mmspec.py", description=__doc__)
    parts = parser.add_subparsers(dest="what", required=True, metavar="heads|recipe")
    public = parts.add_parser("heads", help="public heads against published figures")
    own = parts.add_parser("recipe", help="train a recipe and make its whole table")
    public.add_argument("--only", nargs="+", default=[], metavar="NAME", help="heads by their names in the list")
    public.add_argument("--heads", type=Path, metavar="DIR", help="downloaded heads, in folders of their names")
    public.add_argument("--published", type=Path, default=PUBLISHED, metavar="FILE", help="list of heads and figures")
    own.add_argument("recipe", type=Path, help="YAML file, as in recipes/")
    own.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    own.add_argument(
        "--procs", type=int, default=max(torch.cuda.device_count(), 1), help="processes (default: the GPUs)"
    )
    for part, out in ((public, Path("runs/public_heads")), (own, None)):
        add = part.add_argument
        add("--data", type=Path, required=True, metavar="DIR", help="MMSpec's split: mmspec.jsonl and images/")
        add("--out", type=Path, default=out, metavar="DIR", help=f"results (default: {out or 'RUN/mmspec'})")
        add("--max-new-tokens", type=int, default=1024, metavar="N", help="per request (default: 1024, as MMSpec's)")
        add("--dtype", choices=DTYPES, default="bfloat16" if part is public else None, help="of target and head")
        add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
        add("--limit", type=int, metavar="N", help="only N records; the figures are of all of them")
    args = parser.parse_args(argv)
    if not (args.data / "mmspec.jsonl").is_file():
        raise InputError(f"--data {args.data} has no mmspec.jsonl; give a split of MMSpec, such as MMSPEC/testmini")
    return args


@command("on_mmspec", interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0, 1 when a head is not within the tolerance, 2 for wrong input, 130 when interrupted."""
    args = arguments(argv)
    return heads(args) if args.what == "heads" else recipe(args)


if __name__ == "__main__":
    sys.exit(main())
