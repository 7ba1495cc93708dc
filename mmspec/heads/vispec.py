"""ViSpec: EAGLE that reads an image as a few vectors made of it, and keeps one of them in mind.

An adaptor of Nq learned queries attends to the projected features of an image. Its first Nq - 1 outputs stand for the
image in the head's sequence, past W_fc, at the positions of the last Nq - 1 visual pairs; no other visual pair is left,
so the head's context is as short as the text. The last output is the image's global feature c: every text pair behind
the image, drafted ones too, has its state replaced by

    f' = A f + b + C c        ([A, C] is the paper's W_img = [I, 0] at the start, b = 0)

before it enters as EAGLE's pairs do. c is 0 before the first image and changes with each further one.

Source: ViSpec (arXiv 2509.15235). Deviations, on purpose: those of `eagle.py`; W_img is two layers, so that C c is
computed once an image; rows of any number of images and any batch. Without an image the adaptor runs on one vector of
zeros that nothing reads, so that all weights take part in every pass (ZeRO-3, DDP). The reference restores the outputs
of all images by the length of the first, and runs the target once more every round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmspec.heads._eagle import EagleConfig, EagleHead
from mmspec.heads._prefix import Pairs, Prefix, image_spans
from mmspec.losses import LossConfig
from mmspec.nn import attend


@dataclass(frozen=True)
class Config(EagleConfig):
    """See EagleConfig.

    Args:
        n_queries: Nq, vectors made of an image: Nq - 1 in the sequence, and its global feature.
    """

    kind: ClassVar[str] = "vispec"
    image_inputs: ClassVar[tuple[str, ...]] = ("compressed",)

    image_input: str = "compressed"
    n_queries: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_queries < 1:
            raise ValueError(f"head.n_queries must be at least 1 (the global feature alone), got {self.n_queries}")


class Adaptor(nn.Module):
    """Nq learned queries that attend to the features of an image.

    Args:
        width: D.
        n_heads, head_dim: of the attention.
        n_queries: Nq.
    """

    def __init__(self, width: int, n_heads: int, head_dim: int, n_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, n_heads, head_dim) * head_dim**-0.5)
        self.k_proj = nn.Linear(width, n_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, n_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, width, bias=False)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """Vectors [I, Nq, D] of I images.

        Args:
            features: [sum of lengths, D], image after image.
            lengths: visual tokens of each.
        """
        keys, values = (
            layer(features).unflatten(-1, self.query.shape[1:]).transpose(0, 1).split(lengths, 1)
            for layer in (self.k_proj, self.v_proj)
        )
        query = self.query.transpose(0, 1).unsqueeze(0)
        seen = [attend(query, k.unsqueeze(0), v.unsqueeze(0)) for k, v in zip(keys, values)]
        out: Tensor = self.o_proj(torch.cat(seen).transpose(1, 2).flatten(2))
        return out


class Head(EagleHead):
    """The ViSpec head.

    Args:
        config: a resolved Config.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    notes = True

    def __init__(self, config: Any, loss: LossConfig | None = None) -> None:
        super().__init__(config, loss)
        D = config.hidden_size
        self.adaptor = Adaptor(D, config.n_heads, config.head_dim, config.n_queries)
        self.inject_state = nn.Linear(D, D)
        self.inject_image = nn.Linear(D, D, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.inject_state.weight)
            nn.init.zeros_(self.inject_state.bias)
            nn.init.zeros_(self.inject_image.weight)

    def pair(self, embeds: Tensor, states: Tensor, note: Tensor | None = None) -> Tensor:
        """u = W_fc [e; A f + b + C c] + b'; `note` is C c."""
        injected = self.inject_state(states)
        return super().pair(embeds, injected if note is None else injected + note)

    def prefix(self, pairs: Pairs) -> Prefix:
        assert pairs.visual is not None
        visual, shown = pairs.visual.cpu(), self.config.n_queries - 1
        spans = image_spans(visual)
        lengths = [stop - start for start, stop in spans]
        device, none = pairs.embeds.device, pairs.embeds.new_zeros(1, pairs.embeds.shape[1])
        features = pairs.embeds[pairs.visual.to(device)] if spans else none
        seen = self.adaptor(features, lengths or [1])
        kept, image_of = ~visual, torch.zeros(len(visual), dtype=torch.long)
        bounds, vectors = [*pairs.starts[1:], len(visual)], []
        for image, (start, stop) in enumerate(spans):
            n = min(shown, stop - start)
            kept[stop - n : stop] = True
            vectors += [image * (shown + 1) + shown - n + k for k in range(n)]
            # In force from here to the end of the conversation, or until the next image takes its place.
            image_of[start : next(end for end in bounds if end > start)] = image + 1
        notes = torch.cat([none, self.inject_image(seen[:, -1])])[image_of.to(device)].unsqueeze(0)
        here = kept.nonzero().squeeze(1).to(device)
        pairs = pairs.only(kept)
        inputs = self.pair(pairs.embeds, self.enter(pairs.features), notes[0, here])
        if vectors:
            places = visual[kept].nonzero().squeeze(1).to(device)
            inputs = inputs.index_copy(0, places, seen.flatten(0, 1)[torch.tensor(vectors, device=device)])
        return Prefix(inputs.unsqueeze(0), self.rope(pairs), kept, notes[:, here], notes[:, -1:])
