"""Counterfactual visual dependence: how much of the target's choice of each token is owed to the image.

The target reads one conversation twice, with its image and without: image features replaced by their mean over a set of
images, or the image blurred, or image positions hidden from the answer alone, so that what the question took from the
image stays. Tokens, positions and lengths are the same both times, so all that differs between the two distributions of
a token is what the image said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mmspec.types import Features, Prompt, Target, Unembed

BLUR = 1 / 16
"""Standard deviation of the blur, of the shorter side."""
CHUNK = 512
"""Positions whose two distributions [CHUNK, V] exist at a time."""


@dataclass(frozen=True)
class Dependence:
    """How far apart the two distributions of each token are; with p the one with the image, q without.

    Args:
        kl: [N] fp32, KL(p || q) in nats.
        js: [N] fp32, Jensen-Shannon divergence in nats, at most log 2.
        changed: [N] bool, p and q have different likeliest tokens.
    """

    kl: Tensor
    js: Tensor
    changed: Tensor


def compare(seen: Tensor, unseen: Tensor, unembed: Unembed) -> Dependence:
    """The dependence at N positions, whose logits exist a chunk at a time.

    Args:
        seen, unseen: [N, D] last hidden states with the image and without.
        unembed: the target's.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for with_image, without in zip(seen.split(CHUNK), unseen.split(CHUNK)):
        log_p, log_q = (_work(unembed(states)).log_softmax(-1) for states in (with_image, without))
        p = log_p.exp()
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        js = ((p * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
        kl = (p * (log_p - log_q)).sum(-1)
        # Below zero by rounding alone.
        parts.append((kl.clamp_min(0).float(), js.clamp_min(0).float(), log_p.argmax(-1) != log_q.argmax(-1)))
    none = torch.zeros(0, device=seen.device)
    kls, jss, changes = zip(*parts) if parts else ((none,), (none,), (none.bool(),))
    return Dependence(torch.cat(kls), torch.cat(jss), torch.cat(changes))


def answer_places(answer: Tensor) -> Tensor:
    """[B, T] bool: answer tokens that have a state before them which chose them."""
    chosen = answer > 0
    chosen[:, 0] = False
    return chosen


@torch.no_grad()
def of_passes(seen: Features, unseen: Features, unembed: Unembed) -> Dependence:
    """The dependence of the answer tokens (`answer_places`, row after row) from two passes over the same batch.

    A token's is that of the distribution it was chosen from: of the state one position before it.
    """
    before = answer_places(seen.answer).roll(-1, 1)
    return compare(seen.last_hidden[before], unseen.last_hidden[before], unembed)


@torch.no_grad()
def of_conversations(
    target: Target,
    prompts: Sequence[Prompt],
    answers: Sequence[Tensor],
    instead: Tensor | None = None,
    blurred_prompts: Sequence[Prompt] = (),
    hidden: bool = False,
) -> list[Dependence]:
    """The dependence of each conversation's answer tokens, in their order.

    Args:
        target: frozen.
        prompts, answers: as `encode_dialogue` gives them.
        instead: `mean_feature` of a set of images, or
        blurred_prompts: the same conversations, encoded with blurred images, or
        hidden: the answers do not see images.
    """
    if (instead is not None) + bool(blurred_prompts) + hidden != 1:
        raise ValueError("give either the mean feature or blurred prompts or hidden=True")
    seen = target.teacher(prompts, answers)
    unseen = target.teacher(blurred_prompts or prompts, answers, instead=instead, hidden=hidden)
    found = of_passes(seen, unseen, target.unembed)
    counts = answer_places(seen.answer).sum(1).tolist()
    columns = (found.kl.split(counts), found.js.split(counts), found.changed.split(counts))
    return [Dependence(kl.cpu(), js.cpu(), changed.cpu()) for kl, js, changed in zip(*columns)]


@torch.no_grad()
def feature_sum(target: Target, prompts: Iterable[Prompt]) -> tuple[Tensor | None, int]:
    """Sum [W] float64 of all image features of some prompts, None without any, and their number."""
    total, n = None, 0
    for prompt in prompts:
        if prompt.pixels:
            features = target.image_features(prompt.pixels).double().cpu()
            total = features.sum(0) if total is None else total + features.sum(0)
            n += len(features)
    return total, n


def mean_feature(target: Target, prompts: Iterable[Prompt]) -> Tensor | None:
    """The mean image feature [W] fp32 of some prompts; None where they have no image."""
    total, n = feature_sum(target, prompts)
    return None if total is None else (total / n).float()


def blurred(image: Image.Image) -> Image.Image:
    """The image under a Gaussian blur that leaves colours and large shapes at best."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
