"""What a corpus and a benchmark have in common: pictures, by their looks and their sources' ids of them, and questions.

Invariant: every sample that shares something is named once, with the rule that found it and how near it was. A whole
conversation is named, whichever of its turns or pictures was found. Pictures are decoded a few samples ahead, and what
is kept of one is its hash, so that memory hardly grows with the corpus.

Why: MMSpec's TextVQA items come from TextVQA's train split and its COCO pictures from val2014, which LLaVA's mixtures
contain (train2017 has most of val2014). It renames its pictures, so that their looks alone tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mmspec.records import Quarantine, Record, RecordError, read_mmspec
from mmspec.types import InputError
from train.corpus import SYNTHETIC, Corpus, Sample
from train.decontaminate import Listing, Removed
from train.likeness import BITS, Gallery, Print, PrintCache, cuts, squeeze
from train.questions import CHANGED, MIN_WORDS, QuestionIndex, occurs, words
from train.sample import tail

SAME_BITS = 32
"""Pictures that differ in no more bits are one. Measured: copies 26 at most, others 59 at least."""
ALIKE_BITS = 48
"""Up to here they are one if the benchmark's question is asked too."""
GENERIC_PICTURES = 10
"""A question that the corpus asks of more pictures belongs to none of them."""
_NEARLY = f"at most {CHANGED:.0%} of its words changed"
RULES = {
    "source id": "the picture's file carries the id that its collection gave to one of the benchmark's pictures",
    "picture": f"at most {SAME_BITS} of {BITS} bits of the perceptual hashes differ, at the closest cut",
    "picture and question": f"at most {ALIKE_BITS} bits differ, and a question about that picture is asked ({_NEARLY})",
    "question": f"a question of the benchmark is asked ({_NEARLY}) that has {MIN_WORDS} words or more, belongs to one "
    f"of the benchmark's pictures, and to at most {GENERIC_PICTURES} of the corpus",
}
"""In the order in which they are asked; the first that holds is the reason."""

_SOURCE_IDS = (
    ("coco", re.compile(r"COCO_(?:train|val|test)20\d\d_0*(\d+)[^/]*$", re.IGNORECASE)),
    ("coco", re.compile(r"(?<!\d)(?=\d{12}(?!\d))0*(\d+)[^/]*$")),
    ("vg", re.compile(r"(?:gqa|vg_100k(?:_2)?|vg|visual_?genome)[/_](?:images?/)?(n?\d+)(?!\w)[^/]*$", re.IGNORECASE)),
    ("openimages", re.compile(r"(?<![0-9a-z])([0-9a-f]{16})(?![0-9a-z])[^/]*$")),
)
"""COCO numbers of either naming, Visual Genome's (GQA has them too) and OpenImages' (TextVQA), all in the file's own
name: a folder's number is no picture's."""
_LISTED_ID = re.compile(r"coco:0*(\d+)|vg:n?\d+|openimages:[0-9a-f]{16}", re.IGNORECASE)


class Benchmark:
    """The records that must not be trained on.

    Args:
        name: the folder, or a synthetic split.
        ids: of its pictures besides what its own names tell: lines as `listed_id` reads them, or empty ones.

    Raises:
        InputError: it is no folder in MMSpec's layout, or none of its pictures can be read; or a line names no id.
    """

    def __init__(self, name: str, ids: Iterable[str] = ()) -> None:
        self.name, self.unreadable = name, Quarantine(None)
        records = read_mmspec(_folder(name), self.unreadable)
        self.digest, hashes = _hashes(records, self.unreadable)
        if not hashes and any(record.image is not None for record in records):
            raise InputError(f"--benchmark {name}: none of its pictures can be read; its folder needs images/ too")
        self.gallery = Gallery([pictures for _, pictures in hashes])
        self.pictured = [record for record, _ in hashes]
        self.ids = {listed_id(line, number): "--ids" for number, line in enumerate(ids, start=1) if line.strip()}
        pictures: dict[tuple[str, ...], set[str]] = defaultdict(set)
        self._owners: dict[tuple[str, ...], str] = {}
        for record in records:
            for turn in record.turns:
                pictures[words(turn)].add(record.image.name if record.image else "")
                self._owners.setdefault(words(turn), record.id)
            for text in (record.id, tail(record.image)):
                if (known := source_id(text)) is not None:
                    self.ids[known] = record.id
        self._questions = [question for question, those in pictures.items() if len(those) == 1]
        self._index = QuestionIndex(self._questions)

    def asked(self, text: str) -> list[tuple[str, str, int]]:
        """The specific questions that occur in a text: as words, the record that asks, and the edits between them."""
        found = ((" ".join(self._questions[number]), number, edits) for number, edits in self._index.find(words(text)))
        return [(question, self._owners[self._questions[number]], edits) for question, number, edits in found]


def source_id(name: str) -> str | None:
    """The id of a picture in the collection it comes from, by its file name or path.

    >>> source_id("coco/train2017/000000033471.jpg"), source_id("COCO_val2014_000000033471.jpg")
    ('coco:33471', 'coco:33471')
    >>> source_id("gqa/images/2354786.jpg"), source_id("vg/VG_100K_2/2354786.jpg"), source_id("2354786.jpg")
    ('vg:2354786', 'vg:2354786', None)
    """
    for kind, pattern in _SOURCE_IDS:
        if found := pattern.search(name):
            return f"{kind}:{found[1].lower()}"
    return None


def listed_id(line: str, number: int) -> str:
    """The id that a line of `--ids` names: as `source_id` gives it, or a file name or path that carries one.

    Raises:
        InputError: it names none.
    """
    said = line.strip()
    if named := _LISTED_ID.fullmatch(said):
        return f"coco:{named[1]}" if named[1] else said.lower()
    if (known := source_id(said)) is None:
        raise InputError(
            f"--ids, line {number}: {said[:60]!r} names no picture; give coco:NUMBER, vg:NUMBER, openimages:ID, or the "
            "path of a file of COCO, Visual Genome or OpenImages"
        )
    return known


def search(corpus: Corpus, benchmark: Benchmark, cache: PrintCache, threads: int = 1, quiet: bool = False) -> Listing:
    """Compares every sample of a corpus with a benchmark.

    Args:
        cache: of the pictures' hashes.
        threads: that decode pictures, a few samples ahead.
        quiet: without a progress bar.
    """
    by_picture: dict[int, Removed] = {}
    asked: dict[str, _Asked] = defaultdict(_Asked)
    problems: Counter[str] = Counter()
    with tqdm(total=len(corpus), desc="compare", unit="sample", dynamic_ncols=True, disable=quiet) as bar:
        for index, sample, prints, unusable in _ahead(corpus, cache, threads):
            problems += unusable
            entry = _by_picture(index, sample, prints, benchmark)
            if entry is not None:
                by_picture[index] = entry
            else:
                _note_questions(index, sample, benchmark, asked)
            bar.update()
    # Only now is known which questions the corpus asks of many pictures.
    specific = [one for one in asked.values() if len(one.pictures) <= GENERIC_PICTURES]
    by_question = {entry.index: entry for one in specific for entry in one.entries}
    found = by_question | by_picture
    return Listing(
        corpus=corpus.digest,
        n_samples=len(corpus),
        benchmark=benchmark.name,
        benchmark_digest=benchmark.digest,
        rules=RULES,
        removed=[found[index] for index in sorted(found)],
        n_unreadable=problems["unreadable"],
        n_flat=problems["flat"],
    )


@dataclass
class _Asked:
    """Who asks one of the benchmark's questions: samples, and as many of their pictures as it takes to be generic."""

    entries: list[Removed] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)


def _by_picture(index: int, sample: Sample, hashes: Sequence[Print], benchmark: Benchmark) -> Removed | None:
    """Whether one of a sample's pictures is the benchmark's."""
    place = (index, str(sample.file), sample.line, sample.id)
    for picture in sample.pictures:
        known = source_id(tail(picture.path) or picture.name)
        if known in benchmark.ids:
            return Removed(*place, "source id", benchmark.ids[known])
    said: list[tuple[str, ...]] = []
    for one in hashes:
        distances = benchmark.gallery.distances(one)
        for number in distances.argsort(kind="stable"):
            record, bits = benchmark.pictured[number], int(distances[number])
            if bits <= SAME_BITS:
                return Removed(*place, "picture", record.id, bits)
            if bits > ALIKE_BITS:
                break
            said = said or [words(turn) for turn in sample.turns]
            if any(occurs(words(turn), text) for turn in record.turns for text in said):
                return Removed(*place, "picture and question", record.id, bits)
    return None


def _note_questions(index: int, sample: Sample, benchmark: Benchmark, asked: dict[str, _Asked]) -> None:
    """Remembers which of the benchmark's questions a sample asks."""
    # Bytes are named within their source.
    pictures = {str(picture.path or f"{sample.file}#{picture.name}") for picture in sample.pictures} or {""}
    for turn in sample.turns:
        for question, owner, edits in benchmark.asked(turn):
            one = asked[question]
            if len(one.pictures) > GENERIC_PICTURES:
                one.entries.clear()
                continue
            one.pictures |= pictures
            one.entries.append(Removed(index, str(sample.file), sample.line, sample.id, "question", owner, words=edits))


def _ahead(corpus: Corpus, cache: PrintCache, threads: int) -> Iterator[tuple[int, Sample, list[Print], Counter[str]]]:
    """All samples in order, with the hashes of their pictures and what is wrong with the others."""
    waiting: deque[tuple[int, Sample, Future[tuple[list[Print], Counter[str]]]]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for index, sample in enumerate(corpus.samples):
            waiting.append((index, sample, pool.submit(_prints, sample, cache)))
            if len(waiting) > 8 * threads:
                number, one, future = waiting.popleft()
                yield number, one, *future.result()
        for number, one, future in waiting:
            yield number, one, *future.result()


def _prints(sample: Sample, cache: PrintCache) -> tuple[list[Print], Counter[str]]:
    prints: list[Print] = []
    problems: Counter[str] = Counter()
    for picture in sample.pictures:
        try:
            hashes = cache.own(picture.content())
        except (RecordError, OSError):
            problems["unreadable"] += 1
            continue
        if hashes is None:
            problems["flat"] += 1
        else:
            prints.append(hashes)
    return prints, problems


def _folder(name: str) -> Path:
    if not name.startswith(SYNTHETIC):
        return Path(name)
    from mmspec.synth import materialise

    try:
        return materialise(name.removeprefix(SYNTHETIC))
    except ValueError as error:
        raise InputError(f"--benchmark {name}: {error}") from error


def _hashes(records: Sequence[Record], unreadable: Quarantine) -> tuple[str, list[tuple[Record, Print]]]:
    """A digest of records and pictures, and the hashes of the pictures that have any."""
    digest, found = hashlib.sha256(), []
    for record in records:
        data = b""
        try:
            if record.image is not None:
                data = record.image.read_bytes()
                if (pixels := squeeze(data)) is not None:
                    found.append((record, cuts(pixels)))
        except (OSError, RecordError) as error:
            unreadable.add(record.image or "", record.line, record.id, f"image cannot be read: {error}")
        digest.update(json.dumps([record.id, record.turns, hashlib.sha256(data).hexdigest()]).encode())
    return digest.hexdigest()[:16], found


def default_threads() -> int:
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0))
