"""Where the replies of a finished conversation stand, in its text and in its tokens, as the chat template itself says.

A reply begins where the render of the messages before it, with the generation prompt, ends: what follows there is what
a target writes when it decodes. It ends with its stop token, or where the template shows none, with its last word. What
stands around the replies is seen by rendering the conversation once more with a mark in place of each. So nothing is
known here of any family, no `generation` tags are needed, and a template may trim or change what it is given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
"""Messages to text; True: with the generation prompt behind them."""
Tokenize = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
"""Text to ids and the characters [start, stop) that each was made of, which may leave out white space around it."""


@dataclass(frozen=True)
class Reply:
    """Characters `start` to `stop` (excluded): all that the target writes in one turn.

    Args:
        message: 1-based place in the conversation, for errors.
    """

    message: int
    start: int
    stop: int


def locate(messages: Messages, render: Render, stops: Sequence[str], name: str) -> tuple[str, list[Reply]]:
    """The text of a finished conversation and its replies.

    Args:
        messages: chat messages; replies are those of the role `assistant`.
        render: the chat template.
        stops: the target's stop tokens as text, its own end of sequence first.
        name: of the target, for errors.

    Returns:
        The text as rendered. Where a reply ends the conversation and the template shows no stop token behind it, the
        text ends there with the first of `stops`, as the target itself would end it. Behind earlier replies of such a
        template none is added: the target does not read one there when it decodes either.

    Raises:
        ValueError: a reply cannot be located exactly, or holds a stop token.
    """

    def fault(index: int, what: str) -> ValueError:
        return ValueError(
            f"the chat template of {name} {what} at message {index + 1}: its answer cannot be located in the tokens"
        )

    text = render(messages, False)
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    frames = _frames(messages, places, render, text)
    if len(frames) != len(places) + 1:
        raise fault(_unshown(messages, places, render), "does not show the reply once")
    starts, at, edge = list[int](), list[int](), 0
    for frame, index in zip(frames, places):
        before = render(messages[:index], True)
        if not text.startswith(before):
            raise fault(index, "does not extend its own prefix")
        # A frame may go on behind the generation prompt, by a space for instance, which then is the target's to write.
        at.append(text.find(frame, max(edge, len(before) - len(frame))))
        if at[-1] < 0 or at[0] > 0:
            raise fault(index, "does not surround all replies alike")
        starts.append(len(before))
        edge = at[-1] + len(frame)
    at.append(len(text) - len(frames[-1]))
    if at[-1] < edge or not text.endswith(frames[-1]):
        raise fault(len(messages) - 1, "does not surround all replies alike")
    replies = [Reply(index + 1, start, stop) for index, start, stop in zip(places, starts, at[1:])]
    return _closed(text, replies, stops, bool(places) and places[-1] == len(messages) - 1)


def _frames(messages: Messages, places: Sequence[int], render: Render, text: str) -> list[str]:
    """What the template puts before, between and behind the replies, whatever they say."""
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    return render(_marked(messages, places, mark), False).split(mark)


def _marked(messages: Messages, places: Sequence[int], mark: str) -> Messages:
    """The conversation with a mark for each reply, in the form that the reply has."""
    out = [dict(message) for message in messages]
    for index in places:
        whole = isinstance(messages[index]["content"], str)
        out[index]["content"] = mark if whole else [{"type": "text", "text": mark}]
    return out


def _unshown(messages: Messages, places: Sequence[int], render: Render) -> int:
    """The first reply that its template does not show exactly once."""
    for number, index in enumerate(places, start=1):
        shown = [place for place in places if place <= index]
        if len(_frames(messages[: index + 1], shown, render, render(messages, False))) != number + 1:
            return index
    return places[-1]


def _closed(text: str, replies: list[Reply], stops: Sequence[str], ends: bool) -> tuple[str, list[Reply]]:
    """Takes each reply's stop token in, and adds that of the last one where it `ends` the conversation without any."""
    out = []
    for reply in replies:
        if held := next((stop for stop in stops if stop in text[reply.start : reply.stop]), None):
            raise ValueError(f"the answer in message {reply.message} holds the stop token {held}")
        rest = text[reply.stop :].lstrip()
        stop = next((stop for stop in stops if rest.startswith(stop)), "")
        out.append(replace(reply, stop=len(text) - len(rest) + len(stop)) if stop else reply)
    if ends and stops and out[-1].stop == replies[-1].stop:
        text = text[: out[-1].stop] + stops[0]
        out[-1] = replace(out[-1], stop=len(text))
    return text, out


def mark(text: str, replies: Sequence[Reply], tokenize: Tokenize, name: str) -> tuple[Tensor, Tensor]:
    """The tokens of a text and the number of the reply that each belongs to.

    Args:
        text, replies: from `locate`.
        name: of the target, for errors.

    Returns:
        ids [L] int64, as `tokenize` gives them, and [L] int64: 0 outside replies, else 1-based.

    Raises:
        ValueError: a reply begins or ends within a token, so that the target would have read or written other ones.
    """
    ids, spans = tokenize(text)
    starts = [start for start, _ in spans]
    numbers = torch.zeros(len(ids), dtype=torch.long)
    for number, reply in enumerate(replies, start=1):
        first, last = (_cut(text[:place], ids, starts, spans, tokenize) for place in (reply.start, reply.stop))
        if first is None or last is None:
            edge = "begins" if first is None else "ends"
            raise ValueError(f"the answer in message {reply.message} {edge} within a token of {name}")
        numbers[first:last] = number
    return torch.tensor(ids, dtype=torch.long), numbers


def _cut(
    before: str, ids: list[int], starts: Sequence[int], spans: Sequence[tuple[int, int]], tokenize: Tokenize
) -> int | None:
    """How many tokens a text's beginning is, if its own tokens are the first ones of the text; else None."""
    place = len(before)
    n = bisect_left(starts, place)
    # One token ends here and the next one begins here: merging never crossed this place, so a text that ends here has
    # the same tokens. Where white space is in no token's span, or the tokenizer has no spans, it must be tried.
    if n and spans[n - 1][1] == place and (n == len(spans) or starts[n] == place):
        return n
    alone = tokenize(before)[0]
    return len(alone) if alone == ids[: len(alone)] else None
