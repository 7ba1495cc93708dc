"""Measures everything that needs one GPU, in parts that resume: decoding, training, and heads of a middle-sized target.

    bash scripts/bench_gpu.sh                                  # again and again until it says that all is done
    bash scripts/bench_gpu.sh --parts decode --targets llava-1.5-7b --minutes 20
    bash scripts/bench_gpu.sh --device cpu --tiny              # whether it runs, on small shapes

Parts:

  decode   full-size LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights: roofline, costs of passes and drafts, CUDA
           graphs, transformers' `generate`, loop efficiency, speedup by acceptance (scripts/_gpu_decode.py)
  train    a few steps of their recipes: tokens/s, MFU, memory (scripts/_gpu_train.py)
  mid      a target of 460 M parameters is trained on the synthetic corpus, a head and its ViSkip controller are
           distilled from it and scored at batch 1 to 32

A call ends after --minutes, and the same command goes on: with the next step, or in the middle of a training. Results:
--out/*/*.json, figures.json, page.html, and a paragraph on the terminal.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu_page import DECODE, collect, page, paragraph
from _random_target import NAMES

from eval.steps import ROOT, Ledger, Step, perform
from mmspec import checkpoint
from mmspec.api import find_device
from mmspec.arguments import Parser, command
from mmspec.types import InputError

PARTS = ("decode", "train", "mid")
HEADS = ("eagle3", "medusa", "vispec")
SUFFIXES = {"llava-1.5-7b": "llava7b", "qwen2.5-vl-7b": "qwen2_5_vl_7b"}
"""Of their recipes."""
BATCHES = (1, 2, 4, 8, 16, 32)
NEEDED = {"train": ("datasets", "peft", "psutil"), "mid": ("datasets", "peft", "psutil")}
"""Packages that a part wants beside those of mmspec."""
GOES_ON = 75
"""Exit code of a call whose minutes are over."""
TINY_HEADS = {"eagle3": ["head.taps=[2,4,5]", "head.draft_vocab_size=0"]}
"""What has to change for a target of 8 layers and 1,024 tokens."""


class OutOfTime(BaseException):
    """The minutes of this call are over."""


def plan(args: argparse.Namespace) -> list[Step]:
    """All steps, in order."""
    steps: list[Step] = []
    for target in args.targets:
        if "decode" in args.parts:
            steps += [_decode(args, target, part) for part in DECODE]
        if "train" in args.parts:
            steps += [_train(args, target, kind) for kind in args.heads]
    return steps + (_mid(args) if "mid" in args.parts else [])


def _common(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device, *(["--tiny"] if args.tiny else [])]


def _script(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / name), *words)


def _decode(args: argparse.Namespace, target: str, part: str) -> Step:
    made = args.out / target / f"{part}.json"
    words = (part, "--target", target, "--json", str(made), *_common(args))
    return Step(f"{target} {part}", _script("scripts/_gpu_decode.py", *words), made)


def _train(args: argparse.Namespace, target: str, kind: str) -> Step:
    made, recipe = args.out / target / f"train_{kind}.json", ROOT / "recipes" / f"{kind}_{SUFFIXES[target]}.yaml"
    if not recipe.is_file():
        raise InputError(f"--heads {kind}: there is no {recipe.relative_to(ROOT)}")
    changes = ["--steps", "5", "--set", *TINY_HEADS.get(kind, [])] if args.tiny else []
    words = (str(recipe), "--target", target, "--json", str(made), *_common(args), *changes)
    return Step(f"{target} train {kind}", _script("scripts/_gpu_train.py", *words), made, reads=(recipe,))


def _mid(args: argparse.Namespace) -> list[Step]:
    """Target, head and controller, and what they are worth by batch."""
    folder, recipe = args.out / "mid", ROOT / "recipes" / "viskip_tiny.yaml"
    target, run = folder / "target", folder / "run"
    size = ["--size", "16", "1536", "4096", "12", "--batch-tokens", "14400", "--warmup-steps", "300", "--steps", "600"]
    changes = ["data.sources=[{path: 'synth:train', limit: 1600}]", "optim.lr=1e-3", "optim.micro_batch=16",
               "data.answer_batch=64", "target.dtype=bfloat16", "deepspeed.bf16=true", "run.eval_every=0"]  # fmt: skip
    scored = ["--data", "synth:test", "--limit", "64", "--max-new-tokens", "128", "--dtype", "bfloat16"]
    if args.tiny:
        size = ["--size", "4", "64", "128", "2", "--batch-tokens", "400", "--warmup-steps", "2", "--steps", "3"]
        size += ["--threads", "1"]
        changes = ["data.sources=[{path: 'synth:val', limit: 8}]", "data.max_new_tokens=12", "run.max_steps=2",
                   "data.drop=[]", "optim.micro_batch=2", "policy.rollouts=6", "policy.steps=2", "run.eval_every=0",
                   "run.eval_prompts=2", "run.eval_max_new_tokens=8"]  # fmt: skip
        scored = ["--data", "synth:testmini", "--limit", "6", "--max-new-tokens", "12"]
    words = [*size, "--lr", "4e-4", "--no-score", "--save-every", "50", "--device", args.device]
    words += ["--out", str(target), "--work", str(folder / "work")]
    building = _script("scripts/build_tiny_target.py", *words)
    changes += [f"target.name={target}", f"target.device={args.device}", f"run.out={folder}", "run.name=run"]
    changes += ["run.trackers=[]"]
    training = _script("train/distill.py", str(recipe), *changes)
    made = run / "viskip.safetensors"
    steps = [
        Step("mid target", building, target / "processor_config.json"),
        Step("mid head", training, made, ("mid target",), resume=("run.resume=true",), reads=(recipe,)),
    ]
    for batch in BATCHES[:2] if args.tiny else BATCHES:
        where = folder / f"batch_{batch}"
        said = [
            "--ckpt",
            str(run),
            "--target",
            str(target),
            "--batch-size",
            str(batch),
            "--policies",
            "fixed",
            "viskip",
            "--out",
            str(where),
        ]
        said += ["--device", args.device, *scored]
        evaluation = (sys.executable, "-m", "eval.mmspec", *said)
        steps.append(
            Step(f"mid batch {batch}", evaluation, where / "summary.json", ("mid head",), resume=("--resume",))
        )
    return steps


def write(args: argparse.Namespace) -> str:
    """Figures and page from what is there; returns the paragraph for RESULTS.md."""
    found = collect(args.out, NAMES)
    checkpoint.write_json(args.out / "figures.json", found)
    (args.out / "page.html").write_text(page(found), encoding="utf-8")
    said = ["bash scripts/bench_gpu.sh", *map(checkpoint.discreet, args.said)]
    return paragraph(found, " ".join(said))


@command("bench_gpu", interrupted="the same command goes on")
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 all is done, 75 the same command goes on, 2 wrong input."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    args.out.mkdir(parents=True, exist_ok=True)
    steps, code = plan(args), 0
    ledger = Ledger(args.out)
    signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, args.minutes * 60)
    try:
        for step in steps:
            perform(step, ledger)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except OutOfTime:
        code = GOES_ON
    print(write(args))
    if code:
        print(f"bench_gpu: {args.minutes:g} minutes are over; the same command goes on", file=sys.stderr)
    return code


def _over(*_: Any) -> None:
    raise OutOfTime


def _parse(said: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/bench_gpu.sh", description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these (default: all)")
    add("--targets", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="of full size (default: both)")
    add("--heads", nargs="+", default=list(HEADS), metavar="KIND", help=f"that train (default: {' '.join(HEADS)})")
    add("--out", type=Path, default=Path("runs/bench_gpu"), metavar="DIR", help="results (default: %(default)s)")
    add("--minutes", type=float, default=8.0, metavar="M", help="of a call; a training that is stopped then takes up "
        "to two more to save itself (default: 8)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--tiny", action="store_true", help="small shapes: whether it runs, not how fast")
    add("--here", action="store_true", help="read by bench_gpu.sh: no environment is made")
    args = parser.parse_args(said)
    if not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, got {args.minutes:g}")
    for part in args.parts:
        if missing := [name for name in NEEDED.get(part, ()) if importlib.util.find_spec(name) is None]:
            raise InputError(
                f"--parts {part} needs {', '.join(missing)}; pip install {' '.join(missing)}, or leave it out"
            )
    args.device = find_device(args.device)
    if args.device == "cpu" and not args.tiny:
        raise InputError("full shapes are for a GPU, and none is here; add --tiny to see whether it runs")
    args.out, args.said = args.out.resolve(), said
    return args


if __name__ == "__main__":
    sys.exit(main())
