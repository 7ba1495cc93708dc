"""From a data folder to the groups of requests that every method decodes.

Invariant: the prompt of a request depends on the records, the target and plain decoding's answers only, never on the
method that is being measured. Later turns of a conversation therefore come after their earlier turns were decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmspec.records import Quarantine, Record, RecordError, open_image, read_mmspec
from mmspec.types import InputError, Request, Target

MMSPEC_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""The system text of MMSpec's own runs, the same for all its targets."""

SYNTH_SPLITS = ("testmini", "test", "val")


@dataclass(frozen=True)
class Task:
    """One turn of one record, ready to decode.

    Args:
        record: where it comes from.
        turn: 1-based.
        request: its encoded prompt; `request.key` follows from id and turn, so that noise depends on neither order.
    """

    record: Record
    turn: int
    request: Request


def data_folder(data: str) -> Path:
    """The folder behind `--data`: a synthetic split is made when first asked for.

    Raises:
        InputError: an unknown synthetic split.
    """
    if not data.startswith("synth:"):
        return Path(data)
    split = data.removeprefix("synth:")
    if split not in SYNTH_SPLITS:
        raise InputError(f"unknown data {data!r}; use synth:{', synth:'.join(SYNTH_SPLITS)} or a folder")
    # Only here: a real data folder must not pay for importing the renderer.
    from mmspec import synth

    return Path(synth.materialise(split))


def balanced(records: Sequence[Record], limit: int | None) -> list[Record]:
    """The first `limit` records taken round-robin over topics, in file order; all without a limit."""
    if limit is None or limit >= len(records):
        return list(records)
    by_topic: dict[str, list[Record]] = {}
    for record in records:
        by_topic.setdefault(record.topic, []).append(record)
    longest = max(len(members) for members in by_topic.values())
    rounds = [members[n] for n in range(longest) for members in by_topic.values() if n < len(members)]
    return sorted(rounds[:limit], key=lambda record: record.line)


def load_records(folder: Path, limit: int | None, quarantine: Quarantine, max_bad_share: float) -> list[Record]:
    """Read, select and check records, decoding every image once, before any model time is spent.

    Args:
        folder: in MMSpec's layout.
        limit: see `balanced`.
        quarantine: receives what is unusable.
        max_bad_share: see `Quarantine.check`.

    Returns:
        Records whose image opens.

    Raises:
        InputError: nothing usable, or more than `max_bad_share` of it unusable.
    """
    readable = read_mmspec(folder, quarantine)
    n_unreadable = quarantine.count
    chosen = balanced(readable, limit)
    good = []
    for record in chosen:
        try:
            if record.image is not None:
                open_image(record.image)
            good.append(record)
        except RecordError as error:
            quarantine.add(folder / "mmspec.jsonl", record.line, record.id, str(error))
    if not good:
        reason = next(iter(quarantine.reasons()))
        raise InputError(f"no usable record in {folder}: {len(chosen)} of {len(chosen)} quarantined, first: {reason}")
    quarantine.check(len(chosen) + n_unreadable, max_bad_share)
    return good


class Dialogues:
    """Turns records into requests, group by group, feeding plain decoding's answers back as history.

    Args:
        target: encodes and bounds the prompts.
        records: checked ones.
        system: system text, "" for none.
        max_new_tokens: of every request.
        quarantine: receives records whose prompt the target cannot take; their later turns are dropped with them.
    """

    def __init__(
        self, target: Target, records: Sequence[Record], system: str, max_new_tokens: int, quarantine: Quarantine
    ) -> None:
        self.target = target
        self.records = records
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.quarantine = quarantine
        self._answers: dict[str, list[str]] = {record.id: [] for record in records}
        self._dropped: set[str] = set()

    @property
    def n_turns(self) -> int:
        """Requests there are, less those dropped so far."""
        return sum(len(record.turns) for record in self.records if record.id not in self._dropped)

    def groups(self, size: int) -> Iterator[list[Task]]:
        """Fixed groups of up to `size` requests, topic by topic and within a topic turn by turn.

        A group never mixes topics (so that a topic has its own seconds at batch > 1) nor two turns of one record (the
        later needs the earlier's answer: call `answer` for every task before asking for the next group).
        """
        for topic in dict.fromkeys(record.topic for record in self.records):
            members = [record for record in self.records if record.topic == topic]
            for turn in range(1, max(len(record.turns) for record in members) + 1):
                group: list[Task] = []
                for record in members:
                    if turn > len(record.turns) or record.id in self._dropped:
                        continue
                    task = self._task(record, turn)
                    group += [task] if task is not None else []
                    if len(group) == size:
                        yield group
                        group = []
                if group:
                    yield group

    def warmup(self, n: int) -> list[Task]:
        """First turns of up to `n` records that differ in topic as far as there are topics. Quarantines nothing."""
        first = {record.topic: record for record in reversed(self.records)}
        chosen = list(first.values())[-n:] + list(self.records)[:n]
        tasks = []
        for record in chosen[:n]:
            try:
                tasks.append(self._encode(record, 1))
            except RecordError:
                continue
        return tasks

    def answer(self, task: Task, text: str) -> None:
        """Plain decoding's answer to `task`: the history of the record's next turn."""
        answers = self._answers[task.record.id]
        assert len(answers) == task.turn - 1, "turns are answered in order"
        answers.append(text.strip())

    def messages(self, record: Record, turn: int) -> list[dict[str, Any]]:
        """The conversation up to `turn` (1-based), as Hugging Face chat messages; the image is in the first turn."""
        messages = [_message("system", self.system)] if self.system else []
        for number in range(turn):
            messages.append(_message("user", record.turns[number], with_image=number == 0 and record.image is not None))
            if number < turn - 1:
                messages.append(_message("assistant", self._answers[record.id][number]))
        return messages

    def _task(self, record: Record, turn: int) -> Task | None:
        """The encoded turn, or None after quarantining its record."""
        try:
            return self._encode(record, turn)
        except RecordError as error:
            self._dropped.add(record.id)
            self.quarantine.add("mmspec.jsonl", record.line, record.id, str(error))
            return None

    def _encode(self, record: Record, turn: int) -> Task:
        """Encode one turn. Raises RecordError when the image or the prompt cannot be used."""
        images = [open_image(record.image)] if record.image is not None else []
        try:
            prompt = self.target.encode(self.messages(record, turn), images)
        except ValueError as error:
            raise RecordError(f"the target cannot encode it: turn {turn}, {str(error)[:200]}") from None
        if len(prompt) + 1 > self.target.max_length:
            raise RecordError(
                f"prompt longer than the context: turn {turn} has {len(prompt)} tokens, and with one new token they "
                f"must fit into {self.target.max_length}"
            )
        key = zlib.crc32(f"{record.id}/{turn}".encode())
        return Task(record, turn, Request(f"{record.id}/{turn}", prompt, self.max_new_tokens, key))


def _message(role: str, text: str, with_image: bool = False) -> dict[str, Any]:
    """One chat message with a content list."""
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}
