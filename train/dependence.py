"""Visual dependence in training: measured once and stored, or in every step; and the loss weights made of it.

A prediction of a token with dependence c (KL in nats, `mmspec/dependence.py`) weighs

    (1 + w d) / (1 + w m),    d = min(c / s, CLIP)

where w is `loss.dependence`, s the mean of c and m that of d over the answer tokens of the training data. So d has a
mean of 1 but for what is clipped, and the weights have a mean of exactly 1 over the data: the learning rate means what
it meant, and since s and m are constants of the data, not of a batch, the loss is still divided by the number of
positions and is one sum however the batch is split. Where it is measured in every step, s and m are those of
`SAMPLED` conversations, evenly spaced: the order of a corpus is that of its sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmspec.dependence import (
    Dependence,
    answer_places,
    blurred,
    feature_sum,
    of_conversations,
    of_passes,
)
from mmspec.records import RecordError
from mmspec.types import Features, InputError, Prompt
from train.corpus import Picture, Sample
from train.encode import encode, length_limit, shown
from train.placement import uneven
from train.session import Session

CLIP = 8.0
"""Times the mean dependence that a weight takes notice of."""
IMAGES = 256
"""Conversations whose images the mean feature is taken of."""
SAMPLED = 64
"""Conversations that tell s and m where dependence is measured in every step."""


# ---- weights ----


@dataclass(frozen=True)
class Scale:
    """Constants of the data that weights are normalised by.

    Args:
        mean: s, of the dependence of all answer tokens, in nats.
        clipped: m, the mean of min(c / s, CLIP).
    """

    mean: float
    clipped: float

    @classmethod
    def of(cls, kl: Tensor) -> Scale:
        """From the dependence [N] of the answer tokens; of data whose answers owe nothing to images all weigh 1."""
        mean = float(kl.double().mean()) if len(kl) else 0.0
        return cls(mean, float((kl.double() / mean).clamp_max(CLIP).mean()) if mean > 0 else 0.0)

    def weights(self, kl: Tensor, w: float) -> Tensor:
        """The factor of each prediction of a token of that dependence; both of any shape, fp32."""
        share = (kl.float() / self.mean).clamp_max(CLIP) if self.mean > 0 else torch.zeros_like(kl, dtype=torch.float32)
        return (1 + w * share) / (1 + w * self.clipped)


class Measured:
    """Loss weights from a second pass of the target in every step, with the mean image feature for the image's.

    Args:
        session: with its answers. Every rank must make one, as the scale is measured by all together.

    Raises:
        InputError: there are images, and none can be read any more, or no answer that was looked at owes anything to
            one.
    """

    def __init__(self, session: Session) -> None:
        self._target, self._w = session.target, session.recipe.loss.dependence
        self._instead = image_mean(session)
        every = sorted(session.prepared.dialogues)
        n = min(len(every), SAMPLED)
        records = _readable(session, [every[k * len(every) // n] for k in range(n)], "the scale of dependence")
        found: list[Tensor] = []
        if self._instead is not None:
            # Every rank measures all of them: passes of a sharded target are every rank's.
            for _, parts in measured(session, records, 1, "mean", self._instead):
                found += [part.kl for part in parts]
        self._scale = Scale.of(torch.cat(found) if found else torch.zeros(0))
        if self._instead is not None and not self._scale.mean > 0:
            raise InputError(
                f"loss.dependence={self._w:g}: the answers of {len(records)} conversations owe nothing to their "
                "images; measure all with scripts/measure_dependence.py and set data.dependence, or set "
                "loss.dependence=0"
            )

    def weigh(self, features: Features, prompts: Sequence[Prompt], answers: Sequence[Tensor], pack: int) -> Features:
        """The batch with its weights; it was made of these conversations."""
        if self._instead is None:
            return features
        unseen = self._target.teacher(prompts, answers, pack=pack, instead=self._instead)
        kl = of_passes(features, unseen, self._target.unembed).kl
        weight = torch.ones(features.answer.shape, device=kl.device)
        weight[answer_places(features.answer)] = self._scale.weights(kl, self._w)
        return replace(features, weight=weight)


# ---- measuring ----


@dataclass(frozen=True)
class BlurredPicture(Picture):
    """A picture of a sample that opens blurred."""

    def open(self) -> Any:
        return blurred(super().open())


def image_mean(session: Session) -> Tensor | None:
    """The mean feature [W] fp32 of the images of the first `IMAGES` conversations with one; None: none has any.

    Every rank must call. Images that are lost since they were answered are left out.

    Raises:
        InputError: on every rank, where all of them are.
    """
    pictured = session.corpus.samples.pictured
    some = list(islice((k for k in sorted(session.prepared.dialogues) if pictured[k]), IMAGES))
    with_image = _readable(session, some, "the mean image feature")
    mine = with_image[session.world.rank :: session.world.size]
    with uneven(session.target):
        total, n = feature_sum(session.target, (encoded[0] for encoded in _encoded(session, mine)))
    found = [part for part in session.world.gather((total, n)) if part[0] is not None]
    if not found:
        return None
    return (torch.stack([total for total, _ in found]).sum(0) / sum(n for _, n in found)).float()


def measured(
    session: Session, records: Sequence[int], batch: int, way: str, instead: Tensor | None
) -> Iterator[tuple[Sequence[int], list[Dependence]]]:
    """The dependence of conversations, `batch` of them a pass.

    Args:
        way: one of COUNTERFACTUALS.
        instead: the mean image feature, where it stands for images.

    Raises:
        InputError: a picture can no longer be read.
    """
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        seen = list(_encoded(session, some))
        unseen = [prompt for prompt, _ in _encoded(session, some, blur=True)] if way == "blur" else []
        prompts, answers = [prompt for prompt, _ in seen], [answer for _, answer in seen]
        yield some, of_conversations(session.target, prompts, answers, instead, unseen, way == "knockout")


def _readable(session: Session, records: Sequence[int], what: str) -> list[int]:
    """Those whose pictures can still be opened, the same on every rank; how many cannot is said.

    Every rank must call, and opens its share: one that failed alone would leave the others waiting for it.

    Args:
        what: they are read for.

    Raises:
        InputError: on every rank, where none is left.
    """
    world = session.world
    lost: dict[int, str] = {}
    for record in records[world.rank :: world.size]:
        sample = session.corpus.samples[record]
        try:
            for picture in shown(sample, session.prepared.dialogues[record]):
                picture.open()
        except RecordError as error:
            lost[record] = f"{sample.id} ({sample.file}:{sample.line}): {error}"
    everywhere = {record: reason for part in world.gather(lost) for record, reason in part.items()}
    if everywhere:
        first = everywhere[min(everywhere)]
        said = f"{len(everywhere)} of {len(records)} records for {what} can no longer be read, the first {first}"
        if len(everywhere) == len(records):
            raise InputError(f"{said}; put their pictures back")
        session.tracker.say(said)
    return [record for record in records if record not in everywhere]


def _encoded(session: Session, records: Iterable[int], blur: bool = False) -> Iterator[tuple[Prompt, Tensor]]:
    limit = length_limit(session.recipe.data, session.target)
    for record in records:
        sample = session.corpus.samples[record]
        try:
            seen = blurred_sample(sample) if blur else sample
            yield encode(seen, session.prepared.dialogues[record], session.target, limit)
        except (RecordError, ValueError) as error:
            raise InputError(
                f"record {sample.id} ({sample.file}:{sample.line}) could be read when it was answered: {error}"
            ) from error


def blurred_sample(sample: Sample) -> Sample:
    """The sample with blurred pictures."""
    return replace(sample, pictures=tuple(BlurredPicture(p.name, p.path, p.data) for p in sample.pictures))
