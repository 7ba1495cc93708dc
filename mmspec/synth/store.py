"""Writes a split as a folder in MMSpec's layout, once, and finds it again."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from mmspec.synth.corpus import CORPUS_VERSION, SPLITS, Sample, sample

_PROGRESS_ABOVE = 500


def cache_folder() -> Path:
    """Where what can be made again is kept: the environment's MMSPEC_CACHE, else ~/.cache/mmspec."""
    return Path(os.environ.get("MMSPEC_CACHE") or Path.home() / ".cache" / "mmspec")


def materialise(split: str, limit: int | None = None, root: str | Path | None = None) -> Path:
    """A folder with the first `limit` samples of a split; made on the first call, found on the next.

    It holds `images/*.png`, `mmspec.jsonl` (MMSpec's records), `llava.json` (LLaVA's conversations with the templates'
    answers) and `facts.json` (id to facts). The folder appears under its name only when it is complete: an
    interrupted call leaves nothing that a later call would trust, and two processes may race.

    Args:
        split: "train", "val", "test" or "testmini".
        limit: Number of samples from the start of the split; None for all.
        root: Where the cache is; by default `cache_folder()`.

    Returns:
        The folder.

    Raises:
        ValueError: If the split is unknown or the limit is below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but at least 1 sample is needed (None means all)")
    number = SPLITS[split] if limit is None else min(limit, SPLITS[split])
    base = cache_folder() if root is None else Path(root)
    folder = base / f"synth-v{CORPUS_VERSION}-{split}-{number}"
    if folder.is_dir():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=base))
    try:
        _write(split, number, scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write(split: str, number: int, folder: Path) -> None:
    """All files of a split; samples are made one at a time, so memory does not grow with images."""
    (folder / "images").mkdir()
    records, conversations, facts = [], [], {}
    for index in tqdm(range(number), desc=f"synth:{split}", unit="image", disable=number <= _PROGRESS_ABOVE):
        one = sample(split, index)
        name = f"{one.id}.png"
        one.image.save(folder / "images" / name)
        records.append(_mmspec_record(one, name))
        conversations.append(_llava_record(one, name))
        facts[one.id] = [asdict(fact) for fact in one.facts]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "mmspec.jsonl").write_text(lines, encoding="utf-8")
    (folder / "llava.json").write_text(json.dumps(conversations, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _mmspec_record(one: Sample, image: str) -> dict[str, object]:
    return {
        "id": one.id,
        "image": image,
        "turns": list(one.turns),
        "category": one.category,
        "topic": one.topic,
    }


def _llava_record(one: Sample, image: str) -> dict[str, object]:
    conversations = []
    for turn, (question, answer) in enumerate(zip(one.turns, one.answers, strict=True)):
        conversations.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": one.id, "image": image, "conversations": conversations, "topic": one.topic}
