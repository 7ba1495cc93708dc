"""The unrolled training step without any saving: what the lean one must equal.

All steps run at all positions of every row, prompts and padding included, and attention holds its scores [T, T + s].
"""

from __future__ import annotations

import torch

from mmspec.heads._prefix import Pairs
from mmspec.nn import attend


class DenseAttention:
    """The query of index t at step s sees step-0 keys at indices <= t and, of each later step, the key at its own."""

    def __init__(self):
        self.keys, self.values = [], []

    def __call__(self, q, k, v):
        groups = q.shape[1] // k.shape[1]
        self.keys.append(k.repeat_interleave(groups, 1))
        self.values.append(v.repeat_interleave(groups, 1))
        if len(self.keys) == 1:
            return attend(q, self.keys[0], self.values[0], causal=True)
        T = q.shape[2]
        q = q * q.shape[-1] ** -0.5
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        prefix = (q @ self.keys[0].transpose(-1, -2)).masked_fill(hidden, float("-inf"))
        own = torch.stack([(q * key).sum(-1) for key in self.keys[1:]], -1)
        weights = torch.cat([prefix, own], -1).softmax(-1)
        out = weights[..., :T] @ self.values[0]
        for step, value in enumerate(self.values[1:]):
            out = out + weights[..., T + step, None] * value
        return out


def dense_unroll(head, features, steps):
    """`UnrolledHead.unroll` at all positions that the head reads: tensors [B, T - 2, D], 0 elsewhere.

    For rows of one conversation each, and 1-D positions.
    """
    B, T = features.input_ids.shape
    outputs = [[] for _ in range(steps)]
    for row in range(B):
        embeds, visual = features.embeds[row], features.visual[row]
        prefix = head.prefix(Pairs(embeds[1:-1], head.read(features)[row, :-2], None, T, visual[1:-1]))
        kept = torch.arange(T - 2) if prefix.kept is None else prefix.kept.nonzero().squeeze(1)
        attention, states = DenseAttention(), None
        for step in range(steps):
            rope = head.rotary.at((kept + step).unsqueeze(0), T + steps, embeds.dtype)
            shifted = embeds[None, (kept + 1 + step).clamp_max(T - 1)]
            pairs = prefix.inputs if states is None else head.pair(shifted, states, prefix.notes)
            states = head.block(pairs, rope, attention)
            outputs[step].append(states.new_zeros(T - 2, states.shape[-1]).index_copy(0, kept, states[0]))
    return [torch.stack(rows) for rows in outputs]
