"""The command line of `eval.mmspec`: its options, its examples, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse
import math

from eval import wandb_log
from eval.tasks import HISTORIES
from mmspec.api import FREE, METHOD_POLICIES, SHAPED, STATIC, TRAINED, find_device
from mmspec.arguments import Parser, add_bad_share, as_temperature, as_top_p, at_least
from mmspec.assets import EMBEDDED
from mmspec.methods import method_names
from mmspec.types import InputError

PROGRAM = "eval.mmspec"
ALL = "all"
DTYPES = ("float32", "bfloat16", "float16", "float64")

EXAMPLES = """\
examples
  a quick look at a freshly trained head, 60 synthetic records:
    python -m eval.mmspec --ckpt runs/viskip_tiny
  the numbers to report (tune on synth:val, report on synth:test):
    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:test
  MMSpec's own records (a folder with mmspec.jsonl and images/), 4 at a time, 64 tokens each:
    python -m eval.mmspec --ckpt runs/viskip_tiny --data data/mmspec/testmini --batch-size 4 --max-new-tokens 64
  a sweep: every batch size with every temperature, each with a baseline of its own:
    python -m eval.mmspec --ckpt runs/viskip_tiny --batch-size 1 4 --temperature 0 1
  interrupted? the same command goes on, to the same answers:
    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:test --resume
  several GPUs share the records:
    torchrun --nproc_per_node 8 -m eval.mmspec --ckpt runs/viskip_llava7b --data data/mmspec/test
  sampling: the text equals plain decoding's token for token at the same seed:
    python -m eval.mmspec --ckpt runs/viskip_tiny --temperature 1.0 --seed 7
  methods that need no training, on the embedded target or on any other one:
    python -m eval.mmspec --method all
    python -m eval.mmspec --method pld sam --target llava-hf/llava-1.5-7b-hf --data data/mmspec/testmini
  several heads beside one baseline, each with its own tree:
    python -m eval.mmspec --ckpt runs/eagle_tiny --ckpt runs/medusa_tiny --tree 7 2 10 --tree 4 4 16
  the same beside a head, and in front of it (hybrid), with settings of your own:
    python -m eval.mmspec --ckpt runs/viskip_tiny --method all --method-settings recipes/methods/training_free.yaml

what is compared
  plain     the target alone, one token a step, in the same loop
  <method>  each training-free method of --method: {methods}; by default with the node budget that has
            paid best so far on this machine (--method-budget fixed: all nodes, as in the papers)
  hybrid    a method that copies where its match is long, else the head with its fixed tree
  <head>    a checkpoint's head with its fixed draft tree (skipped with --policies viskip), called by its kind, among
            several of one kind by its run folder
  viskip    the same head, steered by the checkpoint's controller, when it has one (<head>_viskip where several have)
  The figures at the top of summary.json and of the report are those of the last one in the table: of the last
  checkpoint's where there is one, else of the last one after --method.
  Every method decodes the same prompts, one directly after another in alternating order. Later turns of a
  conversation see plain decoding's earlier answers, so no method is measured on prompts of its own (--history).

what is written to --out
  summary.json      figures overall and by topic, with their definitions, the settings, versions and hardware; the
                    first cell of a sweep at the top, all of them under cells
  requests.jsonl    one line per request and method: tokens, times, every round
  run.json          what a run that goes on must have in common with this one; method_costs/: what it measured
  report.html       the same to look at; one file, no network; samples.json: the answers it shows. With what
                    eval.dependence wrote to a folder `dependence` beside it: python -m eval.report makes it again
  tables.md         the tables by cell and topic; tables.csv: one row for each cell, method and topic, with all figures
  quarantine.jsonl  records that could not be used, with the reason; only when there are any
"""


def add_records(parser: argparse.ArgumentParser, data: str, limit: int | None = None, tokens: int = 256) -> None:
    """Options of a command that decodes records: which, and how much of them.

    Args:
        parser: gets the options.
        data, limit, tokens: defaults.
    """
    add = parser.add_argument
    add(
        "--data",
        default=data,
        metavar="DATA",
        help="synth:testmini (60 records), synth:test (600), synth:val (200), a folder in MMSpec's layout, or "
        "hub:ORG/NAME, a dataset in that layout (default: %(default)s)",
    )
    usual = "all" if limit is None else limit
    add("--limit", type=int, default=limit, metavar="N", help=f"records, in turn from the topics (default: {usual})")
    add("--max-new-tokens", type=int, default=tokens, metavar="N", help="per request (default: %(default)s)")
    add_bad_share(parser)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Options of a command that decodes: with what, and where."""
    add = parser.add_argument
    add("--target", metavar="NAME", help=f"to decode with (default: the checkpoint's, without one {EMBEDDED})")
    add("--dtype", choices=DTYPES, default="float32", help="of target and heads (default: float32)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description="Scores a draft head and training-free methods: MAT, speedup over plain decoding, latency, and "
        "whether the text is the same.",
        epilog=EXAMPLES.format(methods=", ".join(method_names())),
    )
    add = parser.add_argument
    add(
        "--ckpt",
        action="append",
        default=[],
        metavar="DIR",
        help="run folder, or hub:org/name[@revision]; again for each further head; not needed with --method",
    )
    add(
        "--method",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{', '.join(method_names())}, hybrid (with --ckpt: one with each head; HEAD_hybrid: with that one), "
        "all, or plain: once more, for what the clock alone makes of equal work",
    )
    add(
        "--method-budget",
        choices=METHOD_POLICIES,
        default="adaptive",
        help="nodes a method drafts: what pays on this machine by measured costs (adaptive, default), always all it "
        "has (fixed), or what another file of mmspec/policies says",
    )
    add(
        "--method-settings",
        metavar="FILE",
        help="YAML with settings of methods (default: those of recipes/methods/training_free.yaml, which has them all)",
    )
    add_records(parser, "synth:testmini")
    add("--out", metavar="DIR", help="where the results go (default: CKPT/eval, or runs/eval-NAMES)")
    add_target(parser)
    add("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="requests decoded together (default: 1)")
    add("--temperature", type=as_temperature, nargs="+", default=[0.0], metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K best tokens; 0 is off (default)")
    add(
        "--top-p", type=as_top_p, default=1.0, metavar="P", help="sample in the best P of probability (default: 1, off)"
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="logits of tokens seen before are divided (negative: multiplied) by R (default: 1, off)",
    )
    add(
        "--no-repeat-ngram",
        type=int,
        default=0,
        metavar="N",
        help="no N tokens in a row occur twice, prompt included; 0 is off (default)",
    )
    add("--seed", type=int, default=0, help="of the sampling noise and of the bootstrap (default: 0)")
    add(
        "--verifier",
        choices=("match", "rejection"),
        default="match",
        help="match gives plain decoding's text (default); rejection, for sampling only, its distribution",
    )
    add(
        "--draft-widths",
        type=int,
        nargs="+",
        metavar="N",
        help="candidates drawn at a node of each level, 1 beyond (default with --verifier rejection: 1, a chain)",
    )
    add(
        "--tree",
        type=int,
        nargs=3,
        action="append",
        default=[],
        metavar=("DEPTH", "WIDTH", "NODES"),
        help="of the heads' drafts; again for each further --ckpt, in its order (default: the checkpoint's tree.json)",
    )
    add("--share-noise", action="store_true", help="the head chooses its candidates with the sampling noise in view")
    add(
        "--policies",
        nargs="+",
        choices=(*FREE, *STATIC, *TRAINED),
        help="what steers the head: fixed is its tree.json, static the tree that scripts/fit_tree.py fitted or a "
        "published one by its name, viskip its controller, the others are the files of mmspec/policies (default: "
        "fixed, and viskip if the checkpoint has a controller)",
    )
    add(
        "--system",
        metavar="TEXT",
        help=f"system text (default: MMSpec's own, none for {EMBEDDED}, which never saw one)",
    )
    add(
        "--history",
        choices=HISTORIES,
        default="fixed",
        help="what later turns of a conversation see: plain decoding's answers (fixed, default), so that all decode "
        "the same prompts, or each method's own (self)",
    )
    add(
        "--pixels",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="least and most pixels of an image, for targets of any size (default: MMSpec's for Qwen2.5-VL, else the "
        "target's own)",
    )
    add(
        "--wandb",
        nargs="?",
        const="",
        metavar="PROJECT",
        help="log figures, tables and report to Weights & Biases (default project: WANDB_PROJECT, or mmspec); offline, "
        "into --out, unless you are logged in",
    )
    add("--resume", action="store_true", help="go on with what the same command left in --out when it was interrupted")
    add(
        "--frozen",
        action="store_true",
        help="policies forget after each group of requests, so that rounds too are those of any other order",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError, naming the option, its value and what is allowed."""
    at_least(args, batch_size=1, max_new_tokens=1, limit=1, top_k=0, no_repeat_ngram=0, seed=0)
    args.batch_size, args.temperature = list(dict.fromkeys(args.batch_size)), list(dict.fromkeys(args.temperature))
    if not (math.isfinite(args.repetition_penalty) and args.repetition_penalty > 0):
        raise InputError(f"--repetition-penalty must be a positive number (1 is off), got {args.repetition_penalty}")
    for tree in args.tree:
        if min(tree) < 1 or not args.ckpt:
            raise InputError(f"--tree needs --ckpt and numbers of at least 1, got {' '.join(map(str, tree))}")
    if len(args.tree) not in (0, 1, len(args.ckpt)):
        raise InputError(f"--tree is given once, or once for each --ckpt; got {len(args.tree)} for {len(args.ckpt)}")
    if args.verifier == "rejection" and 0 in args.temperature:
        raise InputError("--verifier rejection needs a --temperature above 0: greedy decoding has nothing to reject")
    if args.share_noise and (0 in args.temperature or args.verifier == "rejection"):
        raise InputError("--share-noise needs a --temperature above 0 and --verifier match")
    if args.draft_widths and (args.verifier != "rejection" or min(args.draft_widths) < 1):
        raise InputError("--draft-widths needs --verifier rejection and numbers of at least 1")
    if args.verifier == "rejection" and (shaped := sorted(set(SHAPED) & set(args.policies or ()))):
        raise InputError(f"--verifier rejection needs drawn candidates; those of --policies {shaped[0]} are chosen")
    if args.pixels and not 0 < args.pixels[0] <= args.pixels[1]:
        raise InputError(f"--pixels must be above 0 and in order, got {args.pixels[0]} {args.pixels[1]}")
    if args.wandb is not None:
        wandb_log.check()
    args.device = find_device(args.device)
