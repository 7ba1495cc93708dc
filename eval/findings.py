"""The three findings of the MMSpec paper as three experiments: each trains, scores, and answers in plain words.

    python -m eval.findings text_only                      # what heads trained on text alone are worth on pictures
    python -m eval.findings batch                          # what seeing is worth as the batch grows
    python -m eval.findings latency                        # where throughput and latency part
    python -m eval.findings text_only --heads multimodal=runs/heads/eagle --answers runs/heads/answers
    python -m eval.findings batch --heads seeing=runs/heads/eagle blind=runs/heads/eagle_blind
    python -m eval.findings latency --heads eagle=runs/heads/eagle medusa=runs/heads/medusa --batch-size 1 4 16

text_only   A head trained on the text-only twin of the training data (scripts/text_twin.py: the same questions and
            answers, no picture) beside one trained on the data themselves, by topic, and by how much tokens depend on
            the image (eval.dependence). Both read the target's states in decoding, so this is the mildest case: heads
            for text-only models were also trained on other words, and often on another target.
batch       A head beside its vision-blind twin (head.blind=true), and the head under its fixed tree, the attention
            threshold and a trained controller, at growing batch sizes.
latency     Heads and methods without training: throughput against what requests see, at batch 1 and above.

Heads that --heads does not give are trained by train/distill.py, all on one budget; a controller too, unless the seeing
head's folder has one. All that is compared decodes each prompt one directly after another in one run of eval.mmspec. A
claim holds, does not hold, or is not decidable here: by a paired bootstrap interval of its ratio, p after Holm within
its family, and a gain of more than 2%.

Every step is a command, printed before it runs and skipped when it is done: the same command goes on. Results:
--results (JSON, Markdown, SVG) and a paragraph on the terminal. On one idle core beside the training, estimated from
trials: text_only 10 minutes, batch 8 and 3 for a controller, latency 7; batches of 16 have few groups there, and
--data-limit 192 twice as many in twice the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from eval import findings_batch, findings_latency, findings_text_only
from eval.findings_runs import Found, Run, as_json, as_markdown
from eval.options import DTYPES
from eval.steps import ROOT, Ledger, Step, hardware_line, launched, module, one_budget, options, perform, read_json
from eval.tune_tree import parse_tree
from mmspec import checkpoint
from mmspec.api import FREE, TRAINED
from mmspec.arguments import Parser, at_least, command
from mmspec.files import write_text
from mmspec.methods import method_names
from mmspec.recipe import load
from mmspec.types import InputError

PROGRAM = "eval.findings"
ROLES = {
    "text_only": (findings_text_only.SEEING, findings_text_only.TEXT),
    "batch": (findings_batch.SEEING, findings_batch.BLIND),
    "latency": ("head",),
}
"""Heads that an experiment needs, by what they are called in it."""
TRAINED_AS = {
    findings_text_only.SEEING: "", findings_batch.SEEING: "", "head": "",
    findings_text_only.TEXT: "_text", findings_batch.BLIND: "_blind",
}  # fmt: skip
"""What a role's run folder is called behind the kind of its head: experiments share what they train."""
TITLES = {
    "text_only": "Text alone against pictures",
    "batch": "Seeing as the batch grows",
    "latency": "Throughput against latency",
}
BATCHES = {"text_only": [1], "batch": [1, 2, 4, 8, 16], "latency": [1, 4, 16]}
RECORDS = {"text_only": 300, "batch": 96, "latency": 96}
CONTROLLER = "viskip.safetensors"


def heads_of(args: argparse.Namespace) -> dict[str, str]:
    """Run folders by role: those given, and where the others will be. Raises InputError where one is no head."""
    given = dict(pair.split("=", 1) for pair in args.heads)
    for role, folder in given.items():
        if not (Path(folder) / "head.json").is_file():
            raise InputError(f"--heads {role}={folder} holds no head; train one, or leave it out")
    needed = () if given and args.experiment == "latency" else ROLES[args.experiment]
    made = {role: str(Path(args.out) / f"{args.kind}{TRAINED_AS[role]}") for role in needed}
    places = {**made, **given}
    names = [Path(folder).resolve().name for folder in places.values()]
    if same := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--heads: two run folders are both called {same[0]}; rename one")
    return places


def plan(args: argparse.Namespace, heads: Mapping[str, str]) -> list[Step]:
    """All steps, in order; heads that get a controller are scored where that is (`scored`)."""
    steps = [_training(args, role) for role in heads if _to_train(args, role)]
    if args.experiment == "text_only" and _to_train(args, findings_text_only.TEXT):
        steps.insert(len(steps) - 1, _twin(args))
    if _steered(args, heads):
        steps.append(_controller(args, heads[findings_batch.SEEING]))
    before = tuple(step.name for step in steps)
    ckpts = [word for folder in scored(args, heads).values() for word in ("--ckpt", folder)]
    said = ["--data", args.data, "--limit", str(args.data_limit or RECORDS[args.experiment]), "--dtype", args.dtype]
    said += ["--max-new-tokens", str(args.max_new_tokens), "--seed", str(args.seed)]
    more = ["--tree", *map(str, _tree(args)), "--batch-size", *map(str, batches(args))]
    if args.experiment == "latency":
        more += ["--method", *args.methods] if args.methods else []
    else:
        more += ["--policies", *(args.policies if args.experiment == "batch" else ["fixed"])]
    folder = Path(args.out) / args.experiment
    words = module("eval.mmspec", *ckpts, *more, "--out", str(folder), *said)
    given = [Path(folder) for role, folder in heads.items() if not _to_train(args, role)]
    weights = (folder / name for folder in given for name in ("head.safetensors", CONTROLLER))
    reads = tuple(path for path in weights if path.is_file())
    steps.append(Step(f"score {args.experiment}", words, folder / "summary.json", before, None, ("--resume",), reads))
    if args.experiment == "text_only":
        pair = [word for role in ROLES["text_only"] for word in ("--ckpt", heads[role])]
        out = Path(args.out) / "dependence"
        words = module("eval.dependence", *pair, "--out", str(out), *said)
        steps.append(Step("dependence", words, out / "dependence.json", before, reads=reads))
    return steps


def batches(args: argparse.Namespace) -> list[int]:
    """Ascending, each once."""
    return sorted(set(args.batch_size or BATCHES[args.experiment]))


def scored(args: argparse.Namespace, heads: Mapping[str, str]) -> dict[str, str]:
    """Run folders by role as they are scored: the seeing head's with its controller."""
    if not _steered(args, heads):
        return dict(heads)
    return {**heads, findings_batch.SEEING: str(Path(args.out) / findings_batch.SEEING)}


def _to_train(args: argparse.Namespace, role: str) -> bool:
    return not any(pair.startswith(f"{role}=") for pair in args.heads)


def _steered(args: argparse.Namespace, heads: Mapping[str, str]) -> bool:
    """Whether a controller is to be trained for the seeing head of the batch experiment."""
    asked = args.experiment == "batch" and not set(TRAINED).isdisjoint(args.policies)
    return asked and not (Path(heads[findings_batch.SEEING]) / CONTROLLER).is_file()


def _tree(args: argparse.Namespace) -> tuple[int, int, int]:
    tree = parse_tree(args.tree)
    return tree.depth, tree.width, tree.budget


def _recipe(args: argparse.Namespace, kind: str) -> Path:
    path = ROOT / "recipes" / f"{kind}_{args.suffix}.yaml"
    if not path.is_file():
        raise InputError(f"there is no recipes/{path.name} to train by; give --heads, or another --kind or --suffix")
    return path


def _data(args: argparse.Namespace) -> list[str]:
    answers = args.answers or Path(args.out) / "answers"
    return [f"data.sources=[{{path: '{args.train}', limit: {args.limit}}}]", f"data.answers_dir={answers}"]


def _twin(args: argparse.Namespace) -> Step:
    """The training data without their pictures."""
    recipe, made = _recipe(args, args.kind), Path(args.out) / "text_only.jsonl"
    said = (str(recipe), *_data(args), *one_budget(args), *args.set, "run.name=twin", "--out", str(made))
    return Step("twin", (sys.executable, str(ROOT / "scripts/text_twin.py"), *said), made, reads=(recipe,))


def _training(args: argparse.Namespace, role: str) -> Step:
    """A head of the budget, for its role."""
    recipe, name = _recipe(args, args.kind), f"{args.kind}{TRAINED_AS[role]}"
    own, after = _data(args), tuple[str, ...]()
    if role == findings_text_only.TEXT:
        own, after = [f"data.train={Path(args.out) / 'text_only.jsonl'}", "data.answers=given"], ("twin",)
    if role == findings_batch.BLIND:
        own = [*own, "head.blind=true"]
    words = launched(
        args.procs, "train/distill.py", str(recipe), *own, *one_budget(args), *args.set, f"run.name={name}"
    )
    makes, limit_s = Path(args.out) / name / "head.safetensors", args.minutes * 60
    return Step(f"train {name}", words, makes, after, limit_s, ("run.resume=true",), (recipe,))


def _controller(args: argparse.Namespace, head: str) -> Step:
    """The seeing head once more, with a controller for the tree of the experiment."""
    recipe, name = _recipe(args, f"viskip_only_{args.kind}"), findings_batch.SEEING
    depth, width, budget = _tree(args)
    draft = [f"policy.depth={depth}", f"policy.width={width}", f"policy.budget={budget}"]
    own = [f"policy.controller.depth={depth}", f"head.init_from={head}", f"run.name={name}"]
    shared = [f"run.out={args.out}", f"run.seed={args.seed}", "run.trackers=[]"]
    words = (sys.executable, str(ROOT / "train/distill.py"), str(recipe), *_data(args), *shared, *draft, *own)
    makes = Path(args.out) / name / CONTROLLER
    after = (f"train {args.kind}",) if _to_train(args, findings_batch.SEEING) else ()
    said = (*words, *(word for word in args.set if word.startswith("data.")), *args.controller_set)
    return Step("controller", said, makes, after, None, ("run.resume=true",), (recipe,))


def answer(args: argparse.Namespace, heads: Mapping[str, str]) -> Found:
    """What the scores come to."""
    folder = Path(args.out) / args.experiment
    run = Run.of(folder)
    if args.experiment == "text_only":
        dependence = read_json(Path(args.out) / "dependence" / "dependence.json")
        return findings_text_only.found(run, heads, dependence, args.seed)
    if args.experiment == "batch":
        return findings_batch.found(run, scored(args, heads), args.policies, args.seed)
    return findings_latency.found(run, args.seed)


def write(args: argparse.Namespace, found: Found) -> str:
    """JSON, Markdown and plots; returns the paragraph for RESULTS.md."""
    results, name, summary = Path(args.results), args.experiment, found.run.summary
    results.mkdir(parents=True, exist_ok=True)
    how = {"settings": options(args, ("heads", "answers")), "run": summary["settings"]}
    facts = {"commit": checkpoint.git_commit(), "hardware": summary["hardware"], "versions": summary["versions"]}
    checkpoint.write_json(results / f"{name}.json", {**as_json(found), **how, **facts})
    for part, drawn in found.charts.items():
        write_text(results / f"{name}{part}.svg", drawn)
    text = as_markdown(found)
    write_text(results / f"{name}.md", text)
    said = " ".join(map(checkpoint.discreet, args.said))
    return (
        f"## {date.today()} · {TITLES[name]}\n\n"
        f"`python -m {PROGRAM} {said}`, commit {facts['commit']}, {hardware_line(summary['hardware'])}; "
        f"{summary['n_requests']} requests of {checkpoint.discreet(args.data)}, tree {args.tree}.\n\n{text}"
    )


@command(PROGRAM, interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    said = list(sys.argv[1:] if argv is None else argv)
    args = _parse(said)
    heads = heads_of(args)
    steps = plan(args, heads)
    for recipe in dict.fromkeys(step.reads[0] for step in steps if step.name.startswith("train ")):
        load(recipe, [*_data(args), *one_budget(args), *args.set, "run.name=trial"])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    ledger = Ledger(Path(args.out))
    for step in steps:
        perform(step, ledger)
    print(write(args, answer(args, heads)))


def _parse(said: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("experiment", choices=tuple(ROLES), help="which finding")
    add("--heads", nargs="+", default=[], metavar="NAME=DIR", help="trained heads: multimodal and text_only (further "
        "ones stand in the table); seeing and blind; of latency any, the first decides")  # fmt: skip
    add("--answers", metavar="DIR", help="answers of a run on the same questions (default: made once)")
    add("--kind", default="eagle", help="of head to train (default: %(default)s)")
    add("--suffix", default="tiny", metavar="TARGET", help="of the recipes: <kind>_TARGET.yaml (default: tiny)")
    add("--out", default="runs/findings", metavar="DIR", help="run folders and evaluations (default: %(default)s)")
    add("--results", default="recipes/results/findings", metavar="DIR", help="(default: %(default)s)")
    add("--train", default="synth:train", metavar="DATA", help="training questions (default: %(default)s)")
    add("--limit", type=int, default=3200, metavar="N", help="of them (default: %(default)s)")
    add("--steps", type=int, default=1200, metavar="N", help="optimizer steps of each head (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="conversations a step (default: %(default)s)")
    add("--minutes", type=float, default=20, metavar="M", help="of training for each head (default: %(default)s)")
    add("--procs", type=int, default=1, metavar="N", help="processes that train (default: %(default)s)")
    add("--tree", default="10,1,10", metavar="D,W,N", help="of all heads (default: %(default)s)")
    add("--policies", nargs="+", default=["fixed", "attention", "viskip"], choices=(*FREE, *TRAINED), metavar="NAME",
        help="of batch (default: fixed attention viskip)")  # fmt: skip
    add(
        "--methods", nargs="*", default=["sam", "recycling"], metavar="NAME", help="of latency (default: sam recycling)"
    )
    add("--batch-size", type=int, nargs="+", metavar="N", help="requests decoded together; each divides the largest "
        f"(default: batch {' '.join(map(str, BATCHES['batch']))}, latency {' '.join(map(str, BATCHES['latency']))}, "
        "text_only 1)")  # fmt: skip
    add("--data", default="synth:test", metavar="DATA", help="what is reported on (default: %(default)s)")
    add("--data-limit", type=int, metavar="N", help="records of it, taken in turn from the topics (default: "
        f"{', '.join(f'{name} {n}' for name, n in RECORDS.items())})")  # fmt: skip
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="to decode with (default: %(default)s)")
    add("--seed", type=int, default=0, help="of training and bootstrap (default: 0)")
    add("--set", nargs="+", default=[], metavar="key=value", help="recipe keys to change, for all heads")
    add("--controller-set", nargs="+", default=[], metavar="key=value", help="for the controller, beside data.*")
    args = parser.parse_args(said)
    at_least(args, limit=1, steps=1, batch=1, procs=1, data_limit=1, max_new_tokens=1, batch_size=1)
    _check(args)
    args.said = said
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises InputError where options do not go together."""
    if bad := [pair for pair in args.heads if "=" not in pair]:
        raise InputError(f"--heads takes NAME=DIR, not {bad[0]}")
    if args.batch % args.procs:
        raise InputError(f"--batch {args.batch} must be a multiple of --procs {args.procs}")
    if not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, got {args.minutes:g}")
    if unknown := [name for name in args.methods if name not in method_names()]:
        raise InputError(f"--methods {unknown[0]} is unknown; there are: {', '.join(method_names())}")
    sizes = batches(args)
    if odd := [size for size in sizes if max(sizes) % size]:
        raise InputError(f"--batch-size {odd[0]} does not divide {max(sizes)}: groups could not be compared")
    if args.experiment == "batch" and (len(sizes) < 2 or "fixed" not in args.policies):
        raise InputError("batch needs two values of --batch-size at least, and fixed among --policies")
    if args.experiment == "latency" and sizes[0] != 1:
        raise InputError(f"latency compares single requests first; add 1 to --batch-size {' '.join(map(str, sizes))}")
    if args.experiment == "text_only" and len(sizes) != 1:
        raise InputError("text_only takes one --batch-size")
    _tree(args)


if __name__ == "__main__":
    sys.exit(main())
