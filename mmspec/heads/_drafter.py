"""What the heads of EAGLE's family share when they draft: pairs, a ragged cache of one block, and trees.

Such a head reads pairs of target features and the embedding of the token that followed, runs one decoder block over
them, and feeds the block's output back in place of the features. What the features are, how a pair enters the block and
over which vocabulary it predicts is the head's own.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.cache import RaggedKV, upload
from mmspec.heads._prefix import Pairs, Prefix, pair_axes
from mmspec.heads.base import (
    NOISE_SHARE,
    DraftHead,
    candidate_sampler,
    drawn_levels,
    drawn_trees,
    frozen_head,
    noisy_scores,
)
from mmspec.nn import DecoderBlock, RotaryTable, attend
from mmspec.sampling import DRAFT_STREAM, gumbel_noise
from mmspec.static_tree import StaticTree
from mmspec.tree import best_of_pool, root_only
from mmspec.types import (
    Features,
    Forward,
    InputError,
    Plan,
    Prompt,
    Request,
    Round,
    Sampler,
    Target,
    Tree,
    Unembed,
)

MAX_DEPTH = 32
"""Levels that a draft may have."""
_FLUSH = 64
"""Pairs that may wait while a row is skipped; beyond that one cheap key/value projection takes them in."""


class PairHead(DraftHead):
    """A head over pairs (features of the target at i, embedding of token i + 1) that predicts token i + 2.

    `config` has `hidden_size`, `n_kv_heads` and `head_dim` of the block, `image_input` and `rope`.
    """

    block: DecoderBlock
    rotary: RotaryTable
    placeholder: Tensor | None
    """[D] the target's embedding of an image placeholder, saved with the weights; of heads with `image_input: aux`."""
    notes: bool = False
    """Whether `prefix` has notes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("placeholder", torch.zeros(config.hidden_size) if config.image_input == "aux" else None)

    @property
    def feature_size(self) -> int:
        """Width W of what `read` returns."""
        return int(self.config.hidden_size)

    @abstractmethod
    def read(self, outputs: Forward | Features) -> Tensor:
        """Target features of a pass, [B, N, W]; the same when drafting and in training."""

    def enter(self, features: Tensor) -> Tensor:
        """Features [..., W] as the states [..., D] that pairs are made of."""
        return features

    @abstractmethod
    def pair(self, embeds: Tensor, states: Tensor, note: Tensor | None = None) -> Tensor:
        """Block input of embeddings and states, both [..., D]; states are entered features or outputs of the block.

        Args:
            note: [..., D], what the head keeps in mind of the prompt; None for heads without notes.
        """

    @property
    def marks_images(self) -> bool:
        """Whether `prefix` is to know which pairs are visual."""
        return bool(self.config.image_input != "embeds")

    def prefix(self, pairs: Pairs) -> Prefix:
        """What the block reads of pairs whose features are the target's: images and positions are settled here, for
        training and drafting alike. All pairs but those of prompts and finished conversations are text."""
        kept = None
        if self.config.image_input == "none" and pairs.visual is not None:
            kept = ~pairs.visual.cpu()
            pairs = pairs.only(kept)
        embeds = pairs.embeds
        if self.placeholder is not None:
            embeds = torch.where(pairs.visual_here(), self.placeholder.to(embeds.dtype), embeds)
        inputs = self.pair(embeds, self.enter(pairs.features))
        return Prefix(inputs.unsqueeze(0), self.rope(pairs), kept)

    def rope(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rotation of the pairs, [1, 1, N, Dh]."""
        if pairs.axes is not None:
            return self.rotary.along(pairs.axes, pairs.bound, pairs.embeds.dtype)
        if pairs.index is None:
            return self.rotary.span(0, len(pairs.embeds), pairs.embeds)
        return self.rotary.at(pairs.index.unsqueeze(0), pairs.bound, pairs.embeds.dtype)

    @torch.no_grad()
    def prepare(self, target: Target, answer_counts: Callable[[], Tensor]) -> None:
        """Take the placeholder's embedding.

        Raises:
            InputError: the target has none.
        """
        if self.placeholder is None:
            return
        if target.image_token_id >= target.shape.vocab_size:
            raise InputError(
                f"head.image_input=aux: {target.name} has no embedding of its image placeholder "
                f"{target.image_token_id}; use embeds or none"
            )
        self.placeholder.copy_(target.embed(torch.tensor([target.image_token_id], device=target.device))[0])

    def logits(self, states: Tensor, unembed: Unembed) -> Tensor:
        """Over the head's vocabulary, [..., V']."""
        return unembed(states)

    def drafter(
        self,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
    ) -> PairDrafter:
        return PairDrafter(self, target, width, sampler, widths, shape)


@functools.lru_cache(maxsize=64)
def _pool_constants(B: int, k: int, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Parents [B, 1 + k + k * k] of the root and the first two levels (one: [B, 1 + k]); where each further level's
    candidates start in the pool, each number k times."""
    nodes = [-1, *[0] * k, *(node for node in range(1, k + 1) for _ in range(k) if depth > 1)]
    starts = [1 + k + k * k * level for level in range(depth - 2) for _ in range(k)]
    with torch.inference_mode(False):
        first = torch.tensor(nodes, device=device).repeat(B, 1)
        return first, torch.tensor(starts, dtype=torch.long, device=device)


class PairDrafter:
    """Drafts with a head of EAGLE's family: one catch-up pass, then one pass a level over the `width` best nodes.

    Invariant: `kv` holds keys and values of the pairs 0..m-1 of each row, less the `dropped` ones that the head leaves
    out of a prompt; pairs the target has committed since wait in `states` and `tokens`. Together they are the row's
    committed length n, and the last waiting pair is always (features of n-1, root). What waits is text: it stands at
    its place in the KV cache plus the row's `shift`, which is what was dropped and, with `rope: mrope`, the target's
    own offset. A skipped row only waits: its head is never run to keep it in sync.

    Args:
        head: in eval mode, on the target's device and dtype.
        target: for its frozen embedding and unembedding.
        width: beams a level, and children a beam.
        sampler: with a KeyedSampler the candidates are what its noise makes of the head's distribution (`_scored`).
        widths: draw candidates from the head's distribution instead, this many at a node of each level and 1 beyond;
            needs a KeyedSampler, which makes that distribution of the logits. The budget cuts such trees in level
            order, whatever was drawn.
        shape: fill this tree instead of searching for the best one: a node is the candidate of its rank (EAGLE-1).
        noise_share: see `NOISE_SHARE`.

    Penalties of the sampler are left to the verification: they change what is accepted, not what is emitted.
    """

    def __init__(
        self,
        head: PairHead,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
        noise_share: float = NOISE_SHARE,
    ) -> None:
        self.sampler = candidate_sampler(sampler, width, widths, shape)
        self.widths, self.noise_share = tuple(widths), noise_share
        self.head = frozen_head(head, target)
        self.head.block.fuse()
        self.taps = head.taps
        self.target, self.width = target, width
        self.shape = shape and shape.to(target.device)
        self.max_depth = MAX_DEPTH

    def open(self, max_batch: int, max_tokens: int) -> None:
        """Allocate for `max_batch` rows of at most `max_tokens` committed tokens."""
        c, device = self.head.config, self.target.device
        beams = math.prod(self.widths) if self.widths else self.width
        beams = max(beams * self.max_depth, self.shape.budget if self.shape else 0)
        capacity = max_tokens + max(beams, _FLUSH + self.max_depth)
        self.kv = RaggedKV(1, max_batch, c.n_kv_heads, capacity, c.head_dim, self.target.dtype, device)
        self.states = torch.zeros((max_batch, 1, self.head.feature_size), dtype=self.target.dtype, device=device)
        self.tokens = torch.zeros((max_batch, 1), dtype=torch.long, device=device)
        self.waiting = [0] * max_batch
        self.skipped: list[tuple[Tensor, Tensor, list[int]]] = []
        """States [B, 1, W], tokens [B, 1] and counts of the latest rounds without a draft; not in `waiting` yet."""
        self.keys = torch.zeros(max_batch, dtype=torch.long, device=device)
        self.prompts: dict[int, tuple[Prompt, Forward, Tensor]] = {}
        self.dropped, self.shift = [0] * max_batch, [0] * max_batch
        self.moved = torch.zeros((2, max_batch), dtype=torch.long, device=device)
        """Both on the device; not looked at while they are 0 everywhere."""
        noted = (max_batch, 1, c.hidden_size)
        self.notes = torch.zeros(noted, dtype=self.target.dtype, device=device) if self.head.notes else None
        # Additive mask of the beams of all levels: each sees itself, and what it inherits is filled in level by level.
        own = torch.full((self.width, self.width), float("-inf"), dtype=self.target.dtype, device=device)
        self.own = own.fill_diagonal_(0.0).repeat(1, 1, 1, self.max_depth)
        # Which beam of the batch, over all rows, each of a row's width^2 candidates hangs from.
        parents = torch.arange(max_batch * self.width, device=device).repeat_interleave(self.width)
        self.parent_beams = parents.view(max_batch, -1)
        self.root_scores = torch.zeros((max_batch, 1), dtype=self.target.dtype, device=device)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        """Note a new row; its prompt is run through the head when it is first drafted for."""
        self._settle()
        self.kv.set_length(row, 0)
        self._place(row, 0, 0)
        if self.notes is not None:
            self.notes[row] = 0
        features = self.head.read(forward)[0]
        self.states[row, 0] = features[-1]
        self.tokens[row, 0] = root
        self.keys[row] = request.key
        self.waiting[row] = 1
        if len(request.prompt) > 1:
            self.prompts[row] = request.prompt, forward, features[:-1]

    def evict(self, row: int) -> None:
        self._settle()
        self.kv.set_length(row, 0)
        self._place(row, 0, 0)
        self.waiting[row] = 0
        self.prompts.pop(row, None)

    def _place(self, row: int, dropped: int, shift: int) -> None:
        if (dropped, shift) != (self.dropped[row], self.shift[row]):
            self.dropped[row], self.shift[row] = dropped, shift
            self.moved[:, row] = upload([dropped, shift], self.moved.device)

    def observe(self, round: Round) -> None:
        """Queue the pairs that the round committed: states at the kept nodes with the tokens that followed them."""
        counts = [len(p) for p in round.paths]
        if round.forward.last_hidden.shape[1] == 1:  # a skip: nothing is moved before somebody wants to draft
            # Of its own memory: a captured pass writes its next outputs over these (`targets/_static.py`).
            self.skipped.append((self.head.read(round.forward).clone(), round.accepted.tokens, counts))
            if len(self.skipped) + max(self.waiting) > _FLUSH:
                self._settle()
            return
        self._settle()
        path = round.accepted.path
        states = self.head.read(round.forward).gather(1, path.unsqueeze(-1).expand(-1, -1, self.states.shape[-1]))
        self._queue(states, round.accepted.tokens, counts)

    def _settle(self) -> None:
        """Queue what rounds without a draft have committed; a row that is missing in one has left for good."""
        if self.skipped:
            states, tokens, counts = zip(*self.skipped)
            self.skipped = []
            self._queue(torch.cat(states, 1), torch.cat(tokens, 1), [sum(row) for row in zip(*counts)])

    def _queue(self, states: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """Add pairs, the first `counts[b]` of [B, P], to those that wait."""
        if not any(self.waiting):
            self.states, self.tokens, self.waiting = states, tokens, counts
            return
        (held, D), P = self.states.shape[1:], tokens.shape[1]
        start = upload(self.waiting, tokens.device).unsqueeze(1)
        slots = start + torch.arange(P, device=tokens.device)
        self.states = torch.cat([self.states, states.new_zeros(states.shape)], 1)
        self.states.scatter_(1, slots.unsqueeze(-1).expand(-1, -1, D), states)
        self.tokens = torch.cat([self.tokens, tokens.new_zeros(tokens.shape)], 1).scatter_(1, slots, tokens)
        self.waiting = [w + c for w, c in zip(self.waiting, counts)]
        width = max(self.waiting)
        if width < held + P:
            self.states, self.tokens = self.states[:, :width], self.tokens[:, :width]
        if width > _FLUSH:
            self._take_in(keep_last=True)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Draft `plan.depth` levels and keep the best `plan.budget[b]` nodes of each row.

        Args:
            roots: [B] int64.
            plan: depth at least 1 to draft at all.

        Returns:
            Trees of at most `max(plan.budget) + 1` nodes.

        Raises:
            ValueError: candidates are drawn, and the plan would let them decide how many there are.
        """
        if plan.depth < 1 or max(plan.budget) < 1:
            return root_only(roots)
        if plan.depth > self.max_depth:
            plan = replace(plan, depth=self.max_depth)
        self._take_in(keep_last=False)
        state = self._root_state()
        if self.widths:
            return self._draw(roots, state, plan)
        if self.shape is not None:
            return self._fill(self.shape.cut(max(plan.budget), plan.depth), roots, state, plan.budget)
        tokens, parents, scores, depth = self._expand(roots, state, plan)
        return best_of_pool(tokens, parents, scores, plan.budget, depth, plan.prune is not None)

    def _masks(self, tree: Tensor, B: int) -> Tensor:
        """Additive masks [B, 1, M, n + W] over the n stable slots and those of the tree.

        Args:
            tree: [1 or B, 1, M, W], the columns of the tree.
        """
        lengths = self.kv.lengths
        stable = max(lengths)
        masks = F.pad(tree.expand(B, -1, -1, -1), (stable, 0))
        if min(lengths) < stable:
            masks[..., :stable].masked_fill_(~self.kv.visible(stable)[:, None, None], float("-inf"))
        return masks

    def _expand(self, roots: Tensor, state: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, int]:
        """Beam search over draft tokens (EAGLE-2, expansion).

        Args:
            state: [B, 1, D], the head's output at the newest stable pair.
            plan: levels to draft, and whether to go on after each.

        Returns:
            Pool of candidates, the root first: tokens, parents (pool indices) and cumulative scores (see `_scored`),
            each [B, C]; and its depth.
        """
        B, k, depth = state.shape[0], self.width, plan.depth
        best = self._scored(state, 1).squeeze(1).topk(k, dim=-1)
        beam_scores, beam_tokens = best.values, self.head.target_ids(best.indices)
        pool_tokens = [roots.unsqueeze(1), beam_tokens]
        pool_scores = [self.root_scores, beam_scores]
        chosen_at: list[Tensor] = []
        beam_states = state.expand(-1, k, -1)
        stable, seen = max(self.kv.lengths), k * (depth - 1)
        masks = self._masks(self.own[..., :seen], B)
        by_beam = masks.flatten(0, 2)  # a view
        cos, sin = self._rope(0, depth - 1)
        ropes = list(zip(cos.split(1, 2), sin.split(1, 2)))
        self.kv.begin_tree(seen)
        for level in range(1, depth):
            if plan.extend is not None and not plan.extend(level, beam_scores):
                depth = level
                break
            end = stable + k * level
            outputs = self._draft_pass(beam_tokens, beam_states, ropes[level - 1], masks[..., :end])
            best = self._scored(outputs, level + 1).topk(k, dim=-1)
            scores = (beam_scores.unsqueeze(-1) + best.values).flatten(1)
            tokens = self.head.target_ids(best.indices).flatten(1)
            pool_tokens.append(tokens)
            pool_scores.append(scores)
            if level == depth - 1:
                break
            beam_scores, chosen = scores.topk(k, dim=-1)
            chosen_at.append(chosen)
            beam_tokens, beam_states = tokens.gather(1, chosen), outputs
            if k > 1:  # a beam goes on from its parent's output, and inherits what its parent sees
                parents = self.parent_beams.gather(1, chosen).flatten()
                beam_states = outputs.flatten(0, 1).index_select(0, parents).view(B, k, -1)
                inherited = by_beam[:, stable:end]
                inherited.copy_(inherited.index_select(0, parents))
        parents_in_pool = self._pool_parents(chosen_at[: max(depth - 2, 0)], B, depth)
        return torch.cat(pool_tokens, 1), parents_in_pool, torch.cat(pool_scores, 1), depth

    def _pool_parents(self, chosen_at: list[Tensor], B: int, depth: int) -> Tensor:
        """Parents [B, C] in the pool: k children of the root, then k children of each beam of each further level.

        Args:
            chosen_at: of each level that was expanded further, which of its k * k candidates became beams, [B, k].
        """
        k = self.width
        first, starts = _pool_constants(B, k, depth, self.own.device)
        if not chosen_at:
            return first
        beams = (torch.cat(chosen_at, 1) + starts).unsqueeze(-1).expand(-1, -1, k).flatten(1)
        return torch.cat([first, beams], 1)

    def _rope(self, offset: int, n: int) -> tuple[Tensor, Tensor]:
        """Rotation of the n positions from `offset` behind each row's stored pairs, [B or 1, 1, n, Dh]."""
        lengths, rotary, start = self.kv.lengths, self.head.rotary, self.kv.lengths_device
        if any(self.shift):
            lengths, start = [m + shift for m, shift in zip(lengths, self.shift)], start + self.moved[1]
        if min(lengths) == max(lengths):
            return rotary.span(lengths[0] + offset, n, self.own)
        start = (start + offset).clamp_min(0).unsqueeze(1)
        return rotary.at(start + torch.arange(n, device=start.device), max(lengths) + offset + n, self.own.dtype)

    def _positions(self, ahead: int) -> Tensor:
        """[B, 1] index of the token `ahead` behind the root, once all that waits is taken in."""
        lengths = self.kv.lengths_device
        return ((lengths + self.moved[0] if any(self.dropped) else lengths) + ahead).unsqueeze(1)

    def _scored(self, states: Tensor, ahead: int) -> Tensor:
        """Log-probability [B, M, V] that the target will choose each token: log q, or `noisy_scores`.

        Args:
            states: [B, M, D] of the block.
            ahead: how far behind the root the token is that they are about.
        """
        logits = self.head.logits(states, self.target.unembed)
        if self.sampler is None:
            return logits.log_softmax(-1)
        ids, V = self.head.draft_ids, self.target.shape.vocab_size
        return noisy_scores(logits, self.sampler, self.keys, self._positions(ahead), self.noise_share, ids, V)

    def _fill(self, shape: StaticTree, roots: Tensor, state: Tensor, budget: Sequence[int]) -> Tree:
        """Trees of one shape, whose nodes are candidates of given ranks.

        Args:
            shape: no larger than the budget.
            roots, state: see `propose` and `_expand`.

        Source: EAGLE (arXiv 2401.15077), static tree.
        """
        tokens = [roots.unsqueeze(1)]
        self.kv.begin_tree(shape.growth[-1].mask.shape[-1])
        for level, grow in enumerate(shape.growth):
            if level:
                above = state.index_select(1, grow.above)
                masks = self._masks(grow.mask.to(state.dtype), len(roots))
                state = self._draft_pass(tokens[-1][:, grow.parents], above, self._rope(level - 1, 1), masks)
            best = self._scored(state, level + 1).topk(grow.width, dim=-1).indices
            tokens.append(self.head.target_ids(best).flatten(1)[:, grow.picks])
        return shape.trees(torch.cat(tokens, 1), budget)

    def _draw(self, roots: Tensor, state: Tensor, plan: Plan) -> Tree:
        """Trees of one shape whose candidates are drawn from the head's distribution, siblings without replacement.

        Args:
            roots, state: see `propose` and `_expand`.
            plan: the budget keeps the first nodes in level order.
        """
        assert self.sampler is not None
        B, (widths, counts) = len(roots), drawn_levels(self.widths, plan, plan.depth)
        tokens, chances = [roots.unsqueeze(1)], []
        seen = state.new_zeros((B, 1, 1, 0))
        self.kv.begin_tree(sum(counts[1:-1]))
        for level, width in enumerate(widths):
            if level:
                eye = state.new_full((counts[level], counts[level]), float("-inf")).fill_diagonal_(0.0)
                seen = torch.cat([seen.repeat_interleave(widths[level - 1], 2), eye.expand(B, 1, -1, -1)], -1)
                state = state.repeat_interleave(widths[level - 1], 1)
                state = self._draft_pass(tokens[-1], state, self._rope(level - 1, 1), self._masks(seen, B))
            weights = self.sampler.weights(self._full(self.head.logits(state, self.target.unembed)))
            chances.append(weights.softmax(-1))
            positions = self._positions(level + 1)
            noise = gumbel_noise(
                self.sampler.seed, self.keys, positions, weights.shape[-1], weights.dtype, DRAFT_STREAM
            )
            # The best of log q + Gumbel noise, in order, are draws without replacement (arXiv 1903.06059).
            tokens.append((weights + noise).topk(width, dim=-1).indices.flatten(1))
        return drawn_trees(tokens, chances, widths, plan.budget)

    def _full(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary [B, M, V], -inf where the head has none of its own."""
        if self.head.draft_ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.target.shape.vocab_size), float("-inf"))
        return full.index_copy(-1, self.head.draft_ids, logits)

    def _draft_pass(self, tokens: Tensor, states: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One pass over the beams of a level; their keys and values go behind those of earlier levels."""

        def tree_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.kv.write(0, k, v)
            self.kv.offset += k.shape[2]
            return attend(q, keys, values, mask)

        return self.head.block(self.head.pair(self.target.embed(tokens), states, self.notes), rope, tree_attention)

    def _take_in(self, keep_last: bool) -> None:
        """Project the waiting pairs to keys and values: all of them, or all but the newest of each row."""
        self._settle()
        for row, (prompt, forward, features) in sorted(self.prompts.items()):
            self._take_in_prompt(row, prompt, forward, features)
        self.prompts.clear()
        counts = [max(w - keep_last, 0) for w in self.waiting]
        width = max(counts)
        if not width:
            return
        entered = self.head.enter(self.states[:, :width])
        u, rope = self.head.pair(self.target.embed(self.tokens[:, :width]), entered, self.notes), self._rope(0, width)
        if keep_last:
            self.kv.append(0, *self.head.block.keys_values(u, rope), counts)
            self.kv.advance(counts)
            last = upload(counts, u.device)
            self.states, self.tokens = _at(self.states, last, 1), _at(self.tokens, last, 1)
            self.waiting = [min(w, 1) for w in self.waiting]
            return
        residual, q, k, v = self.head.block.project(u, rope)
        self.kv.append(0, k, v, counts)
        self.kv.advance(counts)
        if min(counts) == width:
            self.newest = residual[:, width - 1 :], q[:, :, width - 1 :]
        else:
            last = upload([max(c - 1, 0) for c in counts], u.device)
            self.newest = _at(residual, last, 1), _at(q, last, 2)
        self.waiting = [0] * len(self.waiting)

    def _take_in_prompt(self, row: int, prompt: Prompt, forward: Forward, features: Tensor) -> None:
        """Pairs 0..L-2 of a fresh row: keys and values only, nothing else of them is ever used."""
        assert forward.embeds is not None
        axes, delta, n_pairs = None, 0, len(prompt) - 1
        if self.head.config.rope == "mrope":
            assert forward.positions is not None
            assert forward.visual is not None
            axes = pair_axes(forward.positions, forward.visual)[:, 0]
            delta = int(forward.positions.max()) - n_pairs
        visual = prompt.visual[1:] if self.head.marks_images else None
        prefix = self.head.prefix(Pairs(forward.embeds[0, 1:], features, None, n_pairs + 1, visual, axes))
        keys, values = self.head.block.keys_values(prefix.inputs, prefix.rope)
        self.kv.begin_prefill(row)
        self.kv.write(0, keys, values)
        n_kept = keys.shape[2]
        self.kv.set_length(row, n_kept)
        self._place(row, n_pairs - n_kept, n_pairs - n_kept + delta)
        if self.notes is not None and prefix.latest is not None:
            self.notes[row] = prefix.latest[0]

    def _root_state(self) -> Tensor:
        """The head's output [B, 1, D] at each row's newest pair, whose keys and values are stored already."""
        width, (residual, q) = max(self.kv.lengths), self.newest
        mask = None
        if min(self.kv.lengths) != width:
            mask = torch.zeros((len(q), 1, 1, width), dtype=q.dtype, device=q.device)
            mask.masked_fill_(~self.kv.visible(width)[:, None, None], float("-inf"))
        keys, values = self.kv.data[0, 0, :, :, :width], self.kv.data[0, 1, :, :, :width]
        return self.head.block.finish(residual, attend(q, keys, values, mask))


def _at(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of each row of x [B, ...] the one entry along `dim` that index [B] names, kept as an axis of 1."""
    shape = [-1, *[1] * (x.ndim - 1)]
    return x.gather(dim, index.view(shape).expand(*x.shape[:dim], 1, *x.shape[dim + 1 :]))
