"""From a data folder to the groups of requests that every method decodes.

Invariant: the prompt of a request depends on the records, the target and plain decoding's answers only, never on the
method that is being measured (unless histories are asked to be each method's own). Later turns of a conversation
therefore come after their earlier turns were decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmspec.assets import EMBEDDED
from mmspec.records import Quarantine, Record, RecordError, open_image, read_mmspec
from mmspec.types import InputError, Request, Target

MMSPEC_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""The system text of MMSpec's own runs, the same for all its targets."""

PLAIN = "plain"
HISTORIES = ("fixed", "self")
"""What later turns of a conversation see: plain decoding's answers, or each method's own."""

MMSPEC_PIXELS = {"qwen2_5_vl": (256 * 28 * 28, 1280 * 28 * 28)}
"""Least and most pixels in MMSpec's own runs, by target family; LLaVA's are its processor's."""

SYNTH_SPLITS = ("testmini", "test", "val")


@dataclass(frozen=True)
class Task:
    """One turn of one record, ready to decode.

    Args:
        record: where it comes from.
        turn: 1-based.
        request: its encoded prompt; `request.key` follows from id and turn, so that noise depends on neither order.
        own: requests of the methods whose own earlier answers differ from plain decoding's, where these are asked for.
    """

    record: Record
    turn: int
    request: Request
    own: Mapping[str, Request] = field(default_factory=dict)

    def asked(self, method: str) -> Request:
        """What a method is asked."""
        return self.own.get(method, self.request)


def data_folder(data: str) -> Path:
    """The folder behind `--data`: a synthetic split is made, a dataset of the Hub fetched when first asked for.

    Raises:
        InputError: an unknown synthetic split; a dataset that is neither there nor stored.
    """
    if data.startswith("hub:"):
        return _from_hub(data.removeprefix("hub:"))
    if not data.startswith("synth:"):
        return Path(data)
    split = data.removeprefix("synth:")
    if split not in SYNTH_SPLITS:
        raise InputError(f"unknown data {data!r}; use synth:{', synth:'.join(SYNTH_SPLITS)} or a folder")
    # Only here: a real data folder must not pay for importing the renderer.
    from mmspec import synth

    return Path(synth.materialise(split))


def data_name(data: str) -> str:
    """How results name `--data`: without this machine's folders."""
    return data if data.startswith(("synth:", "hub:")) else Path(data).name


def system_text(target: Target, given: str | None = None) -> str:
    """The system text of a run: as given, else MMSpec's own; none for the embedded target, which never saw one."""
    if given is not None:
        return given
    return "" if target.name == EMBEDDED else MMSPEC_SYSTEM


def _from_hub(name: str) -> Path:
    """A dataset repository, or a folder in it: ORG/NAME or ORG/NAME/FOLDER."""
    # Only here: what is local must not pay for the import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    org, _, rest = name.partition("/")
    repository, _, inner = rest.partition("/")
    try:
        within = [f"{inner}/**"] if inner else None
        folder = snapshot_download(f"{org}/{repository}", repo_type="dataset", allow_patterns=within)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--data hub:{name} cannot be fetched ({reason}); use hub:ORG/NAME, or a local folder"
        ) from None
    return Path(folder) / inner


def limit_pixels(target: Target, wanted: Sequence[int] | None) -> tuple[int, int] | None:
    """Bounds a target's images as asked, or as MMSpec does for its family; returns the bounds, None for its own.

    Raises:
        InputError: bounds are asked for, and the target has one size.
    """
    family = type(target).__module__.rpartition(".")[2]
    limits = (wanted[0], wanted[1]) if wanted else MMSPEC_PIXELS.get(family)
    if limits is not None:
        bounded: Any = target
        try:
            bounded.limit_pixels(*limits)
        except ValueError as error:
            raise InputError(f"--pixels: {error}") from None
    return limits


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
        quarantine: receives what is unusable, and the number of all.
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
    quarantine.n_read = len(chosen) + n_unreadable
    quarantine.check(quarantine.n_read, max_bad_share)
    return good


def image_of(record: Record) -> str:
    """What results call the image of a record: its file's name, or the record's id where it has none."""
    return record.image.name if record.image else record.id


def check_left_out(quarantine: Quarantine, max_bad_share: float) -> None:
    """Behind the decoding: prints how many records were left out, now also for prompts that the target cannot take.

    Args:
        quarantine: of `load_records` and `Dialogues`.
        max_bad_share: see `Quarantine.check`.

    Raises:
        InputError: see `Quarantine.check`.
    """
    quarantine.check(quarantine.n_read, max_bad_share)
    if quarantine.count:
        reason, times = next(iter(quarantine.reasons().items()))
        listed = f"; all are listed in {quarantine.path}" if quarantine.path else ""
        print(f"left out: {quarantine.count} of {quarantine.n_read} records, most often ({times}x): {reason}{listed}")


class Dialogues:
    """Turns records into requests, group by group, feeding answers back as history.

    Args:
        target: encodes and bounds the prompts.
        records: checked ones.
        system: system text, "" for none.
        max_new_tokens: of every request.
        quarantine: receives records whose prompt the target cannot take; their later turns are dropped with them.
        history: of `HISTORIES`.
        noted: ids of records that are in the quarantine already.
    """

    def __init__(
        self,
        target: Target,
        records: Sequence[Record],
        system: str,
        max_new_tokens: int,
        quarantine: Quarantine,
        history: str = "fixed",
        noted: set[str] | None = None,
    ) -> None:
        self.target = target
        self.records = records
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.quarantine = quarantine
        self.history = history
        self.noted = set() if noted is None else noted
        self._answers: dict[str, list[str]] = {record.id: [] for record in records}
        self._others: dict[str, dict[str, list[str]]] = {}
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

    def answer(self, task: Task, text: str, method: str = PLAIN) -> None:
        """Takes an answer: plain decoding's is the history of the next turn, a method's own too where asked for."""
        if method == PLAIN:
            answers = self._answers[task.record.id]
        elif self.history == "self":
            answers = self._others.setdefault(method, {}).setdefault(task.record.id, [])
        else:
            return
        assert len(answers) == task.turn - 1, "turns are answered in order"
        answers.append(text.strip())

    def messages(self, record: Record, turn: int, answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The conversation up to `turn` (1-based), as Hugging Face chat messages; the image is in the first turn.

        Args:
            answers: to the earlier turns; None: plain decoding's.
        """
        said = self._answers[record.id] if answers is None else answers
        messages = [_message("system", self.system)] if self.system else []
        for number in range(turn):
            messages.append(_message("user", record.turns[number], with_image=number == 0 and record.image is not None))
            if number < turn - 1:
                messages.append(_message("assistant", said[number]))
        return messages

    def _task(self, record: Record, turn: int) -> Task | None:
        """The encoded turn, or None after quarantining its record."""
        try:
            task = self._encode(record, turn)
            plain = self._answers[record.id]
            others = {name: mine.get(record.id, []) for name, mine in self._others.items()}
            own = {name: self._encode(record, turn, said).request for name, said in others.items() if said != plain}
            return replace(task, own=own)
        except RecordError as error:
            self._dropped.add(record.id)
            if record.id not in self.noted:
                self.noted.add(record.id)
                self.quarantine.add("mmspec.jsonl", record.line, record.id, str(error))
            return None

    def _encode(self, record: Record, turn: int, answers: Sequence[str] | None = None) -> Task:
        """Encode one turn. Raises RecordError when the image or the prompt cannot be used."""
        images = [open_image(record.image)] if record.image is not None else []
        try:
            prompt = self.target.encode(self.messages(record, turn, answers), images)
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
