"""Pure per-position losses of draft heads, and their chunked sum over answer positions.

Each loss maps [M, ...] to [M] and reduces nothing: sums and counts are formed once, in `Objective`, so that ranks and
micro-batches add up to the same number however the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.types import Unembed

TERMS = ("regression", "soft_ce", "total_variation", "ranking", "top_k", "acceptance")
"""The losses that an objective is composed of, each with a weight of its name in `LossConfig`."""
BEST = 10
"""Tokens of the target that `ranking` and `top_k` look at, or as many as the vocabulary has."""
FLOOR = 1e-30
"""The least chance of acceptance that `acceptance` tells from none."""
UNROLLS = ("ttt", "hass", "none")
"""How draft steps may be simulated in training; `mmspec.heads._unrolled` says what they are."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective; a weight of 0 leaves the term out, and nothing is computed for it.

    Args:
        regression: SmoothL1 between predicted and true last hidden state (EAGLE).
        soft_ce: cross-entropy against the target's distribution (EAGLE, EAGLE-3).
        total_variation: sum of |q - p|: 2 (1 - acceptance probability of a sampled token) (ViSpec).
        ranking: likelihood of the target's order of its 10 best tokens (ViSpec).
        top_k: the part of the cross-entropy that is about the target's 10 best tokens (HASS).
        acceptance: -log of the acceptance probability of a sampled token (LK losses).
        unroll: how the steps are simulated. `ttt`: as they are drafted, gradients flowing through all of them
            (training-time test). `hass`: as they are drafted, but a step takes the one before as given. `none`: the
            first step alone.
        steps: unrolled draft steps; step s sees s of its own predictions, as drafting does.
        step_decay: weight of step s is step_decay ** s.
        dependence: w, how much more a prediction weighs the more the target's choice there owes to the image
            (`Features.weight`, made in training by `train/dependence.py`); 0: all weigh alike.
        first_pair: drafts from a prompt's last token, with which every answer begins, count as others do. The
            references leave them out; False is for comparing.
        chunk: predictions whose [chunk, V] logits exist at a time.
        recompute: gradient checkpointing: what is widest in each step (norm and MLP) is computed again in the backward
            pass instead of kept. What is learned is the same.
    """

    regression: float = 0.0
    soft_ce: float = 1.0
    total_variation: float = 0.0
    ranking: float = 0.0
    top_k: float = 0.0
    acceptance: float = 0.0
    unroll: str = "ttt"
    steps: int = 3
    step_decay: float = 0.8
    dependence: float = 0.0
    first_pair: bool = True
    chunk: int = 1024
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"loss.steps must be at least 1, got {self.steps}")
        if self.unroll not in UNROLLS:
            raise ValueError(f"loss.unroll={self.unroll!r} must be one of: {', '.join(UNROLLS)}")
        if self.unroll == "none" and self.steps != 1:
            raise ValueError(f"loss.steps={self.steps}: loss.unroll=none trains one step alone; set loss.steps=1")
        if not 0 <= self.dependence < float("inf"):
            raise ValueError(f"loss.dependence must be at least 0 (off), got {self.dependence}")
        if self.chunk < 1:
            raise ValueError(f"loss.chunk must be at least 1, got {self.chunk}")
        weights = {name: getattr(self, name) for name in TERMS}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"loss.{name}={weight} must be at least 0 (0 leaves the term out)")
        if not any(weights.values()):
            raise ValueError(f"loss: every weight is 0; set one of {', '.join(TERMS)} above 0")


def smooth_l1(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean over the width of SmoothL1 (beta 1): [M, D], [M, D] -> [M]. Source: EAGLE, L_reg."""
    return F.smooth_l1_loss(prediction, truth, reduction="none").mean(-1)


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """-sum_x p(x) log q(x) of draft logits and the target's distribution: [M, V], [M, V] -> [M].

    Source: EAGLE, L_cls; EAGLE-3.
    """
    return -(p * logits.log_softmax(-1)).sum(-1)


def total_variation(logits: Tensor, p: Tensor) -> Tensor:
    """sum_x |q(x) - p(x)| of draft logits and the target's distribution: [M, V], [M, V] -> [M].

    Source: ViSpec stage 2, L_tv.
    """
    return (logits.softmax(-1) - p).abs().sum(-1)


def ranking(logits: Tensor, p: Tensor) -> Tensor:
    """-sum_r (u_r - log sum_{s >= r} exp u_s), u the draft's logits of the target's BEST tokens: [M, V], [M, V] -> [M].

    The Plackett-Luce likelihood of the target's order: -log of the chance that tokens drawn from these without
    replacement, by the draft's probabilities, come in it. Only differences of u count, so it goes beside a loss that
    sets their level.

    Source: ViSpec (arXiv 2509.15235), L_rank.
    """
    u = logits.gather(-1, _best(p))
    return (u.flip(-1).logcumsumexp(-1).flip(-1) - u).sum(-1)


def top_k(logits: Tensor, p: Tensor) -> Tensor:
    """-sum p(x) log q(x) over the target's BEST tokens x: [M, V], [M, V] -> [M].

    Source: HASS (arXiv 2408.15766), top-K distillation.
    """
    best = _best(p)
    return -(p.gather(-1, best) * logits.log_softmax(-1).gather(-1, best)).sum(-1)


def acceptance(logits: Tensor, p: Tensor) -> Tensor:
    """-log a, a = sum_x min(p(x), q(x)) the chance that a token drawn from q is accepted: [M, V], [M, V] -> [M].

    Its gradient is total variation's over 2a: large where little is accepted, where that of total variation vanishes.
    Where the target is sure of one token it is the cross-entropy.

    Source: LK losses (arXiv 2602.23881), negative log-likelihood of acceptance. Deviation: a is at least FLOOR, so a
    draft that gives the target's tokens no probability at all has a finite loss and no gradient.
    """
    return -_accepted(logits.softmax(-1), p).log()


def _accepted(q: Tensor, p: Tensor) -> Tensor:
    """sum min(p, q), [M, V] -> [M]; not 1 - variation / 2, which rounds what is small away."""
    return torch.minimum(p, q).sum(-1).clamp_min(FLOOR)


def _best(p: Tensor) -> Tensor:
    """[P, V] -> [P, k <= BEST] int64, the likeliest tokens, in order."""
    return p.topk(min(BEST, p.shape[-1]), -1).indices


def valid_pairs(answer: Tensor) -> int:
    """From how many positions of a conversation a reply goes on: what sums of the loss are divided by.

    Args:
        answer: [L] int64 reply numbers, 0 outside replies.

    Returns:
        Positions i whose tokens i + 1 (read by the head) and i + 2 (predicted) are of the same reply.
    """
    return int(((answer[1:-1] > 0) & (answer[1:-1] == answer[2:])).sum())


@dataclass(frozen=True)
class Aims:
    """What M predictions aim at; several (those of different draft steps) may aim at one position of the target.

    Args:
        truth: [P, D] the target's last hidden states at those positions.
        of: [M] int64, ascending: the row of `truth` that each prediction estimates.
        weight: [M], factors of the losses.
        steps: [M] int64, the draft step that each prediction is of, for heads whose steps differ in their weights.
    """

    truth: Tensor
    of: Tensor
    weight: Tensor
    steps: Tensor | None = None


def vocabulary_losses(
    predicted: Tensor,
    aims: Aims,
    unembed: Unembed,
    config: LossConfig,
    weight: Tensor | None = None,
    draft_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of predictions, in chunks: no [M, V] tensor outlives its chunk.

    The gradients are formed chunk by chunk along with the sum, as the logits of a chunk are there anyway: the backward
    pass computes none a second time. They are written out (`_logit_losses`) rather than recorded: what autograd keeps
    of a softmax would be several times the logits. The target's distribution is computed once for all predictions that
    aim at it. The result's backward pass runs once.

    Args:
        predicted: [M, D] draft states; gradient flows here.
        unembed: the target's, frozen: of `aims.truth`, and of `predicted` where the head has no `weight`.
        weight: [V', D] of the head's own unembedding; trained, unless it asks for no gradient.
        draft_ids: [V'] int64, ascending, where that has a vocabulary of its own: the target's distribution is
            restricted to it and renormalised, and predictions whose target argmax lies outside have no loss.

    Returns:
        The weighted sum, a scalar; [M] bool, draft and target have the same argmax; [M] bool, the target's argmax is in
        the draft vocabulary.
    """
    grows = torch.is_grad_enabled()
    trained = weight is not None and weight.requires_grad
    leaves = [predicted, weight] if weight is not None and trained else [predicted]
    gradients = [torch.zeros_like(leaf) for leaf in leaves] if grows else []
    own = None if weight is None else weight.detach()
    total = torch.zeros((), dtype=_work(predicted[:0]).dtype, device=predicted.device)
    hits, covers = [], []
    size, P = max(config.chunk // config.steps, 1), len(aims.truth)
    starts = torch.arange(0, P + size, size, device=predicted.device)
    spans = list(pairwise(torch.searchsorted(aims.of, starts).tolist()))
    scratch, most = _Scratch(predicted.device), max(high - low for low, high in [(0, 0), *spans])
    ranks = bool(config.ranking or config.top_k)
    for index, (low, high) in enumerate(spans):
        truth, of = aims.truth[index * size : (index + 1) * size], aims.of[low:high] - index * size
        with torch.no_grad():
            p, best, covered = _restricted(_work(unembed(truth)), draft_ids, scratch)
            ranked = _best(p) if ranks else None
        scale = aims.weight[low:high].to(p.dtype) * covered[of]
        g = predicted[low:high].detach().requires_grad_(grows)
        with torch.set_grad_enabled(grows):
            recorded = None if own is not None else unembed(g)
        with torch.no_grad():
            logits = scratch("logits", most, p.shape[1], g.dtype)[: high - low]
            if own is not None:
                torch.mm(g, own.T, out=logits)
            elif recorded is not None:  # copied: the target's unembedding may remember it for its backward pass
                logits.copy_(recorded)
            losses, drafted = _logit_losses(logits, p, ranked, of, config, grows, scratch)
            total = total + (losses * scale).sum()
        covers.append(covered[of])
        hits.append(covers[-1] & (drafted == best[of]))
        if grows:
            # A prediction's weight is a factor of its gradient: one of [C, D] here, where [C, V] would be larger.
            scaled = scale.to(g.dtype).unsqueeze(1)
            if own is not None:
                torch.mm(logits, own, out=gradients[0][low:high]).mul_(scaled)
                if trained:
                    gradients[1].addmm_(logits.T, g.detach() * scaled)
            elif recorded is not None:
                gradients[0][low:high] = torch.autograd.grad(recorded, g, logits)[0] * scaled
        del recorded  # or the next chunk's would stand beside it
        if config.regression:
            close = config.regression * (smooth_l1(_work(g), _work(truth)[of]) * scale).sum()
            total = total + close.detach()
            if grows:
                gradients[0][low:high] += torch.autograd.grad(close, g)[0]
    none = aims.of.new_zeros(0, dtype=torch.bool)
    if grows:
        total = _Known.apply(total, gradients, *leaves)
    return total, torch.cat([none, *hits]), torch.cat([none, *covers])


def _logit_losses(
    logits: Tensor, p: Tensor, ranked: Tensor | None, of: Tensor, config: LossConfig, grows: bool, scratch: _Scratch
) -> tuple[Tensor, Tensor]:
    """The losses over a vocabulary of one chunk, and their gradient for its logits.

    With q the draft's distribution: soft_cross_entropy has q - p; total_variation has q (s - <q, s>), s = sign(q - p);
    acceptance has that over 2 sum min(p, q); those of the target's best tokens alone see `_ranked_losses`.

    Args:
        logits: [C, V], overwritten: by the gradient of each row's loss where it is wanted.
        p: [P, V] the target's distributions; of: [C], the row that each prediction aims at.
        ranked: [P, k], the best tokens of p, where losses are about them alone.
        grows: whether the gradient is wanted.

    Returns:
        [C] the losses, and [C] the logits' argmax.
    """
    at_a_time = max(CACHED // logits.shape[1], 1) if logits.device.type == "cpu" else max(len(logits), 1)
    losses, best = [], []
    for rows, aim in zip(logits.split(at_a_time), of.split(at_a_time)):
        x = _work(rows)
        best.append(x.argmax(-1))
        top = best[-1].unsqueeze(1)
        x.sub_(x.gather(1, top))  # sums of what is large and equal in both would lose digits
        q = torch.softmax(x, -1, out=scratch("q", at_a_time, x.shape[1], x.dtype)[: len(x)])
        aimed = torch.index_select(p, 0, aim, out=scratch("aimed", at_a_time, x.shape[1], x.dtype)[: len(x)])
        log_top = q.gather(1, top).log()
        at = None if ranked is None else ranked[aim]
        few = None if at is None else _ranked_losses(x.gather(1, at), aimed.gather(1, at), log_top, config)
        # log q = x + log q(best): it is never formed, and neither is a second exponential.
        loss = config.soft_ce * (-x.mul_(aimed).sum(-1) - log_top.squeeze(1))
        slope: Tensor | float = config.total_variation
        if config.acceptance:
            accepted = _accepted(q, aimed)
            loss = loss - config.acceptance * accepted.log()
            steep = (config.acceptance / (2 * accepted)).masked_fill(accepted <= FLOOR, 0)
            slope = slope + steep.unsqueeze(1)
        apart = torch.sub(q, aimed, out=aimed)
        if config.total_variation:
            loss = loss + config.total_variation * apart.abs().sum(-1)
        losses.append(loss if few is None else loss + few[0])
        if not grows:
            continue
        lean = _lean(q, apart) if config.total_variation or config.acceptance else None
        if config.soft_ce != 1:
            apart.mul_(config.soft_ce)
        if lean is not None:
            apart.add_(lean.mul_(q).mul_(slope))
        if few is not None and at is not None:
            apart.addcmul_(q, few[2]).scatter_add_(1, at, few[1])
        rows.copy_(apart)
    return torch.cat([p.new_zeros(0), *losses]), torch.cat([of.new_zeros(0), *best])


def _lean(q: Tensor, apart: Tensor) -> Tensor:
    """s - <q, s> [C, V], s = sign(apart), of distributions q [C, V].

    By the share of q on each side, as these add up to 1: the difference itself would be a rounding of 1 where q is
    almost all on one side, and that is where `acceptance` divides it by what is on the other.
    """
    above, below = apart > 0, apart < 0
    high, low = (torch.where(side, q, 0.0).sum(-1, keepdim=True) for side in (above, below))
    same = q.masked_fill(above | below, 0).sum(-1, keepdim=True)
    lean = torch.where(below, -2 * high - same, low - high)
    return torch.where(above, 2 * low + same, lean, out=lean)


def _ranked_losses(u: Tensor, p: Tensor, log_top: Tensor, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`ranking` and `top_k` of one chunk, and their gradient for its logits: a term of each best token, a share of q.

    ranking has exp(u_i) sum_{r <= i} 1 / sum_{s >= r} exp(u_s) - 1 at the i-th best token; top_k has P q, and -p at
    the best tokens, whose probabilities add up to P.

    Args:
        u: [C, k] logits of the best tokens, in order, less the largest of the row; log_top: [C, 1], log q of that one.
        p: [C, k], their probabilities.

    Returns:
        [C] the weighted losses; [C, k] the gradient at the best tokens; [C, 1], the multiple of q beside it.
    """
    tails = u.flip(-1).logcumsumexp(-1).flip(-1)
    loss = config.ranking * (tails - u).sum(-1) - config.top_k * (p * (u + log_top)).sum(-1)
    share = (u.unsqueeze(2) - tails.unsqueeze(1)).exp().tril().sum(-1)
    return loss, config.ranking * (share - 1) - config.top_k * p, config.top_k * p.sum(-1, keepdim=True)


CACHED = 2**20
"""Logits that are worked on at a time on a CPU, so that all passes but the first read the cache. On a GPU it is the
chunk: there a launch is dearer than a pass."""


class _Scratch:
    """Tensors that the chunks of one call share.

    On a CPU fresh memory costs more than the arithmetic on it: each page is mapped and zeroed when it is first touched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] of any content; ask for as many rows as will be needed at most."""
        if name not in self._held or len(self._held[name]) < rows:
            self._held[name] = torch.empty(rows, width, dtype=dtype, device=self._device)
        return self._held[name][:rows]


def _work(x: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary need it."""
    return x if x.dtype == torch.float64 else x.float()


def _restricted(logits: Tensor, draft_ids: Tensor | None, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """The target's distribution [P, V'] over the draft vocabulary, its best index there, and whether that is its best
    token of all."""
    best = inside = logits.argmax(-1)
    covered = torch.ones_like(best, dtype=torch.bool)
    if draft_ids is not None:
        logits = logits[:, draft_ids]
        inside = logits.argmax(-1)
        covered = draft_ids[inside] == best
    room = scratch("p", len(logits), logits.shape[1], logits.dtype)
    return torch.softmax(logits, -1, out=room), inside, covered


class _Known(torch.autograd.Function):
    """A scalar whose gradients for some tensors are known. Its backward pass hands them over, so it runs once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of a vocabulary loss runs once: it hands its gradients over")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(known.mul_(upstream[0].to(known.dtype)) for known in gradients)
