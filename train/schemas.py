"""From a record to a sample: the layouts that conversations are published in, recognised record by record.

Invariant: whatever JSON or Arrow can hold either becomes a sample or raises RecordError with a reason of one line,
whose kind stands before a colon. No file is opened here, and a missing one is no error.

    llava      {"conversations": [{"from": "human" | "gpt" | "system", "value": text}, ..]}
    sharegpt   the same without pictures
    messages   {"messages": [{"role": "user" | "assistant" | "system", "content": text or parts}, ..]}, a part being
               {"type": "text", "text": text} or {"type": "image"}; it may hold its picture as `image`, `path` or `url`

Pictures are in `image` or `images`: one or a list of file names, bytes, or {"bytes", "path"}. Each `<image>` in a text
and each image part is the mark of one; where there are none, all stand in front of the first turn. `id`, `topic` and
`category` are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmspec.records import RecordError
from train.sample import IMAGE_MARK, Picture, Sample, tail

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
WEB = ("http://", "https://", "data:")


@dataclass
class Said:
    """One entry of a conversation.

    Args:
        role: user, assistant or system.
        text: with `<image>` where a picture stands.
        own: for each mark the picture that its part holds, None: the next of the record's.
    """

    role: str
    text: str
    own: list[Any] = field(default_factory=list)


def parse(record: Any, file: Path, folder: Path, line: int, layout: str | None = None) -> Sample:
    """One record.

    Args:
        record: a decoded JSON value, or a row of a table.
        file, line: where it comes from.
        folder: what its pictures are named relative to.
        layout: one of `mmspec.recipe.FORMATS`; None: recognised.

    Raises:
        RecordError: it is unusable.
    """
    if not isinstance(record, dict):
        raise RecordError(f"record is no object: it is a {type(record).__name__}")
    said = _READERS[layout or _recognise(record)](record)
    opening = said.pop(0) if said[0].role == "system" else None
    _check(said, opening is not None)
    if any(entry.own for entry in [*said[1::2], *([opening] if opening else [])]):
        raise RecordError("a mark of a picture stands outside the user's turns")
    values = record.get("images") if record.get("images") is not None else record.get("image")
    pictures = _pictures(values, [own for entry in said for own in entry.own], folder, line)
    if layout == "sharegpt" and pictures:
        raise RecordError("a sharegpt record has a picture: data.sources.format=llava reads it")
    turns = [entry.text.strip() for entry in said[::2]]
    if not any(entry.own for entry in said):
        turns[0] = f"{IMAGE_MARK}\n" * len(pictures) + turns[0]
    answers = tuple(entry.text.strip() for entry in said[1::2])
    name = record_id(record) or str(line)
    topic, system = topic_of(record), opening.text.strip() or None if opening else None
    for what, text in (("id", name), ("topic", topic)):
        _check_unicode(text, f"{what} is not valid Unicode")
    return Sample(name, pictures, tuple(turns), answers, file, line, topic, system)


def record_id(record: Any) -> str:
    """The id of a record, "" where it has none."""
    value = record.get("id", "") if isinstance(record, dict) else ""
    return str(value) if isinstance(value, str | int) else ""


def topic_of(record: Any) -> str:
    """The topic of a record, else its category, else ""."""
    named = (record.get("topic"), record.get("category")) if isinstance(record, dict) else ()
    return next((name.strip() for name in named if isinstance(name, str) and name.strip()), "")


def _recognise(record: dict[str, Any]) -> str:
    if record.get("messages") is not None:
        return "messages"
    if record.get("conversations") is not None:
        return "llava"
    raise RecordError("record has no conversation: neither conversations nor messages")


def _conversations(record: dict[str, Any]) -> list[Said]:
    """The `conversations` of LLaVA and ShareGPT."""
    said = []
    for number, entry in _entries(record, "conversations"):
        role, text = _role(entry.get("from"), number), _text(entry.get("value"), number)
        said.append(Said(role, text, [None] * text.count(IMAGE_MARK)))
    return said


def _messages(record: dict[str, Any]) -> list[Said]:
    """The `messages` of chat templates, whose content is text or a list of parts."""
    said = []
    for number, entry in _entries(record, "messages"):
        role, content = _role(entry.get("role"), number), entry.get("content")
        texts, own = [], []
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                texts.append(_text(part.get("text"), number))
                own += [None] * texts[-1].count(IMAGE_MARK)
            elif kind == "image":
                texts.append(IMAGE_MARK)
                own.append(next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None))
            else:
                raise RecordError(f"content is neither text nor image: a part of entry {number} is {kind!r}")
        said.append(Said(role, "".join(texts), own))
    return said


_READERS: dict[str, Callable[[dict[str, Any]], list[Said]]] = {
    "llava": _conversations,
    "sharegpt": _conversations,
    "messages": _messages,
}


def _entries(record: dict[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries of a conversation, numbered from 1."""
    entries = record.get(key)
    if not isinstance(entries, list) or not entries:
        raise RecordError(
            f"empty conversation: {key} is {'an empty list' if entries == [] else type(entries).__name__}"
        )
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise RecordError(f"conversation has an entry that is no object: entry {number} is {type(entry).__name__}")
        yield number, entry


def _role(speaker: Any, number: int) -> str:
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or (role == "system" and number > 1):
        raise RecordError(f"conversation does not alternate human and gpt: entry {number} is from {speaker!r}")
    return role


def _text(value: Any, number: int) -> str:
    if not isinstance(value, str):
        raise RecordError(f"non-string text in the conversation: entry {number} is {type(value).__name__}")
    _check_unicode(value, f"text is not valid Unicode: entry {number}")
    return value


def _check(said: list[Said], behind_system: bool) -> None:
    """User and target alternate, and everybody says something."""
    if not said:
        raise RecordError("empty conversation: it has a system message only")
    for index, entry in enumerate(said):
        number = index + 1 + behind_system
        if entry.role != ("assistant" if index % 2 else "user"):
            raise RecordError(f"conversation does not alternate human and gpt: entry {number} is from {entry.role}")
        if not entry.text.replace(IMAGE_MARK, "").strip():
            raise RecordError(f"empty text in the conversation: entry {number}")


def _check_unicode(text: str, reason: str) -> None:
    # JSON can spell a lone surrogate; tokenizers and files cannot take one.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError(reason)


def _pictures(values: Any, marks: list[Any], folder: Path, line: int) -> tuple[Picture, ...]:
    """The pictures of a record in order of its marks.

    Args:
        values: of its `image` or `images` field.
        marks: for each mark the picture that it holds itself, or None.
    """
    named = list(values) if isinstance(values, list) else [] if values is None else [values]
    n_wanted = sum(own is None for own in marks)
    if marks and n_wanted != len(named):
        raise RecordError(f"marks are not as many as pictures: {n_wanted} <image> for {len(named)}")
    following = iter(named)
    in_order = [next(following) if own is None else own for own in marks] if marks else named
    return tuple(_picture(value, folder, f"{line}#{k}") for k, value in enumerate(in_order, start=1))


def _picture(value: Any, folder: Path, fallback: str) -> Picture:
    """One picture: a file name, bytes, or {"bytes", "path"}."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(value, bytes):
        data, name = value, None
    if isinstance(name, str):
        _check_unicode(name, "image name is not valid Unicode")
    if isinstance(data, bytes):
        return Picture((tail(Path(name)) if isinstance(name, str) else "") or fallback, data=data)
    if data is not None:
        raise RecordError(f"image has content that is no bytes: {type(data).__name__}")
    if not isinstance(name, str) or not name:
        raise RecordError(f"image is no file name: it is {'empty' if name == '' else type(name).__name__}")
    if name.startswith(WEB):
        raise RecordError(f"image is a web address: {name[:60]}; download it and name the file")
    return Picture(Path(name).name or name, _image_path(folder, name))


def _image_path(folder: Path, name: str) -> Path:
    """LLaVA's files name images relative to a folder beside them; which one differs between releases."""
    tried = [folder / name, folder / "images" / name, folder / "image" / name]
    try:
        return next((path for path in tried if path.is_file()), tried[0])
    except OSError:
        # Whether it can be read at all is seen by whoever opens it.
        return tried[0]
