"""The list of training samples that a benchmark holds too, and training without them.

Invariant: a list belongs to one corpus, by digest, and names its samples by their place there. It is made once
(scripts/decontaminate.py, which searches as `train.overlap` says); a recipe names it as `data.decontaminated`, and from
then on training leaves those samples out, or refuses to start: without the list, or with one of another corpus.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmspec.checkpoint import write_json
from mmspec.recipe import Data
from mmspec.records import Quarantine
from mmspec.types import InputError
from train.corpus import Corpus, read

VERSION = 1


@dataclass(frozen=True)
class Removed:
    """A sample to leave out.

    Args:
        index: its place in the corpus.
        source, line, id: of its record, for whoever wants to look.
        rule: by which it was found, of `train.overlap.RULES`.
        of: the benchmark's record.
        bits: in which the pictures differ; None where the rule compares none.
        words: of the question that differ; None where the rule compares none.
    """

    index: int
    source: str
    line: int
    id: str
    rule: str
    of: str
    bits: int | None = None
    words: int | None = None


@dataclass(frozen=True)
class Listing:
    """A list, and what it was made from.

    Args:
        corpus: digest of the corpus.
        n_samples: of the corpus.
        benchmark: folder or synthetic split.
        benchmark_digest: of its records and pictures; for whoever asks later, nothing compares it.
        rules: what each rule says.
        removed: samples to leave out, by index.
        n_unreadable: pictures that could not be decoded: training quarantines their samples.
        n_flat: pictures of a single colour, which are not compared.
    """

    corpus: str
    n_samples: int
    benchmark: str
    benchmark_digest: str
    rules: Mapping[str, str]
    removed: Sequence[Removed]
    n_unreadable: int = 0
    n_flat: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """Samples to leave out, by source and rule."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in self.removed:
            out[entry.source][entry.rule] += 1
        return {source: dict(rules) for source, rules in out.items()}


def save(path: Path, listing: Listing) -> None:
    """Writes a list, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    removed = [{key: value for key, value in asdict(entry).items() if value is not None} for entry in listing.removed]
    head = {item.name: getattr(listing, item.name) for item in fields(listing)}
    write_json(path, {"version": VERSION, **head, "counts": listing.counts(), "removed": removed})


def load(path: Path) -> Listing:
    """Reads a list.

    Raises:
        InputError: it is missing or damaged; says how to make it.
    """
    check(path)
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("version") != VERSION:
            raise ValueError("it is of another version")
        del entries["counts"]
        entries["removed"] = [Removed(**entry) for entry in entries["removed"]]
        listing = Listing(**entries)
        if any(not 0 <= entry.index < listing.n_samples for entry in listing.removed):
            raise ValueError("it names a sample that there is not")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"data.decontaminated={path} cannot be read ({' '.join(str(error).split())}); make it again with "
            f"`{command('FOLDER')}`"
        ) from error
    return listing


def check(path: Path) -> None:
    """What can be known before any work starts.

    Raises:
        InputError: there is no list.
    """
    if not path.is_file():
        raise InputError(
            f"data.decontaminated={path} does not exist; make it with `{command('FOLDER')}` (FOLDER: the benchmark in "
            "MMSpec's layout), or train on whatever the data hold with data.decontaminated=null"
        )


def read_clean(data: Data, quarantine: Quarantine) -> Corpus:
    """Reads a recipe's sources, and leaves out what its list names.

    Raises:
        InputError: as `train.corpus.read` and `apply` do; or more records are unusable than `data.max_bad_share`
            allows.
    """
    corpus = read(data.sources, quarantine)
    quarantine.check(corpus.n_read, data.max_bad_share)
    return apply(corpus, Path(data.decontaminated)) if data.decontaminated else corpus


def apply(corpus: Corpus, path: Path) -> Corpus:
    """A corpus without the samples of a list; if there are any, its digest is another one.

    Raises:
        InputError: the list is missing, damaged, or of another corpus, or leaves nothing.
    """
    listing = load(path)
    if (listing.corpus, listing.n_samples) != (corpus.digest, len(corpus)):
        raise InputError(
            f"data.decontaminated={path} was made for other data (digest {listing.corpus}, not {corpus.digest})"
            f"{corpus.gone}; make it again with `{command(listing.benchmark)}`"
        )
    out = {entry.index: entry.rule for entry in listing.removed}
    if not out:
        return corpus
    kept = [index for index in range(len(corpus)) if index not in out]
    if not kept:
        raise InputError(f"data.decontaminated={path} leaves none of {len(corpus)} samples to train on; add other data")
    digest = hashlib.sha256(json.dumps([corpus.digest, sorted(out)]).encode()).hexdigest()[:16]
    return replace(
        corpus,
        samples=corpus.samples.pick(kept),
        weights=corpus.weights[kept],
        digest=digest,
        removed=dict(Counter(out.values()).most_common()),
    )


def command(benchmark: str) -> str:
    """The command that makes a list for the recipe, and the overrides of its data, of the command that is running."""
    said = [word for word in sys.argv[1:] if not word.startswith("-")]
    recipe = next((word for word in said if word.endswith((".yaml", ".yml"))), "RECIPE")
    data = [word for word in said if word.startswith("data.") and "=" in word]
    return shlex.join(["python", "scripts/decontaminate.py", recipe, *data, "--benchmark", benchmark])
