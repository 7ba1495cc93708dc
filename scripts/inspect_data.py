"""Writes a page of a recipe's training samples as the model sees them: pictures, template, tokens, what is learned.

    python scripts/inspect_data.py recipes/viskip_tiny.yaml
    python scripts/inspect_data.py recipes/viskip_llava7b.yaml data.train=my.json --out page.html --samples 40

One self-contained HTML file. It works before the questions are answered (prompts are shown) and after; and it says how
long the conversations are, how many there are of each source and topic, where the answers come from, why records were
quarantined, and what decontamination left out. The target is loaded for its processor and to find its answers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from mmspec.arguments import Parser, add_recipe, at_least, command  # noqa: E402
from mmspec.recipe import Recipe, load  # noqa: E402
from mmspec.records import Quarantine  # noqa: E402
from mmspec.targets import load_target  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train import decontaminate, showing  # noqa: E402
from train.answers import read as read_answers  # noqa: E402
from train.asking import instructed  # noqa: E402
from train.corpus import read  # noqa: E402
from train.distill import writing  # noqa: E402
from train.regenerate import answers_folder  # noqa: E402


@command("inspect_data", wrong=(InputError, OSError))
def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = _parse(argv)
    recipe = load(arguments.recipe, arguments.overrides)
    out = arguments.out or recipe.folder / "data.html"
    found = inspect(recipe)
    with writing(out):
        showing.write(out, found, arguments.samples)
    print("data: " + ", ".join(f"{n} {name}" for name, n, _ in showing.figures(found)))
    for note in found.notes:
        print(f"note: {note}")
    print(f"page: {out}")


def inspect(recipe: Recipe) -> showing.Inspected:
    """Reads what a page shows.

    Raises:
        InputError: the data or the target cannot be read. That a list or answers are missing is a note of the page.
    """
    notes: list[str] = []
    quarantine = Quarantine(None)
    everything = read(recipe.data.sources, quarantine)
    corpus, listing = everything, None
    if recipe.data.decontaminated:
        try:
            corpus = decontaminate.apply(everything, Path(recipe.data.decontaminated))
            listing = decontaminate.load(Path(recipe.data.decontaminated))
        except InputError as error:
            notes.append(str(error))
    else:
        notes.append("the recipe names no data.decontaminated: nothing was compared with a benchmark")
    corpus = instructed(corpus, recipe.data)
    target = load_target(recipe.target.name, recipe.target.dtype)
    folder = answers_folder(recipe, corpus, target)
    prepared = read_answers(folder, len(corpus))
    if not prepared.complete:
        n = len(prepared.usable)
        notes.append(
            f"{n} of {len(corpus)} samples have their answers in {folder}; scripts/regenerate.py makes the others"
        )
    return showing.Inspected(recipe, everything, corpus, prepared, target, quarantine.reasons(), listing, notes)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="scripts/inspect_data.py", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: data.html in the run folder)")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="samples to show (default %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    at_least(arguments, samples=0)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
