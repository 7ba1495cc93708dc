"""Measures whether a training set takes memory by its size, and how far its loader is ahead of training.

    python scripts/bench_data.py --json OUT

A LLaVA-style JSONL of --records synthetic conversations over --pictures pictures is written to a temporary folder, and
its first --fewer records beside it. Each is read in a process of its own, which then draws --batches batches of it in
training's order and makes them ready as training does: decode the record, open the picture, tokenise, mark the answers.
What is printed and written (the names are the JSON keys):

  memory_growth_mb         resident memory of the process with all records, less that with the fewer: Python's and
                           Arrow's own. Wanted: nothing to speak of
  bytes_per_record         the same for each record more
  mapped_growth_mb         pages of the file on disk that the system keeps for the process as long as it has no other
                           use for them; it counts them as resident too
  read_records_per_s       records/s of the first reading: split, decode, check, and note what is usable
  reread_records_per_s     of a second one, which finds the rows on disk
  loader_records_per_s     records/s of one thread making batches ready
  training_records_per_s   records/s that training takes of them: the target's pass, forward and backward pass of its
                           EAGLE head, AdamW; the answers are the file's
  loader_vs_training       the former / the latter, medians of repeats that take turns. Wanted: 5 and more
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import add_common, check, environment, interleaved, publish, ratio, timed
from _sides import optimised
from torch import Tensor
from tqdm import tqdm

from mmspec import checkpoint as checkpoints
from mmspec.arguments import Parser, command
from mmspec.heads.eagle import Config
from mmspec.recipe import Recipe, load
from mmspec.records import Quarantine
from mmspec.synth import sample
from mmspec.targets import load_target
from mmspec.types import InputError, Target
from train.answers import Prepared
from train.clock import StepClock
from train.corpus import Corpus, read
from train.session import Session, State
from train.sources import Live, LiveBatch, Loader
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import World

RECIPE = Path(__file__).parents[1] / "recipes" / "viskip_tiny.yaml"
SIDE = "--side"


def write(path: Path, n: int, n_pictures: int) -> None:
    """A JSONL of `n` synthetic conversations, their pictures once each, and their answers as training keeps them."""
    folder = path.parent / "images"
    folder.mkdir(exist_ok=True)
    talks = []
    for number in tqdm(range(n_pictures), desc="pictures", disable=not sys.stderr.isatty()):
        one = sample("train", number)
        one.image.save(folder / f"{number}.png")
        said = []
        for question, answer in zip(one.turns, one.answers):
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        talks.append({"image": f"{number}.png", "conversations": said, "topic": one.topic})
    with path.open("w", encoding="utf-8") as file, answers_of(path).open("w", encoding="utf-8") as answers:
        for number in range(n):
            talk = talks[number % n_pictures]
            file.write(json.dumps({"id": f"record-{number}", **talk}) + "\n")
            said = [entry["value"] for entry in talk["conversations"][1::2]]
            # Lengths are in characters: they only say which conversations are alike.
            known = {"index": number, "answers": said, "finished": [True] * len(said), "length": len(" ".join(said))}
            answers.write(json.dumps(known) + "\n")


def answers_of(path: Path) -> Path:
    """The file of a data file's answers."""
    return path.with_suffix(".answers")


# ---- in a process of its own ----


def run_side(settings: Mapping[str, Any]) -> None:
    """Reads one file, draws batches, and prints what that took as a line of JSON."""
    torch.set_num_threads(settings["threads"])
    recipe = load(RECIPE, [f"data.train={settings['file']}", "data.answers=given", "run.name=bench_data"])
    target = load_target(settings["target"], settings["dtype"], settings["device"])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        corpus = read(recipe.data.sources, Quarantine(None))
        seconds.append(time.perf_counter() - start)
    prepared = Prepared([answers_of(Path(settings["file"]))], len(corpus))
    run = session(recipe, target, corpus, prepared)
    source = Live(run, ())
    with Loader(run, source, StepClock(target.device)) as loader:
        for step in range(settings["batches"]):
            source.batch(drawn(loader, step, settings["batch"]))
    found = {"resident": status("RssAnon"), "mapped": status("RssFile"), "read_s": seconds}
    if settings["repeats"]:
        found |= rates(source, loader, target, settings)
    print(json.dumps(found))


def drawn(loader: Loader, step: int, size: int) -> Sequence[int]:
    """The samples of a batch."""
    return [loader.usable[position] for position in loader.order.batch(step, size)]


def session(recipe: Recipe, target: Target, corpus: Corpus, prepared: Prepared) -> Session:
    """What a loader needs of a run."""
    world, quarantine = World(0, 1, target.device, None), Quarantine(None)
    tracker = Tracker(Path(), "bench_data", {}, active=False, record=False, resume_id=None)
    state = State("head", 1, None, None, {})
    return Session(recipe, world, Stopper(), tracker, state, target, corpus, prepared, quarantine)


def rates(source: Live, loader: Loader, target: Target, settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of batches made ready, and of training steps on such batches."""
    torch.manual_seed(0)
    config = Config().resolve(target.shape)
    head = checkpoints.build_head("eagle", config, source.session.recipe.loss).to(target.device)
    ready: list[LiveBatch] = []

    def loss() -> Tensor:
        objective = head(ready[-1].features(), target.unembed)
        return objective.loss / objective.count

    step = optimised(list(head.parameters()), loss)
    numbers = iter(range(settings["batches"], 1 << 30))

    def load_one() -> float:
        picked = drawn(loader, next(numbers), settings["batch"])
        ready.clear()
        return timed(target.device, lambda: ready.append(source.batch(picked)))

    loading, training = interleaved([load_one, lambda: timed(target.device, step)], settings["repeats"])
    return {"loading_s": loading, "training_s": training}


def status(name: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- the comparison ----


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, from files in a folder."""
    sides = {}
    for n, repeats in ((args.fewer, 0), (args.records, args.repeats)):
        path = folder / f"{n}.jsonl"
        write(path, n, args.pictures)
        settings = {"file": str(path), "repeats": repeats}
        settings |= {key: getattr(args, key) for key in ("target", "dtype", "device", "threads", "batch", "batches")}
        sides[n] = ask(settings, folder / "cache")
    few, all_ = sides[args.fewer], sides[args.records]
    growth = all_["resident"] - few["resident"]
    loading, training = all_["loading_s"], all_["training_s"]
    return {
        "memory_growth_mb": growth / 1e6,
        "bytes_per_record": growth / (args.records - args.fewer),
        "mapped_growth_mb": (all_["mapped"] - few["mapped"]) / 1e6,
        "read_records_per_s": args.records / all_["read_s"][0],
        "reread_records_per_s": args.records / all_["read_s"][1],
        "loader_records_per_s": args.batch / sorted(loading)[len(loading) // 2],
        "training_records_per_s": args.batch / sorted(training)[len(training) // 2],
        "loader_vs_training": ratio(training, loading),
        "resident_mb": {str(n): side["resident"] / 1e6 for n, side in sides.items()},
    }


def ask(settings: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """What a process of this file says of one data file.

    Raises:
        RuntimeError: it ended without a word.
    """
    command = [sys.executable, __file__, SIDE, json.dumps(settings)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "MMSPEC_CACHE": str(cache)}
    )
    if done.returncode or not done.stdout:
        raise RuntimeError(f"the reading process ended with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: a number makes no sense.
    """
    parser = Parser(description=__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--records", type=int, default=100_000, help="in the large file (default %(default)s)")
    add("--fewer", type=int, default=10_000, help="in the small one (default %(default)s)")
    add("--pictures", type=int, default=500, help="that the records share (default %(default)s)")
    add("--batch", type=int, default=16, help="conversations in a batch (default %(default)s)")
    add("--batches", type=int, default=200, help="drawn before memory is read off (default %(default)s)")
    add("--repeats", type=int, default=9, help="batches made ready and trained on, in turns (default %(default)s)")
    args = parser.parse_args(argv)
    check(args, "records", "fewer", "pictures", "batch", "batches", "repeats")
    if args.fewer >= args.records:
        raise InputError(f"--fewer must be less than --records={args.records}, got {args.fewer}")
    return args


@command("bench_data")
def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == [SIDE]:
        run_side(json.loads(words[1]))
        return
    args = arguments(words)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    names = ("records", "fewer", "pictures", "batch", "batches", "repeats")
    figures["settings"] = environment(args) | {name: getattr(args, name) for name in names}
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
