"""Floating-point operations of a training step, from shapes and token counts alone.

Invariant: what is counted is what the mathematics asks for, a multiply-add as two: matrix products and attention,
forward and backward, each once however often it is computed. Left out are norms, activations, softmax, the optimizer
and the vision tower. Costs are linear in the counts of a `Work`, so those of ranks and micro-batches add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmspec.heads import medusa
from mmspec.heads._unrolled import UnrolledHead
from mmspec.types import TargetShape


@dataclass(frozen=True)
class Work:
    """What a training step goes through; numbers, or 0-d tensors.

    Args:
        tokens: of all conversations, padding excluded.
        pairs: of a token and one that it attends to, itself included, over all conversations.
        drafts: positions that a draft begins at: of a reply of n tokens n - 1.
        draft_pairs: of such a position and a token that it attends to.
        predictions: of all unrolled steps that have a loss; those of one position in s steps aim at s positions.
        visual: image placeholders among the tokens.
    """

    tokens: Any
    pairs: Any
    drafts: Any
    draft_pairs: Any
    predictions: Any
    visual: Any = 0


@dataclass(frozen=True)
class Cost:
    """Operations for one of each of a `Work`'s counts."""

    tokens: float = 0.0
    pairs: float = 0.0
    drafts: float = 0.0
    draft_pairs: float = 0.0
    predictions: float = 0.0
    visual: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def of(self, work: Work) -> Any:
        """The operations of some work; a float, or a 0-d float64 tensor."""
        counts = (work.tokens, work.pairs, work.drafts, work.draft_pairs, work.predictions, work.visual)
        return sum(each * (n.double() if isinstance(n, Tensor) else n) for each, n in zip(astuple(self), counts))


def target_cost(shape: TargetShape) -> Cost:
    """The frozen target's pass over finished conversations, without its unembedding (which is the loss's)."""
    width = shape.n_heads * shape.head_dim
    attention = 2 * shape.hidden_size * (width + shape.n_kv_heads * shape.head_dim)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    return Cost(tokens=2.0 * shape.n_layers * layer, pairs=4.0 * shape.n_layers * width)


def is_counted(head: nn.Module) -> bool:
    """Whether `head_cost` knows how often the layers of a head are applied."""
    return isinstance(head, (UnrolledHead, medusa.Head))


def head_cost(head: nn.Module, shape: TargetShape, steps: int, backward: bool = True) -> Cost:
    """A step of a head that `is_counted`, loss and the target's unembedding included.

    A backward pass costs the forward once for the gradient of what a layer reads, and once for that of its weight where
    it is trained: a frozen layer under an adapter has only the first.

    Args:
        head: its linear layers are looked at, not their weights; on the meta device too, and with adapters.
        shape: of the target.
        steps: of the unroll.
        backward: whether that pass counts.
    """
    config: Any = head.config
    linear = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    logits = 2.0 * shape.hidden_size * shape.vocab_size
    if isinstance(head, medusa.Head):
        return _medusa_cost(config, linear, logits, backward)
    cost = Cost(drafts=logits)  # the target's distribution, once a position
    if not any("lm_head" in name.split(".") for name in linear):
        cost += Cost(predictions=logits * (1 + backward))
    for name, module in linear.items():
        once = 2.0 * module.in_features * module.out_features
        places, with_gradient = _places(name, module, config, steps)
        for each, passes in ((places, 1 + backward * module.weight.requires_grad), (with_gradient, int(backward))):
            cost += Cost(*(once * passes * n for n in astuple(each)))
    # A query sees the prefix, and of each simulated step one key; the backward pass is two of the forward's.
    attended = (1 + 2 * backward) * 4.0 * config.n_heads * config.head_dim
    return cost + Cost(draft_pairs=attended * steps, drafts=attended * steps * (steps - 1) / 2)


def _medusa_cost(config: medusa.Config, linear: Mapping[str, nn.Linear], logits: float, backward: bool) -> Cost:
    """Each block is applied once a draft position; the first one of a head reads what nobody has a gradient of.

    The target's distributions are made once a position, or by each of the heads where they have unembeddings of their
    own.
    """
    cost = Cost(drafts=logits * (config.n_ahead if config.own_head else 1))
    if not config.own_head:
        cost += Cost(predictions=logits * (1 + backward))
    for name, layer in linear.items():
        once = 2.0 * layer.in_features * layer.out_features
        own = name.startswith("lm_heads.")  # of one head, so of one in K predictions
        times = once * (1 / config.n_ahead if own else 1)
        reads = own or name.split(".")[2] != "0"
        passes = 1 + backward * (layer.weight.requires_grad + reads)
        cost += Cost(predictions=times * passes) if own else Cost(drafts=times * passes)
    return cost


def _places(name: str, layer: nn.Linear, config: Any, steps: int) -> tuple[Cost, Cost]:
    """How often a layer is applied, and how often what it reads has a gradient.

    Args:
        name: in the head; that of an adapter's matrices holds its layer's.
        config: of the head. One that leaves image positions out still attends to as many keys here, and what is done
            once an image is not counted.
    """
    parts, later = name.split("."), float(steps - 1)
    # A token of the conversation is a pair that is read, but for image positions where they are left out.
    read = {"tokens": 1.0, "visual": -1.0 if config.image_input in ("none", "compressed") else 0.0}
    if "lm_head" in parts:
        return Cost(predictions=1), Cost(predictions=1)
    if "adaptor" in parts or "inject_image" in parts:
        return Cost(visual=float("k_proj" in parts or "v_proj" in parts)), Cost()
    if "fc" in parts and layer.in_features != 2 * config.hidden_size and "lora_B" not in parts:
        return Cost(**read), Cost()  # it reads the target's states alone, once
    if "fc" in parts or "inject_state" in parts:
        return Cost(**read, drafts=later), Cost(drafts=later)
    if "k_proj" in parts or "v_proj" in parts:
        return Cost(**read, drafts=later), Cost(**read, drafts=later)
    return Cost(drafts=steps), Cost(drafts=steps)


def counted(valid: Tensor, answer: Tensor, segment: Tensor | None, steps: int, visual: Tensor | None = None) -> Work:
    """The work of a batch; arguments as in `Features`, counts as 0-d int64 tensors where it lies."""
    part = valid.long() if segment is None else segment
    index = torch.arange(part.shape[1], device=part.device).expand_as(part)
    begins = torch.ones_like(valid)
    begins[:, 1:] = part[:, 1:] != part[:, :-1]
    position = index - index.masked_fill(~begins, 0).cummax(1).values

    def replies(back: int) -> Tensor:
        """[B, T - back]: tokens of a reply that had begun `back` tokens before."""
        same = (answer[:, back:] == answer[:, :-back]) & (part[:, back:] == part[:, :-back])
        return same & (answer[:, back:] > 0) & valid[:, back:]

    second = replies(1)
    return Work(
        tokens=valid.sum(),
        pairs=((position + 1) * valid).sum(),
        drafts=second.sum(),
        draft_pairs=((position[:, 1:] - 1) * second).sum(),
        predictions=sum(replies(back).sum() for back in range(1, min(steps, valid.shape[1] - 1) + 1)),
        visual=0 if visual is None else (visual & valid).sum(),
    )


def expected(n: float, length: float, answer: float, steps: int, visual: float = 0) -> Work:
    """The work of n conversations of `length` tokens, of which `visual` are placeholders and the last `answer` one
    reply."""
    drafts = max(answer - 1, 0)
    return Work(
        tokens=n * length,
        pairs=n * length * (length + 1) / 2,
        drafts=n * drafts,
        draft_pairs=n * drafts * (2 * length - answer - 2) / 2,
        predictions=n * sum(max(drafts - step, 0) for step in range(steps)),
        visual=n * visual,
    )
