"""Lists the training samples of a recipe that a benchmark holds too, so that training leaves them out.

    python scripts/decontaminate.py recipes/viskip_llava7b.yaml --benchmark MMSPEC_FOLDER
    python scripts/decontaminate.py recipes/viskip_tiny.yaml --benchmark synth:test --out runs/clean.json

A sample is found by a picture (the same one encoded anew, resized or slightly cropped; or with the same COCO, Visual
Genome or OpenImages id in its file name) or by a question, nearly or exactly. Short and common questions count only
together with a picture that looks alike. The list goes where the recipe's data.decontaminated says; training refuses to
start without it. The hashes of the pictures are kept beside it in <list>.hashes, so that an interrupted search goes on
and another benchmark is compared in a fraction of the time; that file may be deleted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmspec.arguments import Parser, add_recipe, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from mmspec.records import Quarantine  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train.corpus import read  # noqa: E402
from train.decontaminate import Listing, save  # noqa: E402
from train.distill import writing  # noqa: E402
from train.likeness import PrintCache  # noqa: E402
from train.overlap import Benchmark, default_threads, search  # noqa: E402

SHOWN = 5


@command("decontaminate", interrupted="the same command goes on", wrong=(InputError, OSError))
def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = _parse(argv)
    recipe = load(arguments.recipe, arguments.overrides)
    out = arguments.out or Path(recipe.data.decontaminated or "")
    if not out.name:
        raise InputError("the recipe names no data.decontaminated; say where the list goes with --out FILE")
    began = time.monotonic()
    benchmark = Benchmark(arguments.benchmark, _lines(arguments.ids))
    quarantine = Quarantine(None)
    corpus = read(recipe.data.sources, quarantine)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        cache = PrintCache(out.with_name(out.name + ".hashes"))
    try:
        listing = search(corpus, benchmark, cache, arguments.threads or default_threads())
    finally:
        with writing(out):
            cache.close()
    with writing(out):
        save(out, listing)
    _report(listing, benchmark, quarantine, out, time.monotonic() - began)


def _report(listing: Listing, benchmark: Benchmark, quarantine: Quarantine, out: Path, seconds: float) -> None:
    print(
        f"{len(listing.removed)} of {listing.n_samples} samples are in {listing.benchmark} too "
        f"({len(benchmark.pictured)} pictures; {seconds:.0f} s)"
    )
    for source, rules in listing.counts().items():
        print(f"  {source}: " + ", ".join(f"{times} by {rule}" for rule, times in rules.items()))
    for entry in listing.removed[:SHOWN]:
        near = f"{entry.bits} bits" if entry.bits is not None else f"{entry.words or 0} words differ"
        print(
            f"  line {entry.line} ({entry.id}): {entry.rule}, {entry.of}" + ("" if "id" in entry.rule else f", {near}")
        )
    if len(listing.removed) > SHOWN:
        print(f"  and {len(listing.removed) - SHOWN} more")
    for number, what in (
        (benchmark.unreadable.count, "records of the benchmark that cannot be read were not looked for"),
        (quarantine.count, "records of the corpus that cannot be read: training quarantines them"),
        (listing.n_unreadable, "pictures of the corpus that cannot be decoded: training quarantines them"),
        (listing.n_flat, "pictures of one colour, which are not compared"),
    ):
        if number:
            print(f"  {number} {what}")
    print(f"list: {out}")


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ids {path} cannot be read ({error})") from error


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/decontaminate.py",
        description=__doc__,
        epilog="exit codes: 0 a list, 2 wrong input, 130 interrupted (the same command goes on)",
    )
    add_recipe(parser)
    parser.add_argument(
        "--benchmark", required=True, metavar="FOLDER", help="mmspec.jsonl and images/, or a split as synth:test"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the list (default: the recipe's data.decontaminated)")
    parser.add_argument(
        "--ids", type=Path, metavar="FILE",
        help="more pictures of the benchmark, one a line: coco:NUMBER, vg:NUMBER, openimages:ID, or a file's path that "
        "carries such an id",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="that decode pictures (default: one a core)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.threads < 0:
        raise InputError(f"--threads must be at least 1, or 0 for one a core, got {arguments.threads}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
