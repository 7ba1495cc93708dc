"""How finished conversations are laid into the rows of a teacher pass: one each, or several behind one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmspec.types import Prompt


@dataclass(frozen=True)
class Place:
    """Where one conversation stands: tokens `start` to `stop` (excluded) of row `row`."""

    row: int
    start: int
    stop: int

    @property
    def at(self) -> tuple[int, slice]:
        """As an index into [B, T, ...]."""
        return self.row, slice(self.start, self.stop)


def lay_out(lengths: Sequence[int], width: int) -> list[Place]:
    """A place for each conversation, in their order.

    Args:
        lengths: in tokens.
        width: tokens of a row, 0: one conversation a row. One that is longer has a row of its own.
    """
    places, filled = [Place(row, 0, n) for row, n in enumerate(lengths)], list[int]()
    if not width:
        return places
    # The longest first, each where it still fits: within a few percent of the best at these sizes.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[index]
        row = next((row for row, used in enumerate(filled) if used + n <= width), len(filled))
        filled += [0] * (row == len(filled))
        places[index] = Place(row, filled[row], filled[row] + n)
        filled[row] += n
    return places


@dataclass(frozen=True)
class Rows:
    """A padded batch on the device; see Features for the tensors."""

    input_ids: Tensor
    answer: Tensor
    visual: Tensor
    segment: Tensor


def fill(prompts: Sequence[Prompt], answers: Sequence[Tensor], places: Sequence[Place], device: torch.device) -> Rows:
    """The tensors of conversations at their places; what no place covers is padding, on whichever side that is."""
    shape = 1 + max(place.row for place in places), max(place.stop for place in places)
    ids, answer, segment = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    visual = torch.zeros(shape, dtype=torch.bool)
    numbers = [0] * shape[0]
    for place, prompt, marks in sorted(zip(places, prompts, answers), key=lambda item: item[0].start):
        numbers[place.row] += 1
        ids[place.at], answer[place.at], visual[place.at] = prompt.input_ids, marks, prompt.visual
        segment[place.at] = numbers[place.row]
    return Rows(*(x.to(device) for x in (ids, answer, visual, segment)))


def spread(values: Sequence[Tensor], places: Sequence[Place], segment: Tensor) -> Tensor:
    """Values [L] of each conversation at its place: [B, T] fp32 where `segment` is, 0 at padding."""
    out = torch.zeros(segment.shape, dtype=torch.float32)
    for place, value in zip(places, values, strict=True):
        out[place.at] = value
    return out.to(segment.device)
